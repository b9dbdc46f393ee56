"""Tables in Parquet, read by pyarrow, which is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..training import BadInput
from .source import Array
from .table import Pick, Table, refuse_repeated


def read(path: Path, pick: Pick) -> Table:
    """Read the wanted columns. Raises BadInput, with the row and the column, for what is not a table of numbers."""
    where = str(path)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise BadInput(f"{where}: reading .parquet needs pyarrow; pip install piecework[parquet]") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            refuse_repeated(names, where)
            wanted = pick(names, True)
            chosen = list(wanted.features) + ([] if wanted.target is None else [wanted.target])
            table = file.read(columns=[names[i] for i in chosen])
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{where} is truncated or not a Parquet file: {reason}") from error
    if table.num_rows == 0:
        raise BadInput(f"{where} has columns and no rows")
    x = np.empty((table.num_rows, len(wanted.features)))
    for place, i in enumerate(wanted.features):
        x[:, place] = _numbers(table.column(names[i]), names[i], where)
    target = None if wanted.target is None else names[wanted.target]
    y = None if target is None else _labels(table.column(target), target, where)
    return Table(x, y, tuple(names[i] for i in wanted.features), target)


def _present(values: Any, name: str, where: str) -> Any:
    import pyarrow

    if pyarrow.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy()))
        raise BadInput(f"{where}: column '{name}' holds nothing in row {row}; fill in or leave out such rows")
    return values


def _numbers(values: Any, name: str, where: str) -> Array:
    from pyarrow import types

    values = _present(values, name, where)
    kind = values.type
    if types.is_decimal(kind):
        values = values.cast("float64")
    elif types.is_string(kind) or types.is_large_string(kind):
        raise BadInput(
            f"{where}: column '{name}' holds text ({values[0].as_py()!r} in row 0); features are numbers, "
            "so encode it as numbers or leave it out"
        )
    elif not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise BadInput(f"{where}: column '{name}' holds values of type {kind}; features are numbers")
    array: Array = values.to_numpy()
    return array


def _labels(values: Any, name: str, where: str) -> Array:
    from pyarrow import types

    values = _present(values, name, where)
    if types.is_string(values.type) or types.is_large_string(values.type):
        return np.array(values.to_pylist(), dtype=np.str_)
    return _numbers(values, name, where)
