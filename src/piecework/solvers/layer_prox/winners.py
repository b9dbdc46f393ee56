"""Layers that let the largest entries of a row win: one-hot of the argmax, and the k largest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .price import Price


def one_hot(v: Tensor, price: Price, beta_in: float, margin: float) -> Tensor:
    """Of the one-hot row of the largest entry, v (n, d): exact over all winners, O(n d log d).

    The nearest row in which j wins by `margin` (positive, in units of v) lowers the entries above a level to it and
    puts a_j margin above: level = mean of v_j - margin and of those entries (water-filling). Staying is free, and
    needs no margin. With s the row in falling order and S_i the sum before place i, entry i is lowered for a winner
    behind it if (i + 1) s_i - S_i > s_j - margin, and entries behind the winner only if all before it are, for the one
    threshold i s_i - S_i > -margin: all levels come from one sort and prefix sums."""
    num_rows, num_features = v.shape
    if num_rows == 0:
        return v.clone()
    ordered, order = v.sort(dim=1, descending=True, stable=True)  # so that place 0 is the argmax also among equals
    s = ordered - ordered[:, :1]
    place = torch.arange(num_features, device=v.device).expand_as(s)
    sums, squares = F.pad(s.cumsum(1), (1, 0)), F.pad(s.square().cumsum(1), (1, 0))
    height = (place + 1) * s - sums[:, :-1]  # falls from 0
    ahead = torch.minimum(torch.searchsorted((-height).contiguous(), (margin - s).contiguous()), place)
    lowered = (height - s > -margin).sum(1, keepdim=True)
    behind = torch.where(ahead == place, (lowered - 1 - place).clamp_min(0), 0)
    end, over = ahead + behind + (behind > 0), s * (behind > 0)
    count, total = ahead + behind, sums.gather(1, end) - over
    level = (s - margin + total) / (count + 1)
    pooled = squares.gather(1, end) - over.square() - 2 * level * total + count * level.square()
    distance = (level + margin - s).square() + pooled
    distance[:, 0] = 0
    best = (beta_in / 2 * distance + price.slope.gather(1, order)).argmin(1, keepdim=True)
    cap = level.gather(1, best) + ordered[:, :1]
    a = torch.minimum(v, cap)
    a = a.scatter(1, order.gather(1, best), torch.maximum(cap + margin, torch.nextafter(cap, cap + 1)))
    return torch.where(best == 0, v, a)


def top_k(v: Tensor, k: int, price: Price, beta_in: float, margin: float, *, magnitude: bool, scan: int = 16) -> Tensor:
    """Of keeping the k largest entries of a row, v (n, d), by size or by magnitude, and zeros elsewhere.

    For some level all kept entries are at or above level + margin, and all others at or below level. Given the level,
    entries are priced one by one, and the cheapest set keeps the k that gain most; given the set, the cost is convex in
    the level, and the best is found from one sort. The two take turns, from the best of `scan` levels: each set
    is the best for its level, but the whole need not be the best of all. Never worse than v."""
    if k == v.shape[1]:
        return price.minimiser(v, beta_in)
    if v.shape[0] == 0:
        return v.clone()
    problem = _TopK(v, k, price, beta_in, margin, magnitude)
    return problem.solve(scan)


class _TopK:
    """The cost of a level and of a set of kept entries, rows apart."""

    def __init__(self, v: Tensor, k: int, price: Price, beta_in: float, margin: float, magnitude: bool) -> None:
        self.v, self.k, self.price, self.magnitude, self.margin = v, k, price, magnitude, margin
        self.beta_in, self.beta_both = beta_in, beta_in + price.curvature
        self.target = price.minimiser(v, beta_in)
        self.size = v.abs() if magnitude else v
        self.wanted = (self.target.abs() if magnitude else self.target) - margin
        self.kept_free = beta_in / 2 * (self.target - v).square() + price.of(self.target)

    def at_level(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """level (n, 1) -> the best set (n, k) for it, and its cost (n,)."""
        lowered = self.beta_in / 2 * (self.size - level).clamp_min(0).square()
        kept = self.kept_free + self.beta_both / 2 * (level - self.wanted).clamp_min(0).square()
        gains, chosen = (kept - lowered).topk(self.k, 1, largest=False, sorted=False)
        return chosen, lowered.sum(1) + gains.sum(1)

    def best_level(self, chosen: Tensor) -> Tensor:
        """(n, 1) where beta_both times what the kept are lifted is beta_in times what the others are lowered."""
        is_kept = torch.zeros_like(self.size, dtype=torch.bool).scatter_(1, chosen, True)
        points, order = torch.where(is_kept, self.wanted, self.size).sort(1)
        weights = torch.where(is_kept, self.beta_both, self.beta_in).to(points.dtype).gather(1, order)
        kept = is_kept.gather(1, order)
        up, down = weights * kept, weights * ~kept
        # at a point, the kept ones up to it pull down and the others above it pull up
        mass = up.cumsum(1) + _above(down)
        moment = (up * points).cumsum(1) + _above(down * points)
        below = (mass * points < moment).sum(1, keepdim=True)
        mass = torch.where(below == 0, down.sum(1, keepdim=True), mass.gather(1, (below - 1).clamp_min(0)))
        moment = torch.where(
            below == 0, (down * points).sum(1, keepdim=True), moment.gather(1, (below - 1).clamp_min(0))
        )
        level = moment / mass
        return level.clamp_min(0) if self.magnitude else level

    def solve(self, scan: int) -> Tensor:
        chosen = self.kept_free.topk(
            self.k, 1, largest=False
        ).indices  # what one would keep, were there no order to keep
        chosen, least = self.at_level(self.best_level(chosen))
        low = torch.minimum(self.size, self.wanted).amin(1, keepdim=True)
        high = torch.maximum(self.size, self.wanted).amax(1, keepdim=True)
        for i in range(scan):
            level = low + (high - low) * ((i + 0.5) / scan)
            other, cost = self.at_level(level.clamp_min(0) if self.magnitude else level)
            better = cost < least
            chosen = torch.where(better[:, None], other, chosen)
            least = torch.where(better, cost, least)
        chosen = self.at_level(self.best_level(chosen))[0]  # a second time is hardly ever seen to change the set
        a = self.inputs(chosen, self.best_level(chosen))
        return torch.where((self.true_cost(a) < self.true_cost(self.v))[:, None], a, self.v)

    def inputs(self, chosen: Tensor, level: Tensor) -> Tensor:
        """(n, d) the best a for a set and a level."""
        above = torch.maximum(level + self.margin, torch.nextafter(level, level + 1))
        if self.magnitude:
            kept = torch.where(self.target >= 0, 1.0, -1.0) * torch.maximum(self.target.abs(), above)
            rest = self.v.clamp(-level, level)
        else:
            kept, rest = torch.maximum(self.target, above), torch.minimum(self.v, level)
        return rest.scatter(1, chosen, kept.to(rest.dtype).gather(1, chosen))

    def true_cost(self, a: Tensor) -> Tensor:
        output = keep_largest(a, self.k, magnitude=self.magnitude)
        return (self.beta_in / 2 * (a - self.v).square() + self.price.of(output)).sum(1)


def keep_largest(x: Tensor, k: int, *, magnitude: bool) -> Tensor:
    """The k largest entries of each row (the last dimension), by size or by magnitude; zeros elsewhere."""
    return torch.where(largest(x, k, magnitude=magnitude), x, 0.0)


def largest(x: Tensor, k: int, *, magnitude: bool) -> Tensor:
    """Bool of the shape of x: which are the k largest entries of each row."""
    chosen = (x.detach().abs() if magnitude else x.detach()).topk(k, -1, sorted=False).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, chosen, True)


def _above(x: Tensor) -> Tensor:
    """For each place of a row the sum of the entries after it."""
    return F.pad(x[:, 1:].flip(1).cumsum(1).flip(1), (0, 1))
