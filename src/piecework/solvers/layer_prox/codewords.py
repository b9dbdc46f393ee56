"""The vector quantiser: each row becomes the nearest of k codewords."""

from __future__ import annotations

import torch
from torch import Tensor

from .price import Price

ENTRIES_AT_ONCE = 2**22
"""Of the (rows, candidates, codewords) tables: rows beyond this wait for their turn."""


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """(n,) the number of the codeword nearest to each row of x (n, d); codebook: (k, d)."""
    return _potentials(x, codebook).argmin(1)


def _potentials(x: Tensor, codebook: Tensor) -> Tensor:
    """(n, k): half the squared distances, less ||x||^2 / 2."""
    return codebook.square().sum(1) / 2 - x @ codebook.T


def vector_quantiser(
    v: Tensor, codebook: Tensor, price: Price, beta_in: float, margin: float, *, candidates: int = 8, rounds: int = 16
) -> Tensor:
    """Of the nearest codeword, v (n, d), codebook (k, d): for each codeword tried, a point of its Voronoi cell near v.

    margin: how far inside another cell to go, as a part of the distance between the two codewords, in (0, 1/2). The
    codewords tried are those with the lowest cost if only the cell of v's own codeword were in the way, a lower bound;
    there are `candidates`. Inexact where the best is not among them, and where `rounds` do not reach the nearest point
    of its cell: those go by dual coordinate ascent (Hildreth 1957), the most useful bisector first, and what is then
    still outside moves towards the codeword until it is inside, so that the answer is always feasible. Never worse
    than v. O(n candidates rounds k)."""
    k = codebook.shape[0]
    tried = min(candidates, k - 1)
    if tried < 1 or v.shape[0] == 0:
        return v.clone()
    gram = codebook @ codebook.T
    norms = gram.diagonal()
    apart = (norms[:, None] + norms - 2 * gram).clamp_min(0).fill_diagonal_(0)
    at_once = max(1, ENTRIES_AT_ONCE // (tried * k))
    parts = []
    for rows, slope in zip(torch.split(v, at_once), torch.split(price.slope, at_once), strict=True):
        cells = _Cells(rows, codebook, apart, margin)
        prices = price.curvature / 2 * norms + slope @ codebook.T
        parts.append(cells.cheapest(prices, beta_in, tried, rounds))
    return torch.cat(parts)


class _Cells:
    """Voronoi cells, drawn in by the margin, seen from some rows.

    In cell j: (q_l - q_j) . a <= (||q_l||^2 - ||q_j||^2)/2 - margin ||q_l - q_j||^2 for all other l. `excess` is by
    how much a point breaks that."""

    def __init__(self, v: Tensor, codebook: Tensor, apart: Tensor, margin: float) -> None:
        self.v, self.codebook, self.apart, self.margin = v, codebook, apart, margin
        self.potentials = _potentials(v, codebook)
        self.here = self.potentials.argmin(1, keepdim=True)

    def cheapest(self, prices: Tensor, beta_in: float, tried: int, rounds: int) -> Tensor:
        """(n, d) the cheapest of v and of the points found; prices: (n, k) of the codewords."""
        staying = prices.gather(1, self.here)
        codes = self.most_promising(prices, beta_in, tried)
        points = self.points(codes, rounds)
        moved = (points - self.v[:, None]).square().sum(2)
        best = (beta_in / 2 * moved + prices.gather(1, codes)).argmin(1)
        a = points[torch.arange(len(best), device=best.device), best]
        # priced by where it really falls: duplicate codewords, and rounding
        cost = beta_in / 2 * (a - self.v).square().sum(1) + prices.gather(1, nearest(a, self.codebook)[:, None])[:, 0]
        return torch.where((cost < staying[:, 0])[:, None], a, self.v)

    def most_promising(self, prices: Tensor, beta_in: float, tried: int) -> Tensor:
        """(n, tried) codewords other than v's own, the lowest bounds on their cost."""
        between = self.apart[self.here[:, 0]]
        excess = self.potentials - self.potentials.gather(1, self.here) + self.margin * between
        bound = beta_in / 2 * excess.square() * _reciprocal(between) + prices
        return bound.scatter(1, self.here, torch.inf).topk(tried, 1, largest=False).indices

    def points(self, codes: Tensor, rounds: int) -> Tensor:
        """(n, tried, d) a point of each cell, near v."""
        between = self.apart[codes]
        inverse = _reciprocal(between)
        excess = self.potentials.gather(1, codes)[:, :, None] - self.potentials[:, None] + self.margin * between
        weights = torch.zeros_like(excess)
        for _ in range(rounds):
            change = torch.maximum(excess * inverse, -weights)
            which = (change.square() * between).argmax(2, keepdim=True)
            amount = change.gather(2, which)
            weights.scatter_add_(2, which, amount)
            # (q_l - q_j) . (q_p - q_j) of the one bisector l moved across, for all p
            products = (between.gather(2, which) + between - self.apart[which[:, :, 0]]) / 2
            excess -= amount * products
        own = self.codebook[codes]
        a = self.v[:, None] - weights @ self.codebook + weights.sum(2, keepdim=True) * own
        excess = torch.where(between > 0, excess, 0).clamp_min(0)  # towards itself an excess could only be rounding
        share = excess / (excess + (0.5 - self.margin) * between).clamp_min(torch.finfo(excess.dtype).tiny)
        return a + share.amax(2, keepdim=True) * (own - a)


def _reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0)
