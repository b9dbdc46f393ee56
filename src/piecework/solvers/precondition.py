"""Preconditioners for (K + damping I) g = r, K = J J^T: one factorisation of K, or of a sketch, for many dampings.

Low rank: randomly pivoted partial Cholesky (Chen, Epperly, Tropp, Webber, "Randomly pivoted Cholesky", arXiv
2207.06503, in blocks) and the Gaussian Nystrom approximation (Frangella, Tropp, Udell, "Randomized Nystrom
preconditioning", arXiv 2110.02820, algorithm 2.1). Full rank: the triangle of a sketch (van den Brand, Peng, Song,
Weinstein, arXiv 2006.11648; Rokhlin and Tygert 2008) or of a Gram matrix of sampled units.

A preconditioner cannot make an answer wrong, only slow, so none of these refuses what is not finite: it then has
rank 0, P = I, and the solve itself says what is wrong.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..training import BadInput, stream

Apply = Callable[[Tensor], Tensor]
"""v -> P^-1 v, (N,) or (N, k), in the dtype of v."""

MOST_RANK = 2048
"""Of a low-rank preconditioner whose rank was left to the damping: N x 2048 numbers of memory."""
RANK_PER_DIMENSION = 2.0
"""How many columns for each effective dimension, before more of them stop to pay."""
GROWTH = 1.25
"""How much larger a factor is when its eigenvalues are looked at again: each look costs as much as all its columns."""
LEAST_LEVEL = 1e-13
"""Of the largest eigenvalue: what lies below is not told from rounding, with or without damping."""
SMALL = 512
"""Up to so many rows an inverse costs next to nothing."""
PROBES = 8
"""Vectors of random signs for a trace."""
LEAST_PIVOT = 1e-12
"""Of the largest in its block: eigenvalues of a block of pivots below this are rounding."""


class Preconditioner(Protocol):
    """P ~ K + damping I up to a positive factor, for any damping."""

    @property
    def rank(self) -> int:
        """Of the part of K that it knows; 0 for the identity."""
        ...

    def at(self, damping: float) -> Apply:
        """P^-1 for this damping."""
        ...

    def effective_dimension(self, damping: float) -> float:
        """An estimate of tr K (K + damping I)^-1."""
        ...


@dataclass(frozen=True)
class LowRank:
    """P^-1 v = (level + damping) U (S + damping)^-1 U^T v + (v - U U^T v), S = diag(values).

    basis: U, (N, q), orthonormal in float64; values: (q,), estimates of the largest eigenvalues of K, descending;
    floor: the level, what K is taken to be on the rest: the last of the values unless given (Frangella, Tropp, Udell,
    equation 1.3); tail: the trace of K beyond U where it is known, for the effective dimension."""

    basis: Tensor
    values: Tensor
    floor: float | None = None
    tail: float = 0.0

    @property
    def rank(self) -> int:
        return len(self.values)

    def at(self, damping: float) -> Apply:
        if not self.rank:
            return lambda v: v
        least = LEAST_LEVEL * float(self.values[0])  # K singular and no damping: still definite
        floor = float(self.values[-1]) if self.floor is None else self.floor
        level = max(floor + damping, least)
        shrink = (level / (self.values + damping).clamp_min(least))[:, None]
        basis = self.basis

        def apply(v: Tensor) -> Tensor:
            tall = v.double().reshape(len(v), -1)
            part = basis.t() @ tall
            rest = tall - basis @ part
            # Once more: what rounding left along the basis would outweigh `shrink` at a small damping.
            rest = rest - basis @ (basis.t() @ rest)
            return (basis @ (shrink * part) + rest).reshape(v.shape).to(v.dtype)

        return apply

    def effective_dimension(self, damping: float, share: float = 1.0) -> float:
        """An upper bound as far as the tail is known: it is largest where the tail is spread evenly.

        share: of all rows, where K is of a sample of them: the bound is then for all, whose K has values so much
        larger."""
        values, tail, rest = self.values / share, self.tail / share, len(self.basis) / share - self.rank
        known = float((values / (values + damping)).sum()) if damping > 0 else float(self.rank)
        if not rest or tail <= 0:
            return known
        return known + rest * tail / (tail + rest * damping)


def _identity(num_rows: int, device: torch.device) -> LowRank:
    return LowRank(
        torch.zeros(num_rows, 0, dtype=torch.float64, device=device),
        torch.zeros(0, dtype=torch.float64, device=device),
    )


def _from_factor(factor: Tensor, *, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Basis and values of factor factor^T - shift I, by QR and an SVD of the triangle: the Gram matrix of the factor
    would lose the small ones. Values that are no more than rounding, or than four times the shift, are left out."""
    q, r = torch.linalg.qr(factor)
    u, sigma, _ = torch.linalg.svd(r)
    values = sigma.square() - shift
    kept = values > max(4 * shift, torch.finfo(torch.float64).eps * float(values[0]))
    return q @ u[:, kept], values[kept]


def rpcholesky(
    columns: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    *,
    rank: int | None = None,
    block: int = 64,
    tolerance: float = 1e-14,
    damping: float | None = None,
    seed: int = 0,
) -> LowRank:
    """Randomly pivoted partial Cholesky K ~ L L^T in float64, from `rank` columns of K and its diagonal.

    columns: index (b,) -> K[:, index] (N, b); diagonal: (N,); block: pivots drawn at a time, 32 to 128; tolerance: of
    the trace of K: it stops where the trace that is left falls below, or below the rounding of the columns' dtype;
    damping: without a rank, it stops where there are twice as many columns as effective dimensions, or where what is
    left is less than the damping, and at half of N or 2048 columns at the latest. The cost is that of the columns and
    N q^2."""
    if diagonal.dim() != 1 or block < 1 or (rank is not None and rank < 1) or not tolerance >= 0:
        raise BadInput(
            f"pivoted Cholesky takes the diagonal of K, a vector, and at least one column at a time; got shape "
            f"{tuple(diagonal.shape)}, rank={rank}, block={block}, tolerance={tolerance}"
        )
    left = diagonal.double().clamp_min(0)
    whole, most = float(left.sum()), _most(rank, len(left), block)
    if not math.isfinite(whole) or not whole:
        return _identity(len(left), left.device)
    generator, whole_diagonal = stream(seed), left
    factor = torch.zeros(len(left), 0, dtype=torch.float64, device=left.device)
    rounding, look = torch.finfo(diagonal.dtype).eps, 1.0
    while (rest := float(left.sum())) > max(tolerance, rounding) * whole and factor.shape[1] < most:
        if rank is None and damping is not None:
            if rest <= damping:
                break
            if factor.shape[1] >= look:
                if _enough(factor, damping):
                    break
                look = GROWTH * factor.shape[1]
        index = _pivots(left, min(block, most - factor.shape[1]), generator)
        found = columns(index)
        rounding = max(rounding, torch.finfo(found.dtype).eps)
        if not bool(torch.isfinite(found).all()):
            break
        noise = rounding * float(whole_diagonal[index].max())
        new = _explained(found.double() - factor @ factor[index].t(), index, noise)
        factor = torch.cat([factor, new], 1)
        left = (left - new.square().sum(1)).clamp_min(0)
        left[index] = 0  # what their block left of them is rounding
    if not factor.shape[1]:
        return _identity(len(left), left.device)
    basis, values = _from_factor(factor)
    # What is left bounds the rest of K: with less of it than the last value, P is nearer to the truth.
    rest = float(left.sum())
    return LowRank(basis, values, min(float(values[-1]), rest), rest)


def _most(rank: int | None, num_rows: int, block: int) -> int:
    if rank is not None:
        return min(rank, num_rows)
    return min(num_rows, max(block, min(num_rows // 2, MOST_RANK)))


def _pivots(left: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Different rows, with chances proportional to what is left of their diagonal."""
    live = min(num, int((left > 0).sum()))
    return torch.multinomial(left.cpu(), live, replacement=False, generator=generator).to(left.device)


def _explained(residual: Tensor, index: Tensor, noise: float) -> Tensor:
    """(N, b') factor of what these pivots explain: residual (residual[index])^-1 residual^T = factor factor^T."""
    core = residual[index]
    values, vectors = torch.linalg.eigh((core + core.t()) / 2)
    least = max(LEAST_PIVOT * float(values[-1]), 2 * math.sqrt(len(index)) * noise)
    kept = values > least
    inverse_root: Tensor = vectors[:, kept] / values[kept].sqrt()
    return residual @ inverse_root


def _enough(factor: Tensor, damping: float) -> bool:
    """Whether there are enough columns for the effective dimension of what they explain."""
    if damping <= 0:
        return False
    values = torch.linalg.eigvalsh(factor.t() @ factor).clamp_min(0)
    return factor.shape[1] >= RANK_PER_DIMENSION * float((values / (values + damping)).sum())


def nystrom(
    product: Callable[[Tensor], Tensor], num_rows: int, *, rank: int, seed: int = 0, like: Tensor | None = None
) -> LowRank:
    """Gaussian Nystrom approximation from `rank` products with K (Frangella, Tropp, Udell, algorithm 2.1).

    product: V (N, rank) -> K V, in the dtype and on the device of `like` (float64 on the CPU without); the algebra is
    in float64. Differs from the paper: the core is factored by eigenvalues and not by Cholesky, since rounding may make
    it indefinite, above all in float32; so the stabilising shift, which is taken off the values again, can be one
    rounding of |K V| in that dtype, without the factor sqrt(N), and more of the small eigenvalues are kept."""
    if rank < 1 or num_rows < 1:
        raise BadInput(f"a Nystrom approximation needs at least one column of at least one row, got {rank}, {num_rows}")
    like = torch.zeros(0, dtype=torch.float64) if like is None else like
    draws = torch.randn(num_rows, min(rank, num_rows), generator=stream(seed), dtype=torch.float64).to(like.device)
    test = torch.linalg.qr(draws).Q
    test = test.to(like.dtype)
    image = product(test).double()
    test = test.double()
    norm = float(torch.linalg.matrix_norm(image))
    if not math.isfinite(norm) or not norm:
        return _identity(num_rows, like.device)
    shift = torch.finfo(like.dtype).eps * norm
    image = image + shift * test
    core = test.t() @ image
    values, vectors = torch.linalg.eigh((core + core.t()) / 2)
    kept = values > shift / 2
    basis, found = _from_factor(image @ (vectors[:, kept] / values[kept].sqrt()), shift=shift)
    return LowRank(basis, found)


class _Triangle(ABC):
    """P = R^T R with R upper triangular (N, N), from a factorisation for each damping; the last one is kept."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._kept: tuple[float, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self._num_rows

    @abstractmethod
    def _factor(self, damping: float) -> Tensor:
        """R for this damping, in the dtype in which it is cheapest."""

    def triangle(self, damping: float) -> Tensor:
        """R (N, N), upper, in float64, R^T R = K_hat + damping I."""
        if self._kept is None or self._kept[0] != damping:
            self._kept = (damping, self._factor(damping).double())
        return self._kept[1]

    def at(self, damping: float) -> Apply:
        r = self.triangle(damping)

        def apply(v: Tensor) -> Tensor:
            tall = v.double().reshape(len(v), -1)
            half: Tensor = torch.linalg.solve_triangular(r.t(), tall, upper=False)
            whole: Tensor = torch.linalg.solve_triangular(r, half, upper=True)
            return whole.reshape(v.shape).to(v.dtype)

        return apply

    def effective_dimension(self, damping: float) -> float:
        """N - damping |R^-1|_F^2, of K_hat; from 513 rows on the norm by some random signs (Hutchinson 1989), since all
        of R^-1 costs more than R."""
        r = self.triangle(damping)
        if len(r) <= SMALL:
            inverse = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
            return len(r) - damping * float(inverse.square().sum())
        signs = torch.randint(0, 2, (len(r), PROBES), generator=stream(len(r)), dtype=torch.int64)
        half = torch.linalg.solve_triangular(r.t(), signs.mul_(2).sub_(1).to(r), upper=False)
        return min(float(len(r)), max(0.0, len(r) - damping * float(half.square().sum()) / PROBES))


class SketchedQR(_Triangle):
    """R from QR of [Y^T; sqrt(damping) I], Y (N, s) a sketch of J with s >= N.

    Y^T is factored once, in its own dtype, and its triangle R_0 again with each damping, QR of [R_0; sqrt(damping) I].
    In units of N^3 flops at s = 2N: 3.3 once and 3.3 for each damping, against 5.3 for each damping without the first,
    so it wins from the second retry on; one SVD of R_0 for all would be about 20. The triangle never sees the Gram
    matrix, whose condition is the square; the triangular solves are in float64, so that a triangle that was computed
    in float32 is still one and the same symmetric matrix in every iteration."""

    def __init__(self, features: Tensor) -> None:
        super().__init__(len(features))
        self._first: Tensor = torch.linalg.qr(features.t(), mode="r").R

    def _factor(self, damping: float) -> Tensor:
        first = self._first
        pivots = first.diagonal().square().double()
        least = LEAST_LEVEL * float(pivots.max())
        if damping <= least < float(pivots.min()):
            return first
        eye = torch.eye(len(first), dtype=first.dtype, device=first.device)
        if not max(damping, least):
            return eye
        r: Tensor = torch.linalg.qr(torch.cat([first, math.sqrt(max(damping, least)) * eye]), mode="r").R
        return r


class SampledCholesky(_Triangle):
    """R from Cholesky of K_hat + damping I, K_hat (N, N) an approximation of K, such as that of sampled units.

    In the dtype of K_hat; where that fails, in float64; where that fails too, with an ever larger part of the mean
    diagonal added."""

    def __init__(self, gram_hat: Tensor) -> None:
        super().__init__(len(gram_hat))
        self._gram = gram_hat

    def _factor(self, damping: float) -> Tensor:
        gram = self._gram
        eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        mean = float(gram.diagonal().double().mean())
        damping = max(damping, LEAST_LEVEL * mean)
        extra = 0.0
        for dtype in (gram.dtype, *(torch.float64,) * 9):
            factor: Tensor
            factor, info = torch.linalg.cholesky_ex(gram.to(dtype) + (damping + extra * mean) * eye.to(dtype))
            if not int(info):
                return factor.t()
            if dtype == torch.float64:
                extra = max(100 * extra, 1e-15)
        return eye


def sketched(features: Tensor) -> Preconditioner:
    """The preconditioner of a sketch Y (N, s) of J, Y Y^T ~ K, in float32 or float64.

    s >= N: `SketchedQR`. s < N: `LowRank` by an SVD of Y in float64, N s^2. Its level on the rest is the last value and
    the damping, not the damping alone that the inverse of Y Y^T + damping I (Woodbury) has there: Y has no columns left
    for directions that K has. Where K has none either the last value is 0 and both are the same."""
    if features.dim() != 2 or not features.is_floating_point() or not features.numel():
        raise BadInput(f"a sketch is a matrix with a row for each row of J, got {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        return _identity(len(features), features.device)
    if features.shape[1] >= len(features):
        return SketchedQR(features)
    basis, values = _from_factor(features.double())
    return LowRank(basis, values)


def sampled(gram_hat: Tensor) -> Preconditioner:
    """The preconditioner of an approximate Gram matrix (N, N), symmetric positive semi-definite up to rounding."""
    if gram_hat.dim() != 2 or len(gram_hat) != gram_hat.shape[1] or not gram_hat.is_floating_point():
        raise BadInput(f"an approximate Gram matrix is square, got {gram_hat.dtype} of shape {tuple(gram_hat.shape)}")
    if not bool(torch.isfinite(gram_hat).all()):
        return _identity(len(gram_hat), gram_hat.device)
    return SampledCholesky(gram_hat)
