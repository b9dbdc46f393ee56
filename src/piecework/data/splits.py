"""Which rows train, which choose and which report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..training import BadInput, stream
from .source import Array, Source, is_mapped

Rows = range | Array
"""A contiguous range of rows (taken as a view), or their numbers (taken as a copy)."""

_SPLIT, _TRAIN, _TEST = 1, 2, 3


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of the training array and of the test array (the same array if the set has no test rows of its own)."""

    train: Rows
    validation: Rows | None
    test: Rows


def ordering(num_rows: int, classes: Array | None, seed: int, key: int) -> Array:
    """(n,) int64: the rows in an order that only (seed, key) decides.

    With `classes` ((n,) codes) every beginning and every end of the order is stratified: member j of the m of a class
    is put at (j + u) / m, u uniform, and the first member of each class comes before all that, so that the first C rows
    hold every class once."""
    generator = stream(seed, int.from_bytes(b"rows", "big"), key)
    shuffled = torch.randperm(num_rows, generator=generator).numpy()
    if classes is None:
        return shuffled
    jitter = torch.rand(num_rows, generator=generator, dtype=torch.float64).numpy()
    grouped = shuffled[np.argsort(classes[shuffled], kind="stable")]
    counts = np.bincount(classes)
    own = counts[classes[grouped]]
    member = np.arange(num_rows) - np.repeat(np.cumsum(counts) - counts, counts)
    place = np.where(member == 0, jitter - 1, (member + jitter) / own)
    ordered: Array = grouped[np.argsort(place, kind="stable")]
    return ordered


def split(
    source: Source,
    classes: Array | None,
    test_classes: Array | None,
    *,
    rows: int | None,
    test_rows: int | None,
    validation: float,
    seed: int,
) -> Split:
    """Share out the rows of a source.

    classes: (n,) codes of the targets, test_classes: of the set's own test rows, both None for a regression. rows: that
    many training rows, of which `validation` (a fraction) is then set aside; test_rows: that many test rows. Without
    test rows of its own a mapped file gives its last 20 % and anything else 20 % by seed. A mapped array gives
    contiguous ranges; other subsets are drawn by seed, stratified where there are classes. Raises BadInput where that
    leaves nothing to train on."""
    where = source.name
    drawn = rows is not None or validation > 0, test_rows is not None
    train, test = _all_rows(source, classes, test_classes, seed, drawn)
    train, test = _first(train, rows, "rows", "training", where), _first(test, test_rows, "test-rows", "test", where)
    if not validation:
        return Split(train, None, test)
    held = round(validation * len(train))
    kept = len(train) - held
    if not 0 < held < len(train):
        raise BadInput(
            f"{where}: --validation {validation:g} of {len(train)} training rows leaves {kept} to train on and {held} "
            "to choose by; both need at least one"
        )
    return Split(train[:kept], train[kept:], test)


def _all_rows(
    source: Source, classes: Array | None, test_classes: Array | None, seed: int, drawn: tuple[bool, bool]
) -> tuple[Rows, Rows]:
    """All training and all test rows; `drawn` says of which of them only some will be used."""
    num_rows = len(source.x)
    if source.x_test is None:
        if num_rows < 2:
            raise BadInput(f"{source.name}: one row cannot be split into training and test rows; give more rows")
        kept = num_rows - max(1, num_rows // 5)
        order: Rows = range(num_rows) if source.mapped else ordering(num_rows, classes, seed, _SPLIT)
        return order[:kept], order[kept:]
    num_test = len(source.x_test)
    by_seed = drawn[0] and not source.mapped, drawn[1] and not is_mapped(source.x_test)
    train: Rows = ordering(num_rows, classes, seed, _TRAIN) if by_seed[0] else range(num_rows)
    test: Rows = ordering(num_test, test_classes, seed, _TEST) if by_seed[1] else range(num_test)
    return train, test


def _first(rows: Rows, most: int | None, option: str, what: str, where: str) -> Rows:
    if most is None:
        return rows
    if most > len(rows):
        raise BadInput(f"{where}: --{option} {most} asks for more than the {len(rows)} {what} rows there are")
    return rows[:most]


def take(array: Array, rows: Rows) -> Array:
    """These rows: a view for a range, a copy otherwise."""
    taken: Array = array[rows.start : rows.stop] if isinstance(rows, range) else array[rows]
    return taken
