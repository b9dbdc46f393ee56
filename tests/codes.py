"""Rows, dictionaries and label losses that the tests of non-negative codes share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from piecework.solvers.nmf import unit_columns


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(n: int, d: int, r: int, *, seed: int = 0, likeness: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows (n, d) that a dictionary (d, r) of unit columns meets only nearly; likeness: how equal the columns are."""
    dictionary = (1 - likeness) * uniform(d, r, seed=seed) + likeness * uniform(d, 1, seed=seed + 1)
    dictionary = unit_columns(dictionary)[0]
    codes = (uniform(n, r, seed=seed + 2) - 0.4).clamp_min(0)
    return codes @ dictionary.T + 0.2 * uniform(n, d, seed=seed + 3), dictionary


def label_loss(
    n: int, r: int, *, seed: int = 5
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]:
    """J(S) = softmax cross-entropy of three classes on a linear head, summed over rows: its value a row, its gradient
    (n, r), and the bound ||W||_2^2 / 2 of its second derivatives."""
    w = 2 * uniform(3, r, seed=seed) - 1
    y = torch.arange(n) % 3

    def value(s: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(s @ w.T, y, reduction="none")

    def slope(s: Tensor) -> Tensor:
        return (torch.softmax(s @ w.T, 1) - torch.nn.functional.one_hot(y, 3)) @ w

    return value, slope, float(torch.linalg.matrix_norm(w, 2)) ** 2 / 2
