"""Linear systems: ridge regression from its Gram matrix, tiny systems of step lengths, conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .solved import Solved

RAISE = 100.0
"""How much the ridge is raised when a factorisation fails, each time."""
MOST_RAISES = 6
"""From 1e-12 of the mean diagonal to 1 of it."""


def ridge_solve(gram: Tensor, cross: Tensor, ridge: Tensor | float) -> Solved:
    """X = cross (gram + diag(ridge))^-1 by Cholesky in float64, for least squares in its normal equations.

    gram: (d, d) symmetric positive semi-definite; cross: (k, d); ridge: a number or (d,), in units of the Gram matrix.
    Where the factorisation fails the ridge is raised in steps of 100, beginning at 1e-12 of the mean diagonal; the
    reason then reports the numerical rank and the ridge that was used. There is no pseudo-inverse: it would hide the
    loss of rank."""
    gram, cross = gram.double(), cross.double()
    mean = gram.diagonal().mean()
    penalty = torch.as_tensor(ridge, dtype=gram.dtype, device=gram.device).expand(len(gram))
    extra = 0.0
    for attempt in range(MOST_RAISES + 2):
        system = gram + torch.diag(penalty + extra * mean)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) == 0 and bool(torch.isfinite(factor).all()):
            x = torch.cholesky_solve(cross.t(), factor).t()
            norm = torch.linalg.vector_norm(cross)
            residual = float(torch.linalg.vector_norm(x @ system - cross) / norm) if norm > 0 else 0.0
            return Solved(x, _rank_report(gram, extra) if extra else "", attempt + 1, residual)
        extra = max(1e-12, extra * RAISE)
    return Solved(
        torch.zeros_like(cross),
        "the Gram matrix could not be factorised at any ridge: it holds values that are not finite; "
        "scale the features, or use float64",
        MOST_RAISES + 2,
        float("inf"),
    )


def _rank_report(gram: Tensor, extra: float) -> str:
    values = torch.linalg.eigvalsh(gram)
    rank = int((values > values[-1] * len(gram) * torch.finfo(gram.dtype).eps).sum())
    return (
        f"the Gram matrix has numerical rank {rank} of {len(gram)}: a ridge of {extra:g} of its mean diagonal was "
        "added; a larger ridge setting, or fewer equal or constant features, avoids this"
    )


def solve_step(curvature: Tensor, slope: Tensor, *, cut: float = 1e-10) -> Solved:
    """s = curvature^+ slope for a handful of step lengths, (m, m) and (m,), m <= 20, in float64.

    The system is scaled to a unit diagonal; combinations of moves whose eigenvalue falls below `cut` of the largest
    are left out, so that moves that depend on each other do not blow up."""
    curvature, slope = curvature.double(), slope.double()
    scale = curvature.diagonal().clamp_min(0).sqrt()
    live = scale > 0
    inverse = torch.where(live, 1 / scale.masked_fill(~live, 1), torch.zeros_like(scale))
    scaled = curvature * inverse[:, None] * inverse
    values, vectors = torch.linalg.eigh((scaled + scaled.t()) / 2)
    kept = values > cut * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    weight = torch.where(kept, 1 / values.masked_fill(~kept, 1), torch.zeros_like(values))
    s = inverse * (vectors @ (weight * (vectors.t() @ (inverse * slope))))
    if not bool(torch.isfinite(s).all()):
        return Solved(torch.zeros_like(slope), "the step lengths are not finite; scale the features", 1, float("inf"))
    norm = torch.linalg.vector_norm(slope)
    residual = float(torch.linalg.vector_norm(curvature @ s - slope) / norm) if norm > 0 else 0.0
    return Solved(s, "", 1, residual)


def cg(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-8,
    max_iterations: int | None = None,
) -> Solved:
    """Conjugate gradients for a symmetric positive definite system, (n,) or (n, k) with one common step.

    product: v -> A v. Stops when |b - Ax| <= tolerance |b| (Hestenes and Stiefel 1952)."""
    x, r = torch.zeros_like(b), b.clone()
    norm = float(torch.linalg.vector_norm(b))
    if norm == 0:
        return Solved(x, "", 0, 0.0)
    most = max_iterations or 10 * b.numel()
    z = precondition(r) if precondition else r
    p, rz = z.clone(), float((r * z).sum())
    for iteration in range(1, most + 1):
        q = product(p)
        bend = float((p * q).sum())
        if not bend > 0:
            return Solved(x, "the matrix is not positive definite; add damping", iteration, _relative(r, norm))
        x = x + (rz / bend) * p
        r = r - (rz / bend) * q
        if _relative(r, norm) <= tolerance:
            return Solved(x, "", iteration, _relative(r, norm))
        z = precondition(r) if precondition else r
        rz, before = float((r * z).sum()), rz
        p = z + (rz / before) * p
    return Solved(
        x,
        f"conjugate gradients stopped at {most} iterations with relative residual {_relative(r, norm):.1e}; "
        "raise max_iterations, add damping, or precondition",
        most,
        _relative(r, norm),
    )


def _relative(r: Tensor, norm: float) -> float:
    return float(torch.linalg.vector_norm(r)) / norm
