"""Linear systems: ridge regression from its Gram matrix, tiny systems of step lengths, conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .solved import Solved

FIRST_RAISE = 1e-12
"""Of the mean diagonal: the first ridge that is added to a Gram matrix without full rank."""
RAISE = 100.0
"""How much that ridge is raised each time it does not suffice."""
MOST_RAISES = 7
"""The last is 1 of the mean diagonal."""
RANK_TOLERANCE = 10.0
"""In roundings a dimension: a column of which less than this is not explained by the others adds no rank."""


def ridge_solve(gram: Tensor, cross: Tensor, ridge: Tensor | float) -> Solved:
    """X = cross (gram + diag(ridge))^-1 by Cholesky in float64, for least squares in its normal equations.

    gram: (d, d) symmetric positive semi-definite (its lower triangle is read); cross: (k, d); ridge: a number or (d,),
    in units of the Gram matrix. Where the sum has no full rank in float64 (the factorisation fails, or a pivot is
    rounding), a ridge is added in steps of 100, beginning at 1e-12 of the mean diagonal; the reason then reports the
    numerical rank and the ridge that was added. There is no pseudo-inverse: it would hide the loss of rank. x is 0
    where nothing helps."""
    gram, cross = gram.double(), cross.double()
    penalty = torch.as_tensor(ridge, dtype=gram.dtype, device=gram.device).expand(len(gram))
    system = gram + torch.diag(penalty)
    if not bool(torch.isfinite(system).all() & torch.isfinite(cross).all()):
        return _unsolved(cross, "the Gram matrix or the right-hand side holds values that are not finite", 0)
    mean = gram.diagonal().mean()
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    for attempt in range(MOST_RAISES + 1):
        extra = FIRST_RAISE * RAISE ** (attempt - 1) if attempt else 0.0
        factor = _full_rank_factor(system + torch.diag(torch.full_like(penalty, extra) * unit) if attempt else system)
        if factor is not None:
            x = torch.cholesky_solve(cross.t(), factor).t()
            reason = _rank_report(system, extra) if attempt else ""
            return Solved(x, reason, attempt + 1, _relative(x @ system - cross, cross))
    least = float(torch.linalg.eigvalsh(system)[0])
    return _unsolved(
        cross, f"the Gram matrix is not positive semi-definite: its least eigenvalue is {least:.1e}", MOST_RAISES + 1
    )


def _full_rank_factor(system: Tensor) -> Tensor | None:
    """The Cholesky factor, or None. A pivot, as a part of its diagonal entry, is what the columns before it do not
    explain of a column; unlike eigenvalues it does not depend on how features are scaled."""
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) != 0:
        return None
    unexplained = factor.diagonal().square() / system.diagonal()
    least = RANK_TOLERANCE * len(system) * torch.finfo(system.dtype).eps
    return factor if bool((unexplained > least).all()) else None


def _unsolved(like: Tensor, what: str, attempts: int) -> Solved:
    return Solved(torch.zeros_like(like), f"{what}; scale the features, or use float64", attempts, float("inf"))


def _rank_report(system: Tensor, extra: float) -> str:
    scale = system.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale.masked_fill(scale == 0, 1), 0.0)
    values = torch.linalg.eigvalsh(system * inverse[:, None] * inverse)
    rank = int((values > RANK_TOLERANCE * len(system) * torch.finfo(system.dtype).eps).sum())
    return (
        f"the Gram matrix has numerical rank {rank} of {len(system)}: a ridge of {extra:g} of its mean diagonal was "
        "added; a larger ridge setting, or fewer equal or constant features, avoids this"
    )


def solve_step(curvature: Tensor, slope: Tensor, *, cut: float = 1e-10) -> Solved:
    """s = curvature^+ slope for a handful of step lengths, (m, m) and (m,), m <= 20, in float64.

    The system is scaled to a unit diagonal; combinations of moves whose eigenvalue falls below `cut` of the largest
    are left out, so that moves that depend on each other do not blow up. The residual then tells how much of the
    slope lies in what was left out."""
    curvature, slope = curvature.double(), slope.double()
    if not len(slope):
        return Solved(slope, "", 1, 0.0)
    if not bool(torch.isfinite(curvature).all() & torch.isfinite(slope).all()):
        return _unsolved(slope, "the curvature or the slope of the step lengths is not finite", 0)
    scale = curvature.diagonal().clamp_min(0).sqrt()
    live = scale > 0
    inverse = torch.where(live, 1 / scale.masked_fill(~live, 1), torch.zeros_like(scale))
    scaled = curvature * inverse[:, None] * inverse
    values, vectors = torch.linalg.eigh((scaled + scaled.t()) / 2)
    kept = values > cut * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    weight = torch.where(kept, 1 / values.masked_fill(~kept, 1), torch.zeros_like(values))
    s = inverse * (vectors @ (weight * (vectors.t() @ (inverse * slope))))
    if not bool(torch.isfinite(s).all()):
        return _unsolved(slope, "the step lengths are not finite", 1)
    return Solved(s, "", 1, _relative(curvature @ s - slope, slope))


def cg(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    start: Tensor | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-8,
    max_iterations: int | None = None,
) -> Solved:
    """Conjugate gradients for a symmetric positive definite system (Hestenes and Stiefel 1952).

    product: v -> A v; b: (n,), or (n, k) with one common step (the Krylov space of all columns stacked); start: a
    warm start, 0 without; precondition: r -> an approximation of A^-1 r, symmetric positive definite;
    max_iterations: 10 times the unknowns without. Stops when the recursion says |b - Ax| <= tolerance |b|; the residual
    that is returned is computed afresh, by one more product, and a solution that rounding keeps from the tolerance is
    not ok. Vectors keep the dtype of b; inner products and norms are summed in float64."""
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else b - product(start)
    if not bool(torch.isfinite(r).all()):
        return _unsolved(b, "the right-hand side or the start of conjugate gradients is not finite", 0)
    norm = _norm(b)
    if norm == 0:
        return Solved(torch.zeros_like(b), "", 0, 0.0)
    most = 10 * b.numel() if max_iterations is None else max_iterations
    reason, iteration, p, rz = "", 0, torch.zeros_like(b), 1.0
    while not _norm(r) <= tolerance * norm:
        if iteration == most:
            reason = (
                f"conjugate gradients stopped at {most} iterations; raise max_iterations, add damping, or precondition"
            )
            break
        z = precondition(r) if precondition else r
        rz, before = _inner(r, z), rz
        p = z + (rz / before) * p
        q = product(p)
        bend = _inner(p, q)
        if not (math.isfinite(bend) and math.isfinite(rz)):
            return _unsolved(b, "a product or the preconditioner of conjugate gradients is not finite", iteration)
        if not (bend > 0 and rz > 0):
            reason = "the matrix or its preconditioner is not positive definite; add damping"
            break
        x, r = x + (rz / bend) * p, r - (rz / bend) * q
        iteration += 1
    residual = _norm(product(x).double() - b) / norm
    if not math.isfinite(residual):
        return _unsolved(b, "the answer of conjugate gradients is not finite", iteration)
    if not reason and not residual <= 10 * tolerance:
        reason = f"rounding keeps the relative residual at {residual:.1e}; use float64, add damping, or precondition"
    return Solved(x, reason, iteration, residual)


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())  # products of small float32 numbers would be 0


def _norm(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))


def _relative(difference: Tensor, b: Tensor) -> float:
    norm = torch.linalg.vector_norm(b)
    return float(torch.linalg.vector_norm(difference) / norm) if norm > 0 else 0.0
