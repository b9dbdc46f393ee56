"""A function of which nothing is known: its proximal step by trial."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .price import Price


def black_box(
    function: Callable[[Tensor], Tensor], v: Tensor, price: Price, beta_in: float, candidates: int, spread: float
) -> Tensor:
    """The best of `candidates` inputs a row: v, and normal numbers around it.

    function: (n, ...) -> (n, ...), rows alone. The standard deviations of the draws, one a row and trial, are spread
    times a uniform number: near candidates matter where v is almost right. An output that is not a number is never
    chosen. Draws from torch's global generator, which the caller forks and seeds. Calls the function `candidates`
    times; memory O(n d)."""

    def cost(a: Tensor) -> Tensor:
        y = function(a)
        total = beta_in / 2 * _row_sums((a - v).square()) + _row_sums(price.of(y))
        return total.nan_to_num(nan=math.inf)

    best, least = v, cost(v)
    per_row = (v.shape[0],) + (1,) * (v.dim() - 1)
    for _ in range(candidates - 1):
        radius = spread * torch.rand(per_row, dtype=v.dtype, device=v.device)
        trial = v + radius * torch.randn_like(v)
        trial_cost = cost(trial)
        better = trial_cost < least
        best = torch.where(better.view(per_row), trial, best)
        least = torch.where(better, trial_cost, least)
    return best


def _row_sums(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)
