"""Figures of codes that need no labels: what they reconstruct, how sparse they are, whether they come again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..training import BadInput, stream
from . import inputs
from .inputs import Array, Rows


def relative_error(rows: Rows, reconstruction: Rows) -> float:
    """||A - A'||_F / ||A||_F of rows A and their reconstruction A', both (n, ...), for example A' = S M^T.

    For a label-free error S must come from the rows alone: S_train has seen the labels. Raises BadInput for shapes
    that differ and for rows of zeros."""
    a, b = (np.asarray(inputs.array(part), dtype=np.float64) for part in (rows, reconstruction))
    if a.shape != b.shape:
        raise BadInput(f"the rows have shape {a.shape} and their reconstruction {b.shape}")
    size = float(np.linalg.norm(a.ravel()))
    if not size > 0:
        raise BadInput("the rows are all zero, an error relative to them means nothing")
    return float(np.linalg.norm((a - b).ravel())) / size


def zeros(codes: Rows, tolerance: float = 1e-6) -> float:
    """The share of codes (n, r) that are zero: at most `tolerance` times the largest of their factor, in size.

    A factor that is zero everywhere counts as zeros."""
    size = np.abs(inputs.codes(codes))
    return float(np.mean(size <= tolerance * size.max(0)))


@dataclass(frozen=True, eq=False)
class Stability:
    """Whether factors come again with another seed."""

    mean: float
    """Mean over the pairs of runs of their matched |correlation|, 0 to 1."""
    pairs: Array
    """(p,) of each pair: (0, 1), (0, 2), ..., (1, 2), ..."""
    null: float
    """What `mean` would be without any relation: rows of one of each pair shuffled, the best match still taken."""


def stability(codes: Sequence[Rows], *, permutations: int = 20, seed: int = 0) -> Stability:
    """Match the columns of every two codes of the same rows, one to one, so that their |correlations| add up to most.

    codes: two or more, (n, r_i) each, of the same rows in the same order, not those trained on. The mean is over the
    min(r_i, r_j) matched columns; a constant column has correlation 0 with everything. permutations: shuffles a pair
    for the null. High stability of codes that know little is no merit. Raises BadInput."""
    if len(codes) < 2:
        raise BadInput(f"stability compares two or more codes, got {len(codes)}")
    if permutations < 1:
        raise BadInput(f"permutations is at least 1, got {permutations}")
    tables = [inputs.codes(table) for table in codes]
    if len({len(table) for table in tables}) > 1:
        raise BadInput(f"the codes have {[len(table) for table in tables]} rows; they must be of the same rows")
    units = [_unit_columns(table) for table in tables]
    found, shuffled = [], []
    for number, (a, b) in enumerate(itertools.combinations(units, 2)):
        found.append(_matched(a, b))
        generator = stream(seed, number)
        for _ in range(permutations):
            shuffled.append(_matched(a, b[torch.randperm(len(b), generator=generator).numpy()]))
    return Stability(float(np.mean(found)), np.array(found), float(np.mean(shuffled)))


def _unit_columns(table: Array) -> Array:
    """Centred columns of length 1; constant ones become 0."""
    centred = table - table.mean(0)
    length = np.linalg.norm(centred, axis=0)
    varies = length > 1e-12 * np.linalg.norm(table, axis=0)
    columns: Array = np.where(varies, centred / np.where(varies, length, 1.0), 0.0)
    return columns


def _matched(a: Array, b: Array) -> float:
    from scipy.optimize import linear_sum_assignment

    size = np.abs(a.T @ b)
    rows, columns = linear_sum_assignment(size, maximize=True)
    return float(size[rows, columns].mean())
