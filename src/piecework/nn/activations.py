"""Element-wise activations of the papers that torch does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..solvers import layer_prox
from .prox_layer import along, positive, towards


class HardSigmoid(nn.Module):
    """clip(z, 0, 1), the hard sigmoid of Taylor et al. 2016; `torch.nn.Hardsigmoid` is clip(z/6 + 1/2, 0, 1)."""

    def forward(self, z: Tensor) -> Tensor:
        return z.clamp(0, 1)


class Sign(nn.Module):
    """+1 where z >= 0, else -1. Its derivative is zero wherever it exists: backpropagation learns nothing below it.

    margin: in units of z, how far beyond 0 its proximal step goes where it flips a unit.
    dither: its linearised proximal step is that of the sign of z plus noise, even in (-dither, dither), whose mean is
    clip(z / dither, -1, 1): so units move towards a flip before they flip; 0 for no noise. The output is never noisy.
    Raises BadInput unless the margin is positive and the dither at least 0."""

    def __init__(self, margin: float = 0.1, *, dither: float = 1.0) -> None:
        super().__init__()
        self.margin = positive("margin", margin)
        self.dither = positive("dither", dither) if dither else 0.0

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """Stay, or flip to -margin sign(v): exact. Any shape."""
        return layer_prox.sign(v.detach(), towards(v, b, beta_in, beta_out), beta_in, self.margin)

    def prox_input_linear(self, v: Tensor, gradient: Tensor, beta_in: float) -> Tensor:
        """Exact too. Without dither it flips iff 2 gradient sign(v) > beta_in/2 (|v| + margin)^2."""
        price = along(v, gradient, beta_in)
        if self.dither == 0:
            return layer_prox.sign(v.detach(), price, beta_in, self.margin)
        return layer_prox.clipped(v.detach(), price.slope / self.dither, beta_in, -self.dither, self.dither)
