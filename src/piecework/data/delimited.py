"""Tables as text: .csv and .csv.gz, with or without a header."""

from __future__ import annotations

import csv
import gzip
import itertools
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np

from ..training import BadInput
from .checks import column
from .source import Array
from .table import Pick, Table, Wanted, refuse_repeated

CHUNK = 4096
"""Rows that are parsed at once."""


def read(path: Path, pick: Pick, *, target: str | int | None = None) -> Table:
    """Read the wanted columns of a table in UTF-8; fields are separated by commas, or else semicolons or tabs.

    The first row is a header unless all its fields are numbers, the one in the place of a numbered `target` excepted.
    Raises BadInput for what is not a table of numbers, with the row (counted from 0, without the header) and the
    column."""
    where = str(path)
    with _opened(path, where) as file:
        first_line = file.readline()
        file.seek(0)
        separator = max(",;\t", key=first_line.count)
        rows: Iterator[list[str]] = filter(None, csv.reader(file, delimiter=separator, strict=True))
        first = next(rows, None)
        if first is None:
            raise BadInput(f"{where} is empty")
        header = _is_header(first, target)
        names = [name.strip() for name in first] if header else [str(i) for i in range(len(first))]
        refuse_repeated(names, where)
        wanted = pick(names, header)
        if not header:
            rows = itertools.chain([first], rows)
        x, y = _columns(rows, names if header else (), len(names), wanted, where)
    return Table(
        x,
        y,
        tuple(names[i] for i in wanted.features) if header else (),
        None if wanted.target is None else names[wanted.target],
    )


@contextmanager
def _opened(path: Path, where: str) -> Iterator[TextIO]:
    """The text, with each way in which a file can be no text said in a sentence."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
                yield file
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                yield file
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not a text in UTF-8 ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise BadInput(f"{where} is not a table of separated fields: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{where} is truncated or not a gzip archive: {error}") from error
    except OSError as error:
        raise BadInput(f"{where} cannot be read: {error.strerror or error}") from error


def _is_header(first: Sequence[str], target: str | int | None) -> bool:
    try:
        labels = range(len(first))[int(target)] if target is not None else -1
    except (ValueError, IndexError):
        labels = -1
    return any(_number(field) is None for i, field in enumerate(first) if i != labels)


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _columns(
    rows: Iterator[list[str]], names: Sequence[str], num_columns: int, wanted: Wanted, where: str
) -> tuple[Array, Array | None]:
    """(n, d) float64 features and (n,) targets, text if any of them is no number."""
    xs: list[Array] = []
    ys: list[Array] = []
    start = 0
    while chunk := list(itertools.islice(rows, CHUNK)):
        for i, row in enumerate(chunk):
            if len(row) != num_columns:
                raise BadInput(f"{where}: row {start + i} has {len(row)} fields where the first line has {num_columns}")
        fields = (row[j] for row in chunk for j in wanted.features)
        try:
            x = np.fromiter(map(float, fields), dtype=np.float64, count=len(chunk) * len(wanted.features))
        except ValueError:
            raise _no_number(chunk, start, names, wanted, where) from None
        xs.append(x.reshape(len(chunk), len(wanted.features)))
        if wanted.target is not None:
            ys.append(_labels(chunk, start, names, wanted.target, where))
        start += len(chunk)
    if start == 0:
        raise BadInput(f"{where} has a header and no rows")
    return np.concatenate(xs), _merged(ys) if wanted.target is not None else None


def _no_number(chunk: list[list[str]], start: int, names: Sequence[str], wanted: Wanted, where: str) -> BadInput:
    for i, row in enumerate(chunk):
        for j in wanted.features:
            if _number(row[j]) is None:
                what = f"text ({row[j]!r})" if row[j].strip() else "nothing"
                return BadInput(
                    f"{where}: {column(j, names)} holds {what} in row {start + i}; features are numbers, so "
                    "encode it as numbers, fill it in or leave it out"
                )
    raise AssertionError("a field was no number, and now all are")


def _labels(chunk: list[list[str]], start: int, names: Sequence[str], target: int, where: str) -> Array:
    fields = [row[target].strip() for row in chunk]
    if "" in fields:
        raise BadInput(f"{where}: {column(target, names)} (the target) holds nothing in row {start + fields.index('')}")
    return np.array(fields, dtype=np.str_)


def _merged(parts: list[Array]) -> Array:
    text = np.concatenate(parts)
    try:
        return text.astype(np.float64)
    except ValueError:
        return text
