"""What the figures take: tensors or arrays, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..training import BadInput

Array = NDArray[Any]
Rows = Tensor | Array
"""A tensor (any device, with or without a graph) or an array, a row a sample."""


def array(values: Rows) -> Array:
    """The numbers without graph or device."""
    return np.asarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values)


def codes(values: Rows) -> Array:
    """(n, r) float64; a vector is one factor. Raises BadInput for another shape and for numbers that are not finite."""
    found = array(values)
    table: Array = np.asarray(found[:, None] if found.ndim == 1 else found, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise BadInput(f"codes have shape {found.shape}; they must be (rows, factors), with at least one of each")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise BadInput(f"the code of row {row}, factor {column} is {table[row, column]}; codes must be finite")
    return table


def attributes(values: Rows, num_rows: int) -> Array:
    """(n, a) bool; a vector is one attribute. Raises BadInput unless there is a row for each code, of 0 and 1."""
    found = array(values)
    table = found[:, None] if found.ndim == 1 else found
    if table.ndim != 2 or len(table) != num_rows or table.shape[1] == 0:
        raise BadInput(f"attributes have shape {found.shape}; they must be ({num_rows},) or ({num_rows}, attributes)")
    if not np.isin(table, (0, 1)).all():
        raise BadInput("attributes are 0 or 1; for classes pass piecework.disentangle.one_hot(labels)")
    return table.astype(bool)


def labels(values: Rows, num_rows: int, what: str = "labels") -> Array:
    """(n,) whatever can be told apart. Raises BadInput unless there is one for each code."""
    found = array(values)
    if found.shape != (num_rows,):
        raise BadInput(f"{what} have shape {found.shape}; there must be one for each of the {num_rows} codes")
    return found


def same_factors(train: Array, test: Array) -> None:
    """Refuse codes of the training part and of the other part that have not as many factors."""
    if train.shape[1] != test.shape[1]:
        raise BadInput(f"the training codes have {train.shape[1]} factors and the others {test.shape[1]}")
