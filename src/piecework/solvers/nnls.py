"""Non-negative codes of many rows on one dictionary: NNLS, and NNLS with a smooth term on the codes.

    S = argmin over S >= 0 of (1/2) ||A - S M^T||^2 + (ridge/2) ||S||^2         A (n, d), M (d, r), S (n, r)

With G = M^T M + ridge I and C = A M this is (1/2) <S G, S> - <C, S>, row by row; after these two products nothing
depends on d. Three iterations, each of which the exact finish of `active_set` can take over from:

    fista     S+ = max(0, Y - (Y G - C)/L),  Y+ = S+ + momentum (S+ - S)        L >= ||G||_2
    hals      S_k <- max(0, S_k + (C_k - S G_k)/G_kk),  k = 1..r                one column of codes after another
    ao-admm   S~ = (C + rho (S + V)) (G + rho I)^-1,  S+ = max(0, S~ - V),  V+ = V + S+ - S~,  rho = trace(G)/r

Sources: Beck, Teboulle, SIAM J. Imaging Sci. 2(1), 2009 (FISTA); O'Donoghue, Candes, arXiv:1204.3982 (gradient
restart, here for each row by itself); Cichocki, Zdunek, Amari, ICA 2007 (HALS); Huang, Sidiropoulos, Liavas,
arXiv:1506.04209 (AO-ADMM; one Cholesky factor serves all rows).

Measured on one CPU core, 128 or 10,000 rows, r from 8 to 64, condition of G up to 2e4: with the exact finish the
residual ends at 1e-14 or below, AO-ADMM takes 0.5 to 1 times as long as FISTA, and HALS up to 5 times as long. Without
it, a residual of 1e-10 takes FISTA 1.7 to 3.3 times as long where the condition is below 300; beyond 6000 none of the
three arrives reliably within 2000 iterations.

The residual is the `departure` of the worst row: 0 exactly at the optimality (KKT) conditions, in parts of the row's
largest code. It costs one product with G, and only every `CHECK_EVERY` iterations, because asking stops a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from ..training import BadInput
from .active_set import departure, finish
from .solved import Solved

Iteration = Literal["fista", "hals", "ao-admm"]
Composite = Literal["fista", "proximal"]

CHECK_EVERY = 10
"""Iterations between two looks at the residual."""
ROUGH = 1e-2
"""The residual at which an iteration hands over to the exact finish,"""
ROUGH_ITERATIONS = 30
"""and the iterations after which it does so at the latest."""
ROUNDINGS = 8.0
"""Times sqrt(r): a tolerance below so many roundings counts as that."""
POWER_STEPS = 10


def nnls(
    a: Tensor,
    dictionary: Tensor,
    *,
    ridge: float = 0.0,
    method: Iteration = "fista",
    exact: bool = True,
    start: Tensor | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 2000,
) -> Solved:
    """S (n, r) = argmin over S >= 0 of (1/2) ||a - S M^T||^2 + (ridge/2) ||S||^2, all rows at once.

    a: (n, d), of any sign; dictionary: M (d, r), of any sign; ridge: at least 0, in squared units of M; start: (n, r),
    a warm start. exact: hand over to pivoting once the free sets are roughly known, which gives the minimum to a few
    roundings; where that fails (M without full rank and no ridge) the iteration goes on. tolerance: of the residual at
    the top of this file; max_iterations: of the method, pivots not counted. Raises BadInput where shapes do not fit."""
    _check(a, dictionary, ridge, method, start)
    gram, cross = gram_and_cross(a, dictionary, ridge)
    if not bool(torch.isfinite(gram).all() & torch.isfinite(cross).all()):
        reason = "the rows or the dictionary hold values that are not finite; leave those rows out"
        return Solved(torch.zeros_like(cross), reason, 0, float("inf"))
    start = torch.zeros_like(cross) if start is None else start.clamp_min(0)
    least = _reachable(tolerance, cross)
    points = iterates(gram, cross, start, method)
    if exact:
        codes, iterations, _ = _until(points, gram, cross, ROUGH, min(ROUGH_ITERATIONS, max_iterations), 0)
        codes = finish(gram, cross, codes)
        residual = _residual(gram, cross, codes)
        if residual <= least:
            return Solved(codes, "", iterations, residual)
        points = iterates(gram, cross, codes, method)
    else:
        codes, iterations = start, 0
    codes, iterations, residual = _until(points, gram, cross, least, max_iterations, iterations)
    return Solved(codes, _report(residual, least, max_iterations, "NNLS"), iterations, residual)


def rough_then_exact(gram: Tensor, cross: Tensor) -> Tensor:
    """The codes (n, r) of `nnls` without a report: a fixed number of FISTA iterations and the exact finish.

    Never synchronises a device. gram: (r, r), ridge included; cross: (n, r)."""
    start = torch.zeros_like(cross)
    codes = fista(lambda y: y @ gram - cross, spectral_bound(gram), start, iterations=CHECK_EVERY)
    return finish(gram, cross, codes)


def composite_nnls(
    loss_slope: Callable[[Tensor], Tensor],
    lipschitz: float | Tensor,
    a: Tensor,
    dictionary: Tensor,
    *,
    weight: float,
    ridge: float = 0.0,
    method: Composite = "fista",
    start: Tensor | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 5000,
) -> Solved:
    """S (n, r) = argmin over S >= 0 of J(S) + weight ( (1/2) ||a - S M^T||^2 + (ridge/2) ||S||^2 ), by FISTA.

    loss_slope: S -> the gradient (n, r) of J, a sum over rows of smooth functions of a row each; lipschitz: a bound of
    the second derivatives of J, in units of J over codes squared, for example ||W||_2^2 / 2 for softmax cross-entropy
    on a linear head W. J need not be convex where weight G outweighs it. start: (n, r); without one, the codes without
    J, which are the right ones up to O(1/weight). An error of S is multiplied by `weight` in what is worked out from
    it, so the tolerance (as for `nnls`) should lie far below 1/weight.

    method: "fista" takes a step of the whole gradient; "proximal" takes one of J alone and solves the rest exactly (an
    NNLS with weight G + lipschitz I), so that its number of steps falls as weight grows and does not depend on the
    largest eigenvalue of G. Measured at r = 16 and 32 with ||W||_2^2 / 2 of 20 to 40: level with "fista" near a weight
    of 100 (r = 16), 1.5 to 13 times faster at 1e4, slower below 100. Raises BadInput where shapes do not fit."""
    if method not in get_args(Composite):
        raise BadInput(f"the method must be one of {', '.join(get_args(Composite))}, got {method!r}")
    if not weight > 0:
        raise BadInput(f"the weight must be above 0, got {weight}; without a reconstruction use plain gradients")
    _check(a, dictionary, ridge, "fista", start)
    gram, cross = gram_and_cross(a, dictionary, ridge)
    start = nnls(a, dictionary, ridge=ridge).x if start is None else start.clamp_min(0)

    def slope(s: Tensor) -> Tensor:
        return loss_slope(s) + weight * (s @ gram - cross)

    def proximal(y: Tensor) -> Tensor:
        return finish(majorant, weight * cross + lipschitz * y - loss_slope(y), y.clamp_min(0))

    majorant = weight * gram + lipschitz * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    curvature = majorant.diagonal()
    plain = _gradient_step(slope, weight * spectral_bound(gram) + lipschitz)
    points = _accelerated(proximal if method == "proximal" else plain, start)
    codes, least, iterations, residual = start, _reachable(tolerance, cross), 0, float("inf")
    while not (residual := _worst(departure(codes, slope(codes), curvature))) <= least and iterations < max_iterations:
        for _ in range(min(1 if method == "proximal" else CHECK_EVERY, max_iterations - iterations)):
            codes, iterations = next(points), iterations + 1
    return Solved(codes, _report(residual, least, max_iterations, "the codes"), iterations, residual)


def fista(slope: Callable[[Tensor], Tensor], lipschitz: float | Tensor, start: Tensor, *, iterations: int) -> Tensor:
    """So many iterations of FISTA on S >= 0 from a start (n, r); never synchronises a device.

    slope: S -> the gradient (n, r) of a sum over rows; lipschitz: a bound of its second derivatives."""
    points, codes = _accelerated(_gradient_step(slope, lipschitz), start), start
    for _ in range(iterations):
        codes = next(points)
    return codes


def gram_and_cross(a: Tensor, dictionary: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """M^T M + ridge I (r, r) and a M (n, r)."""
    gram = dictionary.T @ dictionary
    gram.diagonal().add_(ridge)
    return gram, a @ dictionary


def spectral_bound(gram: Tensor) -> Tensor:
    """An upper bound of ||G||_2, exact but for a small excess where no entry is negative; a 0-d tensor.

    The Collatz-Wielandt quotient max (|G| v)_i / v_i bounds the spectral radius of |G| for any v > 0; some power steps
    bring v near the Perron vector."""
    size = gram.abs()
    v = torch.ones_like(size[0])
    for _ in range(POWER_STEPS):
        v = size @ v
        v = (v / v.amax().clamp_min(torch.finfo(v.dtype).tiny)).clamp_min(1e-3)
    return ((size @ v) / v).amax().clamp_min(torch.finfo(v.dtype).tiny)


def iterates(gram: Tensor, cross: Tensor, start: Tensor, method: Iteration) -> Iterator[Tensor]:
    """The codes after one, two, ... iterations of a method."""
    match method:
        case "fista":
            return _accelerated(_gradient_step(lambda y: y @ gram - cross, spectral_bound(gram)), start)
        case "hals":
            return _hals(gram, cross, start)
        case "ao-admm":
            return _ao_admm(gram, cross, start)


def _gradient_step(slope: Callable[[Tensor], Tensor], lipschitz: float | Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: (y - slope(y) / lipschitz).clamp_min(0)


def _accelerated(step: Callable[[Tensor], Tensor], start: Tensor) -> Iterator[Tensor]:
    """FISTA: steps from points beyond the last two, with momentum that starts anew where it leads a row uphill."""
    s, y, t = start, start, torch.ones_like(start[:, :1])
    while True:
        new = step(y)
        move = new - s
        t = torch.where(((y - new) * move).sum(1, keepdim=True) > 0, 1.0, t)
        later = (1 + (1 + 4 * t.square()).sqrt()) / 2
        y, s, t = new + ((t - 1) / later) * move, new, later
        yield s


def _hals(gram: Tensor, cross: Tensor, start: Tensor) -> Iterator[Tensor]:
    s = start
    while True:
        s = sweep(s, gram, cross)
        yield s


def sweep(x: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """One pass of exact coordinate minimisation over the columns of X >= 0 for (1/2) <X G, X> - <C, X>: a new tensor.

    x, cross: (n, r); gram: (r, r). A column without curvature (G_kk = 0) stays."""
    bent = gram.diagonal() > torch.finfo(gram.dtype).tiny
    scale = torch.where(bent, gram.diagonal(), 1.0)
    # X_k = max(0, own_k - X others_k) with others_kk = 0; where nothing bends, own_k = 0 and others_k = -e_k leave X_k.
    own = (cross * bent / scale).T
    others = torch.where(bent, (gram - torch.diag(gram.diagonal())) / scale, -torch.eye(len(gram)).to(gram))
    columns = x.T.clone(memory_format=torch.contiguous_format)
    for k in range(len(gram)):
        columns[k] = torch.addmv(own[k], columns.T, others[:, k], alpha=-1).clamp_min_(0)
    return columns.T


def _ao_admm(gram: Tensor, cross: Tensor, start: Tensor) -> Iterator[Tensor]:
    rho = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    s, v = start, ((start @ gram - cross).clamp_min(0) / rho).masked_fill(start > 0, 0)  # at the solution, its dual
    factor = torch.linalg.cholesky_ex(gram + rho * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))[0]
    while True:
        free = torch.cholesky_solve((cross + rho * (s + v)).T, factor).T
        s = (free - v).clamp_min(0)
        v = v + s - free
        yield s


def _until(
    points: Iterator[Tensor], gram: Tensor, cross: Tensor, tolerance: float, most: int, done: int
) -> tuple[Tensor, int, float]:
    """The point at which a look at the residual says tolerance, or the last of at most `most - done` (at least 1)."""
    for number, codes in enumerate(points, done + 1):
        if number >= most or (number - done) % CHECK_EVERY == 0:
            residual = _residual(gram, cross, codes)
            if residual <= tolerance or number >= most:
                break
    return codes, number, residual


def _residual(gram: Tensor, cross: Tensor, codes: Tensor) -> float:
    return _worst(departure(codes, codes @ gram - cross, gram.diagonal()))


def _worst(departures: Tensor) -> float:
    return float(departures.amax()) if len(departures) else 0.0


def _reachable(tolerance: float, like: Tensor) -> float:
    return max(tolerance, ROUNDINGS * float(like.shape[1] ** 0.5) * torch.finfo(like.dtype).eps)


def _report(residual: float, tolerance: float, most: int, what: str) -> str:
    if residual <= tolerance:
        return ""
    return (
        f"{what} stopped at {most} iterations with residual {residual:.1e}, above {tolerance:.1e}; "
        "raise max_iterations, add a ridge, or give the dictionary columns of unit length"
    )


def _check(a: Tensor, dictionary: Tensor, ridge: float, method: str, start: Tensor | None) -> None:
    if a.dim() != 2 or dictionary.dim() != 2 or a.shape[1] != dictionary.shape[0] or dictionary.shape[1] < 1:
        raise BadInput(
            f"rows of shape {tuple(a.shape)} do not fit a dictionary of shape {tuple(dictionary.shape)}: give (n, d) "
            "and (d, r) with r at least 1"
        )
    if start is not None and start.shape != (a.shape[0], dictionary.shape[1]):
        expected = (a.shape[0], dictionary.shape[1])
        raise BadInput(f"a start of shape {tuple(start.shape)} does not fit codes of shape {expected}; give that shape")
    if not 0 <= ridge < float("inf"):
        raise BadInput(f"the ridge must be a number of at least 0, got {ridge}; 0 leaves it out")
    if method not in get_args(Iteration):
        raise BadInput(f"the method must be one of {', '.join(get_args(Iteration))}, got {method!r}")
