"""Layers that put a constraint on what passes: not negative, or a point of the probability simplex."""

from __future__ import annotations

from torch import Tensor, nn

from ..solvers import layer_prox
from ..solvers.layer_prox import Price
from .prox_layer import along, by_rows, towards


class NonNegative(nn.Module):
    """max(x, 0): the nearest numbers that are not negative. As a function it is ReLU. Any shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(0)

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """The cheaper of the best a >= 0 and the best a <= 0: exact."""
        return layer_prox.nonnegative(v.detach(), towards(v, b, beta_in, beta_out), beta_in)

    def prox_input_linear(self, v: Tensor, gradient: Tensor, beta_in: float) -> Tensor:
        """Exact too."""
        return layer_prox.nonnegative(v.detach(), along(v, gradient, beta_in), beta_in)


class Simplex(nn.Module):
    """The nearest row (the last dimension) with entries >= 0 that sum to 1; sparse, unlike softmax.

    Also known as sparsemax (Martins and Astudillo 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_prox.project(x)

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """By turns the support of the output and the level of the input: not exact, never worse than v."""
        return self._prox(v, towards(v, b, beta_in, beta_out), beta_in)

    def prox_input_linear(self, v: Tensor, gradient: Tensor, beta_in: float) -> Tensor:
        """As good as `prox_input`."""
        return self._prox(v, along(v, gradient, beta_in), beta_in)

    def _prox(self, v: Tensor, price: Price, beta_in: float) -> Tensor:
        return by_rows(lambda v, price: layer_prox.simplex(v, price, beta_in), v, price)
