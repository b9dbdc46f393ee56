"""Gradients invented for layers that have none, so that Adam can train through them: what block-ADMM is compared with.

Straight-through estimator (Bengio, Leonard, Courville, arXiv:1308.3432; clipped as in Hubara et al., arXiv:1602.02830):
the backward pass takes the layer for the identity where its input is within a range, and for a constant elsewhere.
Hinge targets (Friesen, Domingos, "Deep learning as a mixed convex-combinatorial optimization problem", ICLR 2018,
written anew from the idea): each hidden unit gets the target sign(-gradient by its output), and the layer below learns
by a hinge loss of its pre-activation z to that target t; what goes further down is the gradient of that layer's loss.
    soft        1 + tanh(-t z)            gradient by z   -t / cosh(z)^2
    saturated   max(0, 1 - max(-1, t z))  gradient by z   -t where |z| < 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from piecework.nn import Quantiser


class StraightThroughSign(nn.Module):
    """sign(z), with the derivative 1 where |z| < clip."""

    def __init__(self, clip: float = 1.0) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, z: Tensor) -> Tensor:
        passed = z.clamp(-self.clip, self.clip)
        return passed + (torch.where(z >= 0, 1.0, -1.0).to(z.dtype) - passed).detach()


class StraightThroughQuantiser(nn.Module):
    """The codes of a quantiser, with the derivative 1 within its range."""

    def __init__(self, levels: int, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        self.codes, self.low, self.high = Quantiser(levels, low, high), low, high

    def forward(self, z: Tensor) -> Tensor:
        passed = z.clamp(self.low, self.high)
        return passed + (self.codes(z) - passed).detach()


class HingeSign(nn.Module):
    """sign(z), whose backward pass gives the gradient of a hinge loss to targets, "soft" or "saturated"."""

    def __init__(self, hinge: str = "soft") -> None:
        super().__init__()
        assert hinge in ("soft", "saturated")
        self.hinge = hinge

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = _Hinge.apply(z, self.hinge)  # type: ignore[no-untyped-call]
        return out


class _Hinge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, hinge: str) -> Tensor:
        ctx.save_for_backward(z)
        ctx.hinge = hinge
        return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        slope = 1 - z.tanh().square() if ctx.hinge == "soft" else (z.abs() < 1).to(z.dtype)
        return gradient.sign() * slope / len(z), None  # the layer's loss is a mean over the rows
