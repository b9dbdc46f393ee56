"""Element-wise activations of the papers that torch does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HardSigmoid(nn.Module):
    """clip(z, 0, 1), the hard sigmoid of Taylor et al. 2016; `torch.nn.Hardsigmoid` is clip(z/6 + 1/2, 0, 1)."""

    def forward(self, z: Tensor) -> Tensor:
        return z.clamp(0, 1)


class Sign(nn.Module):
    """+1 where z >= 0, else -1. Its derivative is zero wherever it exists: backpropagation learns nothing below it."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)
