"""What the readers of tables (csv, parquet) share: which columns are wanted, and a column that is no number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..training import BadInput
from .checks import some, suggestion
from .source import Array


@dataclass(frozen=True, eq=False)
class Wanted:
    """Numbers of the columns that are features, in the order wanted, and of the target column, if any is wanted."""

    features: Sequence[int]
    target: int | None


Pick = Callable[[Sequence[str], bool], Wanted]
"""(column names, whether they stand in the file) -> the wanted columns. Without a header the names are "0", "1", ..."""


@dataclass(frozen=True, eq=False)
class Table:
    """x: (n, d) float64 features; y: (n,) numbers or text, or None if no target was wanted.

    names: of the features, empty if the file has no header; target_name: None if no target was wanted."""

    x: Array
    y: Array | None
    names: tuple[str, ...]
    target_name: str | None


def number_of(target: str | int, names: Sequence[str], where: str) -> int:
    """The number of the column called `target`, which is a name, or a number (from 0, or from the end if negative)."""
    if isinstance(target, str) and target in names:
        return names.index(target)
    try:
        number = int(target)
    except ValueError:
        raise BadInput(
            f"{where}: there is no column '{target}'{suggestion(str(target), names)}; the columns are {some(names)}"
        ) from None
    if not -len(names) <= number < len(names):
        raise BadInput(f"{where}: there is no column {number}; the columns are numbered 0 to {len(names) - 1}")
    return number % len(names)


def refuse_repeated(names: Sequence[str], where: str) -> None:
    """Refuse a header in which a name stands twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BadInput(f"{where}: the header has two columns called '{name}'; give every column its own name")
        seen.add(name)


def to_train(target: str | int | None, where: str) -> Pick:
    """All columns are features except `target`, which must be given."""

    def pick(names: Sequence[str], header: bool) -> Wanted:
        if target is None:
            columns = f"the columns are {some(names)}" if header else f"columns 0 to {len(names) - 1} (-1 is the last)"
            raise BadInput(f"{where}: say which column is the target with --target COLUMN; {columns}")
        number = number_of(target, names, where)
        if len(names) == 1:
            raise BadInput(f"{where}: the target is the only column, there is no feature to train on")
        return Wanted([i for i in range(len(names)) if i != number], number)

    return pick
