"""Intervals by resampling people, not pictures: pictures of one person are not independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..training import BadInput, stream
from . import inputs
from .inputs import Array, Rows


@dataclass(frozen=True)
class Interval:
    """A figure with the percentiles of its resampled values."""

    estimate: float
    """Of all rows."""
    low: float
    high: float
    num_draws: int
    """Draws in which the figure was defined."""


def interval(
    figure: Callable[[Array], float], identities: Rows, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The percentile bootstrap (Efron, 1979) over clusters: draw as many identities as there are, with replacement.

    figure: of row numbers, which repeat where an identity is drawn twice, for example
    `lambda rows: auc(scores[rows], attributes[rows], groups[rows]).mean()` with factors chosen elsewhere, or the
    difference of two methods' figures on the same rows. Draws in which it is NaN are left out. A figure of *pairs* of
    pictures must tell drawn copies of an identity apart by itself. identities: (n,) whose row it is. Raises BadInput
    for fewer than two identities, and where the figure is never defined."""
    found = inputs.array(identities)
    values, of_row = np.unique(found, return_inverse=True)
    if found.ndim != 1 or len(values) < 2:
        raise BadInput(f"identities have shape {found.shape} and {len(values)} values; there must be at least two")
    if draws < 1 or not 0 < level < 1:
        raise BadInput(f"draws is at least 1 and level between 0 and 1, got {draws} and {level}")
    rows_of = [np.flatnonzero(of_row == identity) for identity in range(len(values))]
    drawn = torch.randint(len(values), (draws, len(values)), generator=stream(seed)).numpy()
    resampled = np.array([figure(np.concatenate([rows_of[i] for i in some])) for some in drawn], dtype=np.float64)
    resampled = resampled[~np.isnan(resampled)]
    if not len(resampled):
        raise BadInput("the figure is NaN in every draw")
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(figure(np.arange(len(found)))), float(low), float(high), len(resampled))
