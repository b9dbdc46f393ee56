"""Refusals: what data must be before any training, each said in one sentence with the row or column."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..training import BadInput
from .source import Array, Source, is_mapped

TILE = 1 << 21
"""Numbers of a mapped file that are held at once (16 MiB in float64)."""


def tiles(num_rows: int, width: int) -> Iterator[slice]:
    """The rows 0 .. num_rows - 1 in slices of at most TILE numbers, `width` numbers a row."""
    step = max(1, TILE // max(1, width))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def width(x: Array) -> int:
    """Numbers a row."""
    return int(np.prod(x.shape[1:], dtype=np.int64))


def column(number: int, names: Sequence[str] = ()) -> str:
    """A column as a person would name it: by its name, or by its number from 0."""
    return f"column '{names[number]}'" if names else f"column {number}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """A clause ` (did you mean 'x'?)`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word.lower(), {k.lower(): k for k in known}, n=1, cutoff=0.6)
    original = {k.lower(): k for k in known}
    return f" (did you mean '{original[near[0]]}'?)" if near else ""


def some(words: Sequence[str], most: int = 12) -> str:
    """A list for a message, cut where it gets long."""
    if not words:
        return "none"
    return ", ".join(words[:most]) + (f", ... ({len(words)} in all)" if len(words) > most else "")


def refuse_unusable_numbers(
    x: Array, where: str, *, names: Sequence[str] = (), limit: float = np.inf, first_row: int = 0, target: bool = False
) -> None:
    """Refuse the first NaN, infinity or number beyond `limit`, by row and column; reads the array in tiles.

    limit: the largest number of the type that the rows will be trained in."""
    if x.dtype.kind != "f":
        return
    for rows in tiles(len(x), width(x)):
        tile = np.asarray(x[rows]).reshape(rows.stop - rows.start, -1)
        fine = np.isfinite(tile)
        if float(np.finfo(x.dtype).max) > limit:
            fine &= np.abs(tile) <= limit
        if fine.all():
            continue
        row, col = (int(i) for i in np.argwhere(~fine)[0])
        place = "the target" if target else column(col, names)
        value = float(tile[row, col])
        number = first_row + rows.start + row
        if np.isfinite(value):
            raise BadInput(
                f"{where}: row {number}, {place} is {value:g}, more than the training's number type holds ({limit:g}); "
                "rescale the column or give --dtype float64"
            )
        counted = "" if names or target else " (both counted from 0)"
        raise BadInput(
            f"{where}: row {number}, {place}{counted} is {value:g}; fill in or leave out such rows, "
            "every value must be a finite number"
        )


def refuse_unusable_arrays(source: Source) -> None:
    """Refuse arrays of wrong types, shapes or lengths. Reads no values."""
    where = source.name
    called = [("x", "y")] if source.x_test is None else [("x_train", "y_train"), ("x_test", "y_test")]
    for (x_name, y_name), (x, y) in zip(called, source.arrays, strict=True):
        features(x, where, x_name)
        if y.ndim == 0 or y.ndim > 2 or (y.ndim == 2 and y.shape[1] == 0):
            raise BadInput(f"{where}: {y_name} has shape {y.shape}; it must be (rows,) or (rows, outputs)")
        if y.dtype.kind not in "fiubUS":
            raise BadInput(f"{where}: {y_name} holds {_kind(y)}; targets are numbers or text")
        if y.dtype.kind in "US" and y.ndim == 2 and y.shape[1] > 1:
            raise BadInput(f"{where}: {y_name} holds text in {y.shape[1]} columns; class labels are one column")
        if len(x) != len(y):
            raise BadInput(f"{where}: {x_name} has {len(x)} rows and {y_name} has {len(y)}; they must have as many")
    if source.x_test is not None and source.y_test is not None:
        if source.x_test.shape[1:] != source.x.shape[1:]:
            raise BadInput(
                f"{where}: a row of x_train has shape {source.x.shape[1:]} and a row of x_test "
                f"{source.x_test.shape[1:]}; they must be the same features"
            )
        if source.y_test.shape[1:] != source.y.shape[1:]:
            raise BadInput(f"{where}: y_train has shape {source.y.shape} and y_test {source.y_test.shape}")


def features(x: Array, where: str, name: str = "x") -> None:
    """Refuse a features array of a wrong type or shape, and an empty one."""
    if x.dtype.kind not in "fiub":
        raise BadInput(f"{where}: {name} holds {_kind(x)}; features must be real numbers")
    if x.ndim < 2:
        raise BadInput(f"{where}: {name} has shape {x.shape}; it must be (rows, features), one row a sample")
    if len(x) == 0:
        raise BadInput(f"{where}: {name} is empty, there is no row to train on")
    if width(x) == 0:
        raise BadInput(f"{where}: {name} has shape {x.shape}, there is no feature to train on")
    if is_mapped(x):
        if x.dtype.kind == "b" or x.dtype in (np.uint16, np.uint32, np.uint64, np.longdouble) or not x.dtype.isnative:
            raise BadInput(
                f"{where}: {name} is too large to be converted in memory and has type {x.dtype}; "
                "save it as float32, float64, uint8 or a signed integer type of this machine's byte order"
            )
        if not x.flags.c_contiguous:
            raise BadInput(
                f"{where}: {name} is too large to be rearranged in memory and was saved column by column; "
                "save numpy.ascontiguousarray(x)"
            )


def _kind(array: Array) -> str:
    kinds = {
        "O": "Python objects",
        "U": "text",
        "S": "text",
        "c": "complex numbers",
        "M": "dates",
        "m": "durations",
        "V": "records",
    }
    return kinds.get(array.dtype.kind, str(array.dtype))
