"""Element-wise activations with what ADMM needs of them: values, z-updates and derivatives, by torch module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import HardSigmoid, Sign
from ...solvers import prox
from ...training import BadInput

Piece = tuple[float, float, float, float]
"""(low, high, slope, intercept): h(z) = slope z + intercept for low <= z <= high."""


@dataclass(frozen=True)
class Activation:
    """An element-wise activation with what a method without gradients needs of it."""

    name: str
    forward: Callable[[Tensor], Tensor]
    """h(z), as a new tensor: never in place, whatever the module does."""
    z_update: Callable[[Tensor, Tensor, float, float], Tensor]
    """(a, m, gamma, beta) -> argmin over z of gamma (a - h(z))^2 + beta (z - m)^2."""
    derivative: Callable[[Tensor], Tensor] | None
    """h'(z), one of the one-sided values at a kink; None where it is of no use because h is piecewise constant."""

    @property
    def piecewise_constant(self) -> bool:
        return self.derivative is None


KNOWN: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.Hardtanh,  # and ReLU6, which is one
    nn.Hardsigmoid,
    HardSigmoid,
    nn.Tanh,
    nn.Sigmoid,
    Sign,
    nn.Identity,
)


def activation_of(module: nn.Module) -> Activation | None:
    """The activation of a torch module, or None where the module is none that is known here."""
    if all(type(module).forward is not known.forward for known in KNOWN):
        return None  # also a subclass that computes something else
    pieces: list[Piece]
    match module:
        case nn.ReLU():
            return Activation("relu", lambda z: z.clamp_min(0), prox.relu, lambda z: (z > 0).to(z.dtype))
        case nn.LeakyReLU():
            slope = float(module.negative_slope)
            pieces = [(-math.inf, 0, slope, 0), (0, math.inf, 1, 0)]
            return piecewise("leaky-relu", lambda z: F.leaky_relu(z, slope), pieces)
        case nn.Hardtanh():
            low, high = float(module.min_val), float(module.max_val)
            pieces = [(-math.inf, low, 0, low), (low, high, 1, 0), (high, math.inf, 0, high)]
            return piecewise("hardtanh", lambda z: z.clamp(low, high), pieces)
        case nn.Hardsigmoid():
            pieces = [(-math.inf, -3, 0, 0), (-3, 3, 1 / 6, 0.5), (3, math.inf, 0, 1)]
            return piecewise("hardsigmoid", F.hardsigmoid, pieces)
        case HardSigmoid():
            pieces = [(-math.inf, 0, 0, 0), (0, 1, 1, 0), (1, math.inf, 0, 1)]
            return piecewise("hard-sigmoid", lambda z: z.clamp(0, 1), pieces)
        case nn.Tanh():
            return Activation("tanh", torch.tanh, prox.tanh, lambda z: 1 - torch.tanh(z).square())
        case nn.Sigmoid():
            return Activation("sigmoid", torch.sigmoid, prox.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z))
        case Sign():
            return Activation("sign", module.forward, prox.sign, None)
        case _:
            return Activation("identity", lambda z: z, prox.identity, torch.ones_like)


def piecewise(name: str, forward: Callable[[Tensor], Tensor], pieces: Sequence[Piece]) -> Activation:
    """A continuous piecewise-linear activation: one weighted mean a piece, clipped to it; the cheapest wins.

    pieces: in order, from -inf to inf. Raises BadInput where they leave a gap or jump (at a jump the minimum need not
    be attained; `prox.sign` shows how to treat one)."""
    _check_pieces(name, pieces)

    def z_update(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
        best, least = m, torch.full_like(m, math.inf)
        for low, high, slope, intercept in pieces:
            pull = gamma * slope / (gamma * slope**2 + beta)
            z = (m + pull * (a - slope * m - intercept)).clamp(low, high)
            cost = gamma * (a - slope * z - intercept).square() + beta * (z - m).square()
            best = torch.where(cost < least, z, best)
            least = torch.minimum(cost, least)
        return best

    def derivative(z: Tensor) -> Tensor:
        slope = torch.zeros_like(z)
        for low, high, piece_slope, _ in pieces:
            slope = torch.where((z > low) & (z <= high), piece_slope, slope)
        return slope

    return Activation(name, forward, z_update, derivative)


def _check_pieces(name: str, pieces: Sequence[Piece]) -> None:
    if not pieces or pieces[0][0] != -math.inf or pieces[-1][1] != math.inf:
        raise BadInput(f"the pieces of {name!r} must cover every number: begin at -inf and end at inf")
    for (_, end, slope, intercept), (start, _, next_slope, next_intercept) in pairwise(pieces):
        left, right = slope * end + intercept, next_slope * end + next_intercept
        if start != end or not math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9):
            raise BadInput(
                f"the pieces of {name!r} do not meet at {end:g}: one ends there with value {left:g}, the next "
                f"begins at {start:g} with value {right:g}; give them in order, without a gap or a jump"
            )
