"""What a target column means: classes or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..training import BadInput, Task
from .checks import tiles
from .source import Array

FEW = 100
"""An integer target with more different values than this is taken for a number."""


@dataclass(frozen=True, eq=False)
class Meaning:
    """task: what to train; values: (C,) the labels as they stand in the data, sorted, or None for a regression;
    classes: the same as text; note: how it was decided."""

    task: Task
    values: Array | None
    classes: tuple[str, ...]
    note: str


def meaning(ys: Sequence[Array], where: str, *, asked: Task | None = None, known: Task | None = None) -> Meaning:
    """What the targets (all parts of a set, each (n,) or (n, k)) mean.

    Text and booleans are classes. Whole numbers are classes if they are two, or at most FEW and each has at least five
    rows on average; anything else is a number to be regressed. `known` (a named set) goes before that rule, and `asked`
    (--task) before both. Raises BadInput for one class, and for what cannot be as asked."""
    labels = ys[0].dtype.kind in "USb"
    want = asked or known
    if ys[0].ndim == 2 and ys[0].shape[1] > 1:
        if want in ("binary", "multiclass"):
            raise BadInput(f"{where}: the target has {ys[0].shape[1]} columns; for classes give one column of labels")
        return Meaning("regression", None, (), f"target has {ys[0].shape[1]} columns: regression")
    if want == "regression":
        if labels:
            first = label(ys[0].reshape(-1)[0])
            raise BadInput(f"{where}: the target holds labels ('{first}' in row 0); a regression needs numbers")
        return Meaning("regression", None, (), "regression, as asked" if asked else "regression")
    return _classes(ys, where, asked, known) if want or labels else _inferred(ys, where)


def _inferred(ys: Sequence[Array], where: str) -> Meaning:
    """Numbers of which nobody said what they are."""
    num_rows = sum(len(y) for y in ys)
    if not all(whole(y) for y in ys):
        said = "numbers with fractions"
    elif (values := distinct(ys, FEW)) is None:
        said = f"more than {FEW} integer values"
    else:
        _refuse_one(values, where)
        said = f"{len(values)} integer values"
        if len(values) == 2 or 5 * len(values) <= num_rows:
            task: Task = "binary" if len(values) == 2 else "multiclass"
            return Meaning(task, values, tuple(map(label, values)), f"target has {said}: {task} (--task overrides)")
        said += f" in {num_rows} rows"
    return Meaning("regression", None, (), f"target has {said}: regression (--task overrides)")


def _classes(ys: Sequence[Array], where: str, asked: Task | None, known: Task | None) -> Meaning:
    """Labels, or numbers that are said to be classes."""
    num_rows = sum(len(y) for y in ys)
    most = max(2, num_rows // 2)
    values = distinct(ys, most)
    if values is None:
        way_out = "choose another target column" + (", or --task regression" if ys[0].dtype.kind in "fiu" else "")
        raise BadInput(f"{where}: the target has more than {most} different values in {num_rows} rows; {way_out}")
    _refuse_one(values, where)
    if asked == "binary" and len(values) != 2:
        raise BadInput(
            f"{where}: the target has {len(values)} classes, --task binary needs two; give --task multiclass"
        )
    task: Task = asked or ("binary" if len(values) == 2 else "multiclass")
    if asked:
        said = f"{task} with {len(values)} classes, as asked"
    elif known:
        said = f"{task} with {len(values)} classes"
    else:
        said = f"target has {len(values)} different labels: {task} (--task overrides)"
    return Meaning(task, values, tuple(map(label, values)), said)


def _refuse_one(values: Array, where: str) -> None:
    if len(values) == 1:
        raise BadInput(f"{where}: the target is {label(values[0])} in every row; classes need at least two values")


def distinct(ys: Sequence[Array], most: int) -> Array | None:
    """The different values of the targets, sorted, or None if there are more than `most`; reads them in tiles."""
    found: Array | None = None
    for y in ys:
        for rows in tiles(len(y), 1):
            values = np.unique(np.asarray(y[rows]))
            found = values if found is None else np.union1d(found, values)
            if len(found) > most:
                return None
    return found


def whole(y: Array) -> bool:
    """Whether every target is a whole number."""
    if y.dtype.kind != "f":
        return y.dtype.kind in "iu"
    return all(bool((np.floor(y[rows]) == y[rows]).all()) for rows in tiles(len(y), 1))


def label(value: object) -> str:
    """A class as text: 3 for 3.0."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.floating):
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    return str(value)


def codes(y: Array, values: Array) -> Array:
    """(n,) int64: the place of each target among the sorted `values`; targets that already are that are not copied."""
    flat = y.reshape(len(y))
    if flat.dtype == np.int64 and flat.dtype.isnative and np.array_equal(values, np.arange(len(values))):
        return flat
    out = np.empty(len(flat), dtype=np.int64)
    for rows in tiles(len(flat), 1):
        out[rows] = np.searchsorted(values, np.asarray(flat[rows]))
    return out
