"""Projection on the probability simplex, as a function and as a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .price import Price


def project(x: Tensor) -> Tensor:
    """The nearest row (the last dimension) with entries >= 0 that sum to 1, by sorting (Held, Wolfe, Crowder 1974)."""
    return (x - level(x)).clamp_min(0)


def level(x: Tensor) -> Tensor:
    """The number to take off each row, (..., 1), before what is negative becomes 0."""
    ordered = x.sort(-1, descending=True).values
    counts = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    excess = (ordered.cumsum(-1) - 1) / counts
    kept = (ordered > excess).sum(-1, keepdim=True).clamp_min(1)
    return excess.gather(-1, kept - 1)


def simplex(v: Tensor, price: Price, beta_in: float, *, turns: int = 2) -> Tensor:
    """Of the projection on the simplex, v (n, d).

    The inputs with output p are a = p + tau on the support of p and a <= tau off it (the normal cone). Given the
    support, p is the projection of the price's minimiser c = argmin over y of beta_in/2 ||y - v||^2 + price(y) on its
    face, for any tau, and tau is the mean of the v - p of the support and of the v above tau elsewhere. So only the
    support is to be chosen. Given tau, an entry that costs lifting (v < tau) pays if c - theta > sqrt(beta_in /
    (beta_in + curvature)) (tau - v), theta being what makes p sum to 1, as for a unit of ReLU; the entries are ordered
    by that, and the best of all d beginnings of that order comes from prefix sums. tau and support take turns, from
    the tau of v and from that of the projection of c. Not exact: the best support need not be such a beginning. Never
    worse than v. O(turns n d log d)."""
    if v.shape[0] == 0:
        return v.clone()
    problem = _Simplex(v, price, beta_in)
    best, least = v, problem.cost(v, project(v))
    for tau in (level(v), problem.level(project(problem.centre))):
        for _ in range(turns):
            p = problem.output(problem.support(tau))
            tau = problem.level(p)
            a = torch.where(p > 0, p + tau, torch.minimum(v, tau))
            cost = problem.cost(a, p)
            better = cost < least
            best, least = torch.where(better[:, None], a, best), torch.where(better, cost, least)
    return best


class _Simplex:
    def __init__(self, v: Tensor, price: Price, beta_in: float) -> None:
        self.v, self.price, self.beta_in = v, price, beta_in
        self.both = beta_in + price.curvature
        self.centre = price.minimiser(v, beta_in)
        self.ordered, self.order = v.sort(1, descending=True)

    def cost(self, a: Tensor, p: Tensor) -> Tensor:
        return (self.beta_in / 2 * (a - self.v).square() + self.price.of(p)).sum(1)

    def support(self, tau: Tensor) -> Tensor:
        """(n, d) bool: the best beginning of the order in which entries pay, for this tau (n, 1)."""
        pays = self.centre - math.sqrt(self.beta_in / self.both) * (tau - self.v).clamp_min(0)
        order = pays.argsort(1, descending=True)
        centre, v = self.centre.gather(1, order), self.v.gather(1, order)
        counts = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)
        theta = (centre.cumsum(1) - 1) / counts
        shift = self.beta_in / self.both * tau
        # (both/2) (p - centre + shift)^2 + lift is what an entry of the support costs with output p
        lift = self.beta_in / 2 * (tau - v).clamp_min(0).square() - self.both / 2 * (centre - shift).square()
        cost = counts * self.both / 2 * (shift - theta).square() + lift.cumsum(1)
        cost = torch.where(centre.cummin(1).values > theta, cost, torch.inf)
        size = cost.argmin(1, keepdim=True)
        taken = torch.arange(v.shape[1], device=v.device) <= size
        return torch.zeros_like(taken).scatter(1, order, taken)

    def output(self, support: Tensor) -> Tensor:
        """(n, d) the best p on a support."""
        theta = (torch.where(support, self.centre, 0).sum(1, keepdim=True) - 1) / support.sum(1, keepdim=True)
        return torch.where(support, self.centre - theta, 0).clamp_min(0)

    def level(self, p: Tensor) -> Tensor:
        """(n, 1) the best tau for an output p."""
        off = (p == 0).gather(1, self.order)
        lifted = torch.where(p > 0, self.v - p, 0).sum(1, keepdim=True)
        pushed = torch.where(off, self.ordered, 0)
        count = (~off).sum(1, keepdim=True) + off.cumsum(1)
        total = lifted + pushed.cumsum(1)
        joins = off & (self.ordered * (count - 1) > total - pushed)
        return (lifted + (pushed * joins).sum(1, keepdim=True)) / ((~off) | joins).sum(1, keepdim=True)
