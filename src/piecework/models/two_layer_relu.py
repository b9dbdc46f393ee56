"""The network of the theory of wide two-layer networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..training import BadInput


class FixedSigns(nn.Module):
    """h (n, m) -> m^-1/2 sum_k a_k h_k, (n, 1), with fixed signs a (m,)."""

    signs: Tensor

    def __init__(self, signs: Tensor) -> None:
        super().__init__()
        self.register_buffer("signs", signs)

    def forward(self, h: Tensor) -> Tensor:
        return (h @ self.signs / math.sqrt(len(self.signs)))[:, None]


def two_layer_relu(
    num_features: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    """f(x) = m^-1/2 sum_k a_k relu(w_k x): only the rows w_k are trained, drawn from N(0, I); a_k = +-1 stay fixed.

    Source: van den Brand, Peng, Song, Weinstein, arXiv 2006.11648, section 2; samples are meant to have unit length.
    Only `seed` decides the weights. Raises BadInput for a width below 1."""
    if num_features < 1 or width < 1:
        raise BadInput(f"needs at least one feature and one unit, got {num_features} and {width}")
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(num_features, width, bias=False, dtype=dtype, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.copy_(torch.randn(width, num_features, generator=generator, dtype=torch.float64))
    signs = torch.randint(0, 2, (width,), generator=generator).mul(2).sub(1).to(dtype)
    return nn.Sequential(linear, nn.ReLU(), FixedSigns(signs))
