"""(K + damping I) g = r, K = J J^T (N, N): the system of a Gauss-Newton step in sample space, solved in four ways.

Given g, the step of the parameters is J^T g, the same as (J^T J + damping I)^-1 J^T r.

  exact         K itself, in float64: Cholesky, and a ladder for where that fails.
  sketch_pcg    conjugate gradients, preconditioned by a sketch of J (van den Brand, Peng, Song, Weinstein, ITCS 2021,
                arXiv 2006.11648: the solver of their abstract).
  rpchol_pcg    the same, preconditioned by a randomly pivoted partial Cholesky factor: for low effective dimension.
  nystrom_pcg   the same, from products alone.

`descent.gradient_descent` is the solver of that paper's algorithm 2, for reproduction; `linear.cg` without a
preconditioner is the control that all of them have to beat.

`product` is v -> K v without the damping, in the dtype of the right-hand side: that dtype decides how small a residual
can be, while preconditioners may be of any. Right-hand sides are (N,) or (N, k); the columns share one Krylov space
and one tolerance, relative to the norm of all. Every residual is of the system asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..training import BadInput, stream
from .linear import cg
from .precondition import Preconditioner, nystrom, rpcholesky, sketched
from .solved import Solved

Product = Callable[[Tensor], Tensor]

JITTERS = (0.0, 1e-15, 1e-13, 1e-11)
"""Of the mean diagonal: what is added for a factorisation that fails without; refinement takes it out again."""
REFINEMENTS = 4
"""Each is one product with the matrix; they end early where one does not halve the residual."""
PROGRESS = 0.5
"""A refinement or a restart that leaves more of the residual than this is the last."""
ROWS = 512
"""Whose squares are made at once."""
HOPELESS = 0.1
"""Of the right-hand side: with a residual above this an answer is worth little, and eigenvalues are worth 9 N^3."""


def exact(
    gram: Tensor, rhs: Tensor, damping: float, *, tolerance: float = 1e-6, rounding: float | None = None
) -> Solved:
    """g = (K + damping I)^-1 r in float64: `DampedGram` for one right-hand side and one damping."""
    return DampedGram(gram, tolerance=tolerance, rounding=rounding).solve(rhs, damping)


class DampedGram:
    """K + damping I in float64 for several dampings and right-hand sides; the last factorisation is kept.

    gram: K (N, N), symmetrised here unless it is `symmetric` to the last bit; then it is not copied, and its diagonal
    is raised for the time of a factorisation. Cholesky with iterative refinement; where the matrix is not numerically
    definite, with 1e-15, 1e-13, 1e-11 of the mean diagonal added, which refinement takes out again; where none of them
    is enough, or the residual exceeds 0.1, an eigen-decomposition whose small eigenvalues are cut softly. N^3 / 3 for
    each damping, against 9 N^3 for eigenvalues that would serve all.

    tolerance: a relative residual above this comes with a reason. float64 itself leaves about 1e-16 |K| |g| / |r|: on
    kernels of smooth networks with a right-hand side that is not smooth, 1e-6 is lost at a damping of about 1e-9 of the
    mean diagonal.

    rounding: the relative error of the entries of K, that of its dtype unless given, and 0 for float64. An error of
    independent entries moves the residual by rounding (sum_ij K_ij^2 g_j^2)^(1/2): the residual that is returned is no
    less than that, and where it exceeds the tolerance the answer is not ok, however well it solves the rounded system.

    dtype: that of the work. float32 is twice as fast, and gets one attempt: the residual says whether it was good
    enough, and float64 is what to try next.

    Raises BadInput for a matrix that is not square and real."""

    def __init__(
        self,
        gram: Tensor,
        *,
        tolerance: float = 1e-6,
        rounding: float | None = None,
        dtype: torch.dtype = torch.float64,
        symmetric: bool = False,
    ) -> None:
        if gram.dim() != 2 or len(gram) != gram.shape[1] or not gram.is_floating_point():
            raise BadInput(f"a Gram matrix is a square of real numbers; got {gram.dtype} of shape {tuple(gram.shape)}")
        self._noise = rounding if rounding is not None else _roundoff(gram.dtype)
        self._kernel = gram.to(dtype)
        if not symmetric:
            self._kernel = (self._kernel + self._kernel.t()).mul_(0.5)
        self._finite = math.isfinite(float(self._kernel.sum()))
        self._tolerance = tolerance
        self._kept: tuple[float, Tensor | None, int] | None = None

    def solve(self, rhs: Tensor, damping: float) -> Solved:
        """g in the dtype of the work, for r (N,) or (N, k). iterations counts the factorisations.

        Raises BadInput for shapes that do not fit and for a negative damping."""
        check_system(rhs, damping)
        if len(rhs) != len(self._kernel):
            raise BadInput(
                f"a right-hand side of {len(rhs)} numbers needs a Gram matrix of as many rows and columns, got "
                f"{tuple(self._kernel.shape)}"
            )
        b = rhs.to(self._kernel.dtype)
        norm = float(torch.linalg.vector_norm(b, dtype=torch.float64))
        if not (math.isfinite(norm + damping) and self._finite):
            return not_finite(b)
        if norm == 0:
            return Solved(torch.zeros_like(b), "", 0, 0.0)
        factor, attempts = self._factor(damping)
        x, residual = torch.zeros_like(b), math.inf
        if factor is not None:
            x, residual = self._refined(b, factor, damping, norm)
        if not residual <= HOPELESS and b.dtype == torch.float64:
            with self._raised(self._kernel.diagonal() + damping) as system:
                other = _by_eigenvalues(system, b, self._noise)
            found = float(torch.linalg.vector_norm(self._product(other, damping) - b)) / norm
            attempts += 1
            if not residual <= found:
                x, residual = other, found
        shaken = self._shaken(x) / norm
        residual = max(residual, shaken)
        return Solved(x, _doubt(residual, shaken, self._noise, self._tolerance), attempts, residual)

    def inverse(self, damping: float) -> Callable[[Tensor], Tensor] | None:
        """r -> (K + damping I)^-1 r in float64 as the factor has it, to precondition with; None where there is no
        Cholesky factor. Triangular solves in float64 make of any triangle one and the same symmetric matrix."""
        factor, _ = self._factor(damping)
        if factor is None:
            return None
        lower = factor.double()

        def apply(r: Tensor) -> Tensor:
            x: Tensor = torch.cholesky_solve(r.double().reshape(len(r), -1), lower)
            return x.reshape(r.shape).to(r.dtype)

        return apply

    def effective_dimension(self, damping: float, *, probes: int = 4, seed: int = 0) -> float | None:
        """tr K (K + damping I)^-1 = N - damping tr (K + damping I)^-1, the trace by random signs (Hutchinson 1989);
        None where the matrix has no Cholesky factor."""
        factor, _ = self._factor(damping)
        if factor is None or damping <= 0:
            return None
        n = len(factor)
        signs = torch.randint(0, 2, (n, probes), generator=stream(seed), dtype=torch.int64).mul(2).sub(1)
        signs = signs.to(factor)
        trace = float((signs * torch.cholesky_solve(signs, factor)).sum()) / probes
        return min(float(n), max(0.0, n - damping * trace))

    def _product(self, x: Tensor, damping: float) -> Tensor:
        return self._kernel @ x + damping * x

    def _factor(self, damping: float) -> tuple[Tensor | None, int]:
        """The Cholesky factor, or None, and the number of attempts."""
        if self._kept is not None and self._kept[0] == damping:
            return self._kept[1], self._kept[2]
        diagonal = self._kernel.diagonal().clone()
        mean = float(diagonal.mean()) + damping
        kept: Tensor | None = None
        attempts = 0
        for jitter in JITTERS if self._kernel.dtype == torch.float64 else JITTERS[:1]:
            attempts += 1
            with self._raised(diagonal + damping + jitter * mean) as system:
                factor, info = torch.linalg.cholesky_ex(system)
            if not int(info):
                kept = factor
                break
        self._kept = (damping, kept, attempts)
        return kept, attempts

    @contextmanager
    def _raised(self, diagonal: Tensor) -> Iterator[Tensor]:
        """K with another diagonal for a while: a copy would be N^2 numbers more."""
        before = self._kernel.diagonal().clone()
        self._kernel.diagonal().copy_(diagonal)
        try:
            yield self._kernel
        finally:
            self._kernel.diagonal().copy_(before)

    def _refined(self, b: Tensor, factor: Tensor, damping: float, norm: float) -> tuple[Tensor, float]:
        right = b.reshape(len(b), -1)
        x, r, residual = torch.zeros_like(right), right, 1.0
        for attempt in range(REFINEMENTS + 1):
            trial = x + torch.cholesky_solve(r, factor)
            rest = right - self._product(trial, damping)
            found = float(torch.linalg.vector_norm(rest)) / norm
            if attempt and not found <= PROGRESS * residual:
                break
            x, r, residual = trial, rest, found
        return x.reshape(b.shape), residual if math.isfinite(residual) else math.inf

    def _shaken(self, x: Tensor) -> float:
        """Of K, not of K + damping I: the damping has no rounding. Some rows at a time: all squares are N^2 numbers."""
        if not self._noise:
            return 0.0
        squares, total = x.square(), 0.0
        for start in range(0, len(x), ROWS):
            total += float((self._kernel[start : start + ROWS].square() @ squares).sum())
        return self._noise * math.sqrt(total)


def _doubt(residual: float, shaken: float, noise: float, tolerance: float) -> str:
    if residual <= tolerance:
        return ""
    if shaken > tolerance:
        return (
            f"rounding of {noise:.1e} in the Gram matrix moves the relative residual by about {shaken:.1e}; form the "
            "Gram matrix in float64, raise the damping, or take sketch_pcg with products in float64"
        )
    return (
        f"the Gram matrix with the damping is too near to singular for float64, and the best answer leaves a relative "
        f"residual of {residual:.1e}; raise the damping, or solve for the parameters by QR"
    )


def _roundoff(dtype: torch.dtype) -> float:
    return 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps


def _by_eigenvalues(system: Tensor, b: Tensor, noise: float) -> Tensor:
    """V f(w) V^T b, f(w) = 1/w where an eigenvalue w is clearly more than rounding, and 0 where it is no more.

    Between the cut and four times the cut f rises smoothly, so that a small change of K does not switch a direction on.
    (NetKet's filter 1 / (w + cut^6 / w^5) does so too, but lets eigenvalues just below its cut through, and what comes
    in there is rounding over rounding.)"""
    values, vectors = torch.linalg.eigh(system)
    spread = max(4 * len(values) * torch.finfo(values.dtype).eps, math.sqrt(len(values)) * noise)
    cut = spread * float(values.abs().max())
    if cut == 0:
        return torch.zeros_like(b)
    rise = ((values / cut - 1) / 3).clamp(0, 1)
    weight = rise.square() * (3 - 2 * rise) / values.clamp_min(cut)
    x: Tensor = vectors @ (weight[:, None] * (vectors.t() @ b.reshape(len(b), -1)))
    return x.reshape(b.shape)


def pcg(
    product: Product,
    rhs: Tensor,
    damping: float,
    preconditioner: Preconditioner | None = None,
    *,
    tolerance: float = 1e-8,
    max_iterations: int | None = None,
) -> Solved:
    """Preconditioned conjugate gradients on K + damping I, without a preconditioner where there is none.

    One factorisation serves every damping that is tried: make it once and pass it here. Starts from 0, since the first
    iterate is then the sketch-and-solve guess P^-1 r with its best length; starting from that guess saves an iteration
    and costs a product. Where rounding keeps the true residual from what the recursion says, it starts again
    from the answer, as long as that halves the residual (iterative refinement)."""
    check_system(rhs, damping)
    if not (math.isfinite(damping) and bool(torch.isfinite(rhs).all())):
        return not_finite(rhs)
    most = 10 * rhs.numel() if max_iterations is None else max_iterations
    precondition = preconditioner.at(damping) if preconditioner is not None and bool(rhs.any()) else None

    def system(v: Tensor) -> Tensor:
        return product(v) + damping * v

    found = cg(system, rhs, precondition=precondition, tolerance=tolerance, max_iterations=most)
    before, spent = 1.0, found.iterations
    while not found.ok and found.residual <= PROGRESS * before and spent < most:
        before = found.residual
        again = cg(
            system, rhs, start=found.x, precondition=precondition, tolerance=tolerance, max_iterations=most - spent
        )
        spent += again.iterations
        if again.residual < before:
            found = again
        else:
            break
    return Solved(found.x, found.reason, spent, found.residual)


def sketch_pcg(
    product: Product,
    rhs: Tensor,
    damping: float,
    *,
    features: Tensor | None = None,
    preconditioner: Preconditioner | None = None,
    tolerance: float = 1e-8,
    max_iterations: int | None = None,
) -> Solved:
    """PCG with the preconditioner of a sketch: its columns Y (N, s), Y Y^T ~ K, or what was made of them.

    features: from `solvers.sketch`, s >= 2 N, or at least twice the effective dimension; may be float32 while rhs is
    float64. Sketches with s between N/2 and N are worse than none where the effective dimension is near N."""
    if (features is None) == (preconditioner is None):
        raise BadInput("sketch_pcg takes either features or a preconditioner made from them; pass one of the two")
    if features is not None:
        if len(features) != len(rhs):
            raise BadInput(f"a sketch has a row for each of the {len(rhs)} right-hand sides, got {len(features)}")
        preconditioner = sketched(features)
    return pcg(product, rhs, damping, preconditioner, tolerance=tolerance, max_iterations=max_iterations)


def rpchol_pcg(
    product: Product,
    columns: Product,
    diagonal: Tensor,
    rhs: Tensor,
    damping: float,
    *,
    rank: int | None = None,
    block: int = 64,
    seed: int = 0,
    tolerance: float = 1e-8,
    max_iterations: int | None = None,
) -> Solved:
    """PCG with a randomly pivoted partial Cholesky factor of K (`precondition.rpcholesky`).

    columns: index (b,) -> K[:, index]; diagonal: (N,); rank: about twice the effective dimension without. Little use
    where the effective dimension is near N, as for kernels of ReLU networks."""
    check_system(rhs, damping)
    if diagonal.shape != (len(rhs),):
        raise BadInput(f"K has a diagonal of {len(rhs)} entries, got {tuple(diagonal.shape)}")
    made = rpcholesky(columns, diagonal, rank=rank, block=block, damping=damping, seed=seed)
    return pcg(product, rhs, damping, made, tolerance=tolerance, max_iterations=max_iterations)


def nystrom_pcg(
    product: Product,
    rhs: Tensor,
    damping: float,
    *,
    rank: int,
    seed: int = 0,
    tolerance: float = 1e-8,
    max_iterations: int | None = None,
) -> Solved:
    """PCG with a Gaussian Nystrom approximation of K from `rank` products with it (`precondition.nystrom`).

    product must take (N, rank)."""
    check_system(rhs, damping)
    made = nystrom(product, len(rhs), rank=rank, seed=seed, like=rhs)
    return pcg(product, rhs, damping, made, tolerance=tolerance, max_iterations=max_iterations)


def check_system(rhs: Tensor, damping: float) -> None:
    if rhs.dim() not in (1, 2) or rhs.dtype not in (torch.float32, torch.float64) or not len(rhs):
        raise BadInput(
            f"a right-hand side is (N,) or (N, k) in float32 or float64; got {rhs.dtype} of shape {tuple(rhs.shape)}"
        )
    if damping < 0:
        raise BadInput(f"the damping must be 0 or more, got {damping}")


def not_finite(like: Tensor) -> Solved:
    return Solved(
        torch.zeros_like(like),
        "K, the right-hand side or the damping holds values that are not finite; take a smaller step, or raise the "
        "damping",
        0,
        float("inf"),
    )
