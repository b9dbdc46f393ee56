"""Element-wise layers, for tensors of any shape: sign, max(x, 0), the scalar quantiser. All exact, O(1) a number."""

from __future__ import annotations

import torch
from torch import Tensor

from .price import Price


def sign(v: Tensor, price: Price, beta_in: float, margin: float) -> Tensor:
    """Stay, or flip to the number of size `margin` on the other side of 0, where sign(0) = +1.

    A flip moves |v| + margin and turns the output over. margin: positive, in units of v."""
    margin = max(margin, torch.finfo(v.dtype).tiny)
    here = torch.where(v >= 0, 1.0, -1.0).to(v.dtype)
    gain = 2 * price.slope * here  # the curvature prices both outputs alike
    return torch.where(gain > beta_in / 2 * (v.abs() + margin).square(), -margin * here, v)


def nonnegative(v: Tensor, price: Price, beta_in: float) -> Tensor:
    """Of max(a, 0): the best a >= 0, the best a <= 0, and the cheaper of the two.

    That is `solvers.prox.relu` in the notation of a Price."""
    up, down = price.minimiser(v, beta_in).clamp_min(0), v.clamp_max(0)
    cost_up = beta_in / 2 * (up - v).square() + price.of(up)
    return torch.where(cost_up < beta_in / 2 * (down - v).square(), up, down)


def quantiser(v: Tensor, codes: Tensor, price: Price, beta_in: float, margin: float) -> Tensor:
    """The cheapest code; a is the point of its cell nearest to v.

    codes: (levels,) increasing and evenly spaced. The cell of a code runs from the middle between it and the code
    before, included, to the middle between it and the next, excluded; the outer cells have no end. margin: how far
    inside another cell to go, as a part of the step between codes, in [0, 1/2); with 0, as far as rounding needs.

    On either side of v both distance and price are convex in the code, so that the best is one of the two codes around
    the minimiser over all numbers: no loop over the codes."""
    edges, last = midpoints(codes), codes.numel() - 1
    step = (codes[-1] - codes[0]) / last
    here = torch.bucketize(v.contiguous(), edges, right=True)
    a, least = v, torch.zeros_like(v)
    for side in (1, -1):
        reach = side * step * (0.5 - margin)  # from the near edge of a cell, with the margin, to its code
        rank = ((price.minimiser(v + reach, beta_in) - codes[0]) / step).floor().nan_to_num()
        for near in (rank, rank + 1):
            within = near.clamp(0, last).long()
            code = torch.maximum(within, here + 1) if side > 0 else torch.minimum(within, here - 1)
            exists = (code >= 0) & (code <= last)
            code = code.clamp(0, last)
            point = _near_end(code, edges, side, margin * step)
            cost = beta_in / 2 * (point - v).square() + price.of(codes[code]) - price.of(codes[here])
            better = exists & (cost < least)
            a, least = torch.where(better, point, a), torch.where(better, cost, least)
    return a


def clipped(v: Tensor, slope: Tensor, beta_in: float, low: float, high: float) -> Tensor:
    """argmin over a of beta_in/2 (a - v)^2 + slope clip(a, low, high), element by element: exact.

    A layer that rounds its input plus even noise gives, on average, the input within its range: this is the proximal
    step of that average, a gradient step that ends at the range and that may also jump into it."""
    inside = (v - slope / beta_in).clamp(low, high)
    gain = slope * (v.clamp(low, high) - inside)
    return torch.where(gain > beta_in / 2 * (inside - v).square(), inside, v)


def midpoints(codes: Tensor) -> Tensor:
    """(levels - 1,) where one code ends and the next begins."""
    return (codes[:-1] + codes[1:]) / 2


def _near_end(code: Tensor, edges: Tensor, side: int, inset: Tensor) -> Tensor:
    """Where one enters the cell of a code coming from below (side 1) or from above (side -1)."""
    if side > 0:
        return edges[(code - 1).clamp_min(0)] + inset
    edge = edges[code.clamp_max(edges.numel() - 1)]
    return torch.minimum(edge - inset, torch.nextafter(edge, edge - 1))
