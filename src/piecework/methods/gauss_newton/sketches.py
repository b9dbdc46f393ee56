"""Preconditioners of K from the Jacobian's factors, by name."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ...solvers.precondition import LowRank, Preconditioner, nystrom, rpcholesky, sampled, sketched
from .jacobian import Factors, Jacobian
from .systems import Products, Sharded

Sketch = Literal["units", "tensorsketch", "tensor-srht", "count", "sparse-sign", "srht"]


def sketch_of(jacobian: Jacobian, rows: Sharded, kind: Sketch, per_row: float, seed: int) -> Preconditioner:
    """Of a sketch with `per_row` columns for each row of all ranks. Collective.

    For units that is so many hidden units that units times inputs are as many columns; only ranks' own rows of features
    are made, and units from the factors of all. A sketch is factored in float32 whatever the model is: a triangle need
    only be near, and QR of the sketch, unlike its Gram matrix, does not square the condition of J."""
    if kind == "units":
        everyone = jacobian.gathered(rows.group)
        num = max(1, math.ceil(per_row * rows.num_rows / (widest(jacobian) or jacobian.num_columns)))
        return sampled(everyone.units(num, seed, torch.float32))
    num = max(1, math.ceil(per_row * rows.num_rows))
    return sketched(rows.all(jacobian.features(kind, num, seed)).float())


def widest(jacobian: Jacobian) -> int:
    """Inputs of the layer with most parameters; 0 where no layer has factors."""
    factors = [block for block in jacobian.blocks if isinstance(block, Factors)]
    return max(factors, key=lambda block: block.num_columns).num_inputs if factors else 0


def low_rank(jacobian: Jacobian, rows: Sharded, damping: float, seed: int, rank: int | None = None) -> LowRank:
    """Randomly pivoted partial Cholesky of K over all ranks' rows. Collective."""
    everyone = jacobian.gathered(rows.group)
    return rpcholesky(everyone.columns, everyone.diagonal(), rank=rank, damping=damping, seed=seed)


def nystrom_of(rows: Sharded, like: Tensor, rank: int, seed: int) -> Preconditioner:
    """From `rank` products, in the dtype and on the device of `like`. Collective."""
    return nystrom(Products(rows), rows.num_rows, rank=rank, seed=seed, like=like)
