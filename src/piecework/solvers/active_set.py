"""Exact non-negative least squares, many rows at once: which codes are positive, and what they are then.

The problem of a row is min over s >= 0 of (1/2) s G s^T - c s^T, G (r, r) positive definite and common to all rows. Its
answer is known once its free set F = {k: s_k > 0} is: s_F = G_FF^-1 c_F, 0 elsewhere. Kim and Park, "Fast nonnegative
matrix factorization: an active-set-like method and comparisons", SIAM J. Sci. Comput. 33(6), 2011, algorithm 2 (block
principal pivoting), exchanges all indices at once that contradict it, and one at a time where that stops helping.

Differs from the paper
1. It starts from a guess of the free set, and a row that is not finished keeps the better of the guess and the pivoted.
2. Rows are solved by batched Cholesky of G with the rows and columns outside F replaced by those of the identity;
   rows are not grouped by their free sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1 << 22
"""Numbers of the masked Gram matrices, rows x r x r, that exist at once."""
FULL_EXCHANGES = 3
"""Exchanges of all indices that need not lower the number of contradictions, before single ones (the paper's)."""
ROUNDS = 50
"""Most rounds of pivoting where the machine may be asked whether all rows are finished."""
BLIND_ROUNDS = 8
"""Rounds on a device, which is not asked."""


def solve_free(gram: Tensor, free: Tensor, right: Tensor) -> Tensor:
    """u (n, r) with u_F G_FF = right_F and 0 outside F, row by row.

    gram: (r, r), positive definite; free: (n, r) bool; right: (n, r). A row whose system has no Cholesky factor comes
    back as NaN. Never synchronises a device."""
    rows = max(1, TILE // max(1, gram.numel()))
    tiles = zip(torch.split(free, rows), torch.split(right, rows), strict=True)
    parts = [_solve_tile(gram, f, b) for f, b in tiles]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _solve_tile(gram: Tensor, free: Tensor, right: Tensor) -> Tensor:
    kept = free.to(gram.dtype)
    system = gram * kept[:, :, None] * kept[:, None, :]
    system.diagonal(dim1=1, dim2=2).add_(1 - kept)
    factor, info = torch.linalg.cholesky_ex(system)
    found = torch.cholesky_solve((right * kept)[:, :, None], factor)[:, :, 0]
    return torch.where((info == 0)[:, None], found * kept, torch.nan)


def finish(gram: Tensor, cross: Tensor, guess: Tensor, *, ask: bool | None = None) -> Tensor:
    """The exact codes (n, r), from a guess (n, r) >= 0 whose positive entries are nearly the right ones.

    gram: (r, r), the ridge included; cross: (n, r). Rows that pivoting does not finish (a Gram matrix without full
    rank, too many rounds) keep what is better by `departure`. ask: whether the machine may be asked which rows are
    finished, so that only the others go on; if not (None: on a device), `BLIND_ROUNDS` rounds are made of all rows."""
    found = _pivot(gram, cross, guess, cross.device.type == "cpu" if ask is None else ask)
    curvature = gram.diagonal()
    now, before = (departure(x, x @ gram - cross, curvature) for x in (found, guess))
    return torch.where((now <= before)[:, None], found, guess)  # not where now is NaN


def departure(codes: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """How far rows are from their optimality (KKT) conditions, (n,): max |s - max(0, s - slope/curvature)| / max s.

    codes, slope: (n, r), the point and the gradient there; curvature: (r,), what a code alone is divided by to make a
    step of it, here the diagonal of G. The largest step of one code, in parts of the row's largest; 0 where no code
    would move, inf where the codes are all 0 and should not be."""
    step = codes - (codes - slope / curvature.clamp_min(torch.finfo(slope.dtype).tiny)).clamp_min(0)
    largest = step.abs().amax(1)
    return torch.where(largest == 0, 0.0, largest / codes.amax(1))


def _pivot(gram: Tensor, cross: Tensor, guess: Tensor, ask: bool) -> Tensor:
    r = cross.shape[1]
    free, x = guess > 0, torch.full_like(guess, torch.nan)
    least = torch.full_like(cross[:, 0], r + 1, dtype=torch.int64)
    chances = torch.full_like(least, FULL_EXCHANGES)
    here = torch.arange(len(cross), device=cross.device)  # the rows that go on
    for _ in range(ROUNDS if ask else BLIND_ROUNDS):
        x_here, wrong = _trial(gram, cross[here], free[here])
        count = wrong.sum(1)
        x[here] = x_here.clamp_min(0)
        if ask:
            go_on = (count > 0) & x_here.isfinite().all(1)
            if not bool(go_on.any()):
                break
            here, wrong, count = here[go_on], wrong[go_on], count[go_on]
        fewer = count < least[here]
        least[here] = torch.where(fewer, count, least[here])
        chances[here] = torch.where(fewer, FULL_EXCHANGES, chances[here] - 1)
        last = r - 1 - wrong.flip(1).to(torch.uint8).argmax(1)
        single = wrong & (torch.arange(r, device=wrong.device) == last[:, None])
        free[here] ^= torch.where((chances[here] >= 0)[:, None], wrong, single)
    return x


def _trial(gram: Tensor, cross: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The codes on a free set and the indices (n, r) that contradict it: negative codes in it, negative slopes outside.

    What could be rounding is no contradiction: else two neighbours of a degenerate row would take turns."""
    x = solve_free(gram, free, cross)
    slope = x @ gram - cross
    rounding = 8 * gram.shape[0] ** 0.5 * torch.finfo(gram.dtype).eps
    noise_x = rounding * x.abs().amax(1, keepdim=True)
    noise_slope = rounding * (cross.abs().amax(1, keepdim=True) + noise_x)
    return x, torch.where(free, x < -noise_x, slope < -noise_slope)
