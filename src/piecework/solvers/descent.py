"""Gradient descent on a sketched system, as van den Brand, Peng, Song, Weinstein (arXiv 2006.11648) have it: to
reproduce, not to use. `damped.sketch_pcg` needs some thirty times fewer iterations with the same sketch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..training import BadInput, stream
from .damped import Product, check_system, not_finite
from .precondition import SketchedQR
from .solved import Solved

DIVERGED = 1e6
"""Growth of the residual at which descent is given up."""


def gradient_descent(
    product: Product,
    rhs: Tensor,
    features: Tensor,
    damping: float = 0.0,
    *,
    step: float | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
    seed: int = 0,
) -> Solved:
    """Algorithm 2 (`fast_solve`) of van den Brand et al.: z <- z - step M^T (M z - R^T r), g = R z, from z = 0.

    R: the inverse of the triangle of the sketch, features (N, s) with s >= N; M = R^T (K + damping I) R. Descent on a
    squared system, two products with K an iteration, for rhs (N,). It converges for step < 2 / |M|^2.

    step: 1 as published, which with |M| ~ (1 - (N/s)^(1/2))^-2 converges only from s of about 40 N on; without,
    1 / |M|^2 with |M| by power iteration. Where it diverges, the answer is 0 and the reason says by how much to
    raise s."""
    check_system(rhs, damping)
    if rhs.dim() != 1 or features.dim() != 2 or len(features) != len(rhs) or features.shape[1] < len(rhs):
        raise BadInput(
            f"descent takes one right-hand side (N,) and a sketch (N, s) with s >= N; got {tuple(rhs.shape)} and "
            f"{tuple(features.shape)}"
        )
    if not all(bool(torch.isfinite(x).all()) for x in (rhs, features)) or not math.isfinite(damping):
        return not_finite(rhs)
    if not bool(rhs.any()):
        return Solved(torch.zeros_like(rhs), "", 0, 0.0)
    r = SketchedQR(features).triangle(damping).to(rhs.dtype)
    if step is None:
        step = 1 / sketched_norm(product, r, damping, seed=seed) ** 2
    found = _descended(product, rhs, r, damping, step, tolerance, max_iterations)
    if found.residual <= DIVERGED:
        return found
    if not math.isfinite(found.residual):
        return not_finite(rhs)
    reason = (
        f"gradient descent diverges with step {step:.2g} and {features.shape[1] / len(rhs):.1f} sketch columns a row; "
        "a step of 1 takes 40 a row, or leave the step out, or take sketch_pcg"
    )
    return Solved(torch.zeros_like(rhs), reason, found.iterations, float("inf"))


def _descended(
    product: Product, rhs: Tensor, r: Tensor, damping: float, step: float, tolerance: float, most: int
) -> Solved:
    norm = float(torch.linalg.vector_norm(rhs, dtype=torch.float64))
    z, g, rest, residual, iteration = torch.zeros_like(rhs), torch.zeros_like(rhs), -rhs, 1.0, 0
    while tolerance < residual <= DIVERGED and iteration < most:
        z = z - step * _sketched(product, r, damping, _left(r, rest))
        g = _right(r, z)
        rest = product(g) + damping * g - rhs
        residual = float(torch.linalg.vector_norm(rest, dtype=torch.float64)) / norm
        iteration += 1
    if residual <= tolerance:
        return Solved(g, "", iteration, residual)
    reason = f"gradient descent stopped at {iteration} iterations; raise max_iterations, or take sketch_pcg"
    return Solved(g, reason, iteration, residual)


def sketched_norm(
    product: Product, triangle: Tensor, damping: float = 0.0, *, iterations: int = 50, seed: int = 0
) -> float:
    """|M|_2 of M = R^T (K + damping I) R, R = triangle^-1, by power iteration: a lower bound, close from 50 on."""
    v = torch.randn(len(triangle), generator=stream(seed), dtype=torch.float64).to(triangle)
    norm = 0.0
    for _ in range(iterations):
        v = _sketched(product, triangle, damping, v / torch.linalg.vector_norm(v))
        norm = float(torch.linalg.vector_norm(v))
        if not norm or not math.isfinite(norm):
            return 1.0
    return norm


def _right(triangle: Tensor, v: Tensor) -> Tensor:
    x: Tensor = torch.linalg.solve_triangular(triangle, v[:, None], upper=True)
    return x[:, 0]


def _left(triangle: Tensor, v: Tensor) -> Tensor:
    x: Tensor = torch.linalg.solve_triangular(triangle.t(), v[:, None], upper=False)
    return x[:, 0]


def _sketched(product: Product, triangle: Tensor, damping: float, v: Tensor) -> Tensor:
    """M v; M is symmetric, so this is M^T v too."""
    x = _right(triangle, v)
    return _left(triangle, product(x) + damping * x)
