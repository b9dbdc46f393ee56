"""How a step compares with backpropagation, and how far its constraints are from being met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...group import Group
from ...training import Metrics
from .sweep import Sweep
from .variable import Cut


def cosine(steps: Mapping[int, Sequence[Tensor]], true: Mapping[int, Sequence[Tensor]], group: Group) -> Tensor:
    """The cosine, 0-d float64, between the sum of what the blocks' optimisers were given in a step and the gradient of
    the loss at its start; over all ranks' blocks. Collective."""
    sums = torch.zeros(3, dtype=torch.float64)
    for number, gradients in true.items():
        given = steps.get(number) or [torch.zeros_like(one) for one in gradients]
        for gradient, step in zip(gradients, given, strict=True):
            a, b = step.double(), gradient.double()
            sums += torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]).cpu()
    group.sum_(sums)
    return sums[0] / (sums[1] * sums[2]).sqrt()


def figures(sweep: Sweep, beta: Sequence[float | Tensor]) -> Metrics:
    """Means over the cuts here. primal_residual: ||f - X|| / ||X||; dual_residual: beta ||move of X|| and multiplier:
    beta ||u||, both the root of a mean square over rows, in loss units."""
    found: dict[str, list[Tensor]] = {"primal_residual": [], "dual_residual": [], "multiplier": []}
    for number, cut in sweep.cuts.items():
        if cut.d is None:
            continue
        root = len(cut.f) ** 0.5
        found["primal_residual"].append(cut.d.norm() / cut.x.norm().clamp_min(torch.finfo(cut.f.dtype).tiny))
        found["dual_residual"].append(beta[number] * _norm(cut.moved) / root)
        found["multiplier"].append(beta[number] * _norm(cut.u) / root)
    return {
        name: torch.stack([torch.as_tensor(one).cpu() for one in all_]).mean() for name, all_ in found.items() if all_
    }


def balanced(cut: Cut, residual: Tensor, beta: Tensor) -> Tensor:
    """The penalty, twice or half as large where the primal residual c and the dual one are ten times apart; the dual u
    is rescaled, so that the multiplier beta u stays. (Boyd et al. 2011, section 3.4.1.)"""
    primal, dual = residual.norm(), beta * _norm(cut.moved)
    factor = torch.where(primal > 10 * dual, 2.0, torch.where(dual > 10 * primal, 0.5, 1.0))
    if cut.u is not None:
        cut.u = cut.u / factor.to(cut.u.dtype)
    return beta * factor


def _norm(tensor: Tensor | None) -> Tensor:
    return torch.zeros(()) if tensor is None else tensor.norm()
