"""Jacobians of two small networks, the kind of K = J J^T that Gauss-Newton meets: well conditioned, and not at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from piecework.training import stream


def relu_factors(num: int, width: int, *, features: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(num, features) inputs on the sphere and (num, width) active units / sqrt(width) of a hidden layer of ReLU units
    whose output weights are +-1 and fixed. The eigenvalues of K fall slowly: its effective dimension is near num."""
    generator = stream(seed)
    x = torch.randn(num, features, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    weight = torch.randn(width, features, generator=generator, dtype=torch.float64)
    return x, (x @ weight.t() > 0).double() / math.sqrt(width)


def outer_rows(a: Tensor, d: Tensor) -> Tensor:
    """(n, wd * wa) rows d_i outer a_i."""
    return (d[:, :, None] * a[:, None, :]).reshape(len(a), a.shape[1] * d.shape[1])


def tanh_jacobian(num: int, *, width: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points (num, 2) in a square, the Jacobian (num, P) of a tanh network 2-width-width-1 there, and smooth targets.
    The eigenvalues of K fall fast: the condition is beyond float64."""
    generator = stream(seed)
    x = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 2 - 1
    w1 = torch.randn(width, 2, generator=generator, dtype=torch.float64) / math.sqrt(2)
    w2 = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    w3 = torch.randn(width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    b1, b2 = 0.1 * torch.randn(2, width, generator=generator, dtype=torch.float64)
    h1 = torch.tanh(x @ w1.t() + b1)
    h2 = torch.tanh(h1 @ w2.t() + b2)
    d2 = w3 * (1 - h2.square())
    d1 = (d2 @ w2) * (1 - h1.square())
    one = torch.ones(num, 1, dtype=torch.float64)
    rows = [outer_rows(x, d1), d1, outer_rows(h1, d2), d2, h2, one]
    return x, torch.cat(rows, 1), torch.sin(3 * x[:, 0]) + x[:, 0] * x[:, 1]


def true_residual(rows: Tensor, rhs: Tensor, damping: float, x: Tensor) -> float:
    """|K x + damping x - rhs| / |rhs| in float64."""
    rows, rhs, x = rows.double(), rhs.double(), x.double()
    return float((rows @ (rows.t() @ x) + damping * x - rhs).norm() / rhs.norm())
