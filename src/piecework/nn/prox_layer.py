"""What a layer offers to a method that trains around it without its derivative: its proximal step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..solvers import layer_prox
from ..solvers.layer_prox import Price
from ..training import BadInput


@runtime_checkable
class ProxLayer(Protocol):
    """A layer that knows which input would serve best. Structural: there is nothing to inherit."""

    def forward(self, x: Tensor) -> Tensor:
        """The output for x, a sample a row."""
        ...

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """argmin over a of beta_in/2 ||a - v||^2 + beta_out/2 ||forward(a) - b||^2, row by row; same shape as v.

        v: the input that there is; b: the output that is wanted, of the shape of forward(v). Never worse than a = v. It
        may be a good answer in place of the best: each layer says which."""
        ...


@runtime_checkable
class LinearProxLayer(ProxLayer, Protocol):
    """A ProxLayer that also knows the step in which the blocks above are linearised."""

    def prox_input_linear(self, v: Tensor, gradient: Tensor, beta_in: float) -> Tensor:
        """argmin over a of beta_in/2 ||a - v||^2 + <gradient, forward(a)>, row by row; same shape as v.

        gradient: of the loss by the output, of the shape of forward(v). A layer may put something smoother in the place
        of its forward, for it trains better, and says so: with noise on its input, or with the same entries kept."""
        ...


def towards(v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Price:
    """The price of `prox_input` for a layer whose output has the shape of its input.

    Raises BadInput for other shapes and for penalties that are no positive numbers."""
    same_shape(v, b, "wanted output")
    check_penalties(beta_in, beta_out)
    return layer_prox.towards(b.detach(), beta_out)


def along(v: Tensor, gradient: Tensor, beta_in: float) -> Price:
    """The price of `prox_input_linear`; refuses like `towards`."""
    same_shape(v, gradient, "gradient")
    check_penalties(beta_in, 1.0)
    return layer_prox.along(gradient.detach())


def check_penalties(beta_in: float, beta_out: float) -> None:
    """Raises BadInput unless both are positive numbers."""
    for name, value in (("beta_in", beta_in), ("beta_out", beta_out)):
        positive(name, value)


def positive(name: str, value: float) -> float:
    """The value; raises BadInput unless it is a positive number."""
    if not (value > 0 and math.isfinite(value)):
        raise BadInput(f"{name} must be a positive number, got {value!r}")
    return value


def part_of_step(margin: float) -> float:
    """The margin; raises BadInput unless it leaves room within a cell that is one step wide."""
    if not 0 < margin < 0.5:
        raise BadInput(f"margin is a part of the distance between codes: above 0 and below 0.5, got {margin!r}")
    return margin


def by_rows(solve: Callable[[Tensor, Price], Tensor], v: Tensor, price: Price) -> Tensor:
    """solve on (n, d) rows for a v (..., d) with any number of dimensions before the last."""
    flat = Price(price.curvature, price.slope.reshape(-1, v.shape[-1]))
    with torch.no_grad():
        return solve(v.detach().reshape(-1, v.shape[-1]), flat).view(v.shape)


def same_shape(v: Tensor, other: Tensor, what: str) -> None:
    """Raises BadInput where the other tensor does not have the shape of v."""
    if v.shape != other.shape:
        raise BadInput(
            f"the input has shape {tuple(v.shape)}, so the {what} must have it too, not {tuple(other.shape)}"
        )
