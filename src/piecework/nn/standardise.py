"""Feature scaling as the first layer of a network, so that the deployed network takes raw features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """(x - mean) / scale, feature by feature, in the dtype of the statistics. It has buffers and no parameters.

    mean, scale: (d,) statistics of the training rows. The input is flattened to (n, d) and may be of any numeric
    dtype, uint8 images included."""

    mean: Tensor
    reciprocal: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        if mean.shape != scale.shape or mean.dim() != 1:
            shapes = f"{tuple(mean.shape)} and {tuple(scale.shape)}"
            raise ValueError(f"mean and scale must be vectors of one length, got {shapes}")
        if not bool((scale > 0).all()):
            raise ValueError("every scale must be positive; constant features take scale 1")
        self.register_buffer("mean", mean.clone())
        self.register_buffer("reciprocal", 1.0 / scale)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).to(self.mean.dtype)
        return torch.mul(flat - self.mean, self.reciprocal)

    def extra_repr(self) -> str:
        return f"{self.mean.numel()} features"
