"""Layers that round: a number to the nearest of some levels, a row to the nearest of some codewords."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..solvers import layer_prox
from ..solvers.layer_prox.elements import midpoints
from ..training import BadInput
from .prox_layer import along, by_rows, part_of_step, towards


class Quantiser(nn.Module):
    """Each number becomes the nearest of `levels` evenly spaced codes from `low` to `high`; of two, the upper.

    margin: how far inside another cell its proximal step goes, as a part of the step between codes. dither: its
    linearised proximal step is that of a quantiser with noise of one step on its input, whose mean is
    clip(x, low, high). There is no derivative and none is pretended: the output has no graph, nor noise. Any shape.
    Raises BadInput for fewer than 2 levels, for low >= high and for a margin outside (0, 0.5)."""

    def __init__(
        self, levels: int, low: float = -1.0, high: float = 1.0, *, margin: float = 0.01, dither: bool = True
    ) -> None:
        super().__init__()
        if levels < 2:
            raise BadInput(f"a quantiser needs at least 2 levels, got {levels}")
        if not (low < high and math.isfinite(high - low)):
            raise BadInput(f"the lowest code must be below the highest, got low={low!r} and high={high!r}")
        self.levels, self.low, self.high, self.margin = levels, low, high, part_of_step(margin)
        self.dither = dither

    def codes(self, like: Tensor) -> Tensor:
        """(levels,) in the dtype and on the device of `like`."""
        return torch.linspace(self.low, self.high, self.levels, dtype=like.dtype, device=like.device)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes(x)
        return codes[torch.bucketize(x.detach().contiguous(), midpoints(codes), right=True)]

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """The cheapest code, or v: exact."""
        price = towards(v, b, beta_in, beta_out)
        return layer_prox.quantiser(v.detach(), self.codes(v), price, beta_in, self.margin)

    def prox_input_linear(self, v: Tensor, gradient: Tensor, beta_in: float) -> Tensor:
        """Exact too."""
        price = along(v, gradient, beta_in)
        if self.dither:
            return layer_prox.clipped(v.detach(), price.slope, beta_in, self.low, self.high)
        return layer_prox.quantiser(v.detach(), self.codes(v), price, beta_in, self.margin)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, low={self.low:g}, high={self.high:g}"


class VectorQuantiser(nn.Module):
    """Each row becomes the nearest of k codewords, the rows of the parameter `codebook` (k, d).

    codebook: (k, d) where the codewords start; it is copied. margin: how far inside another cell the proximal step
    goes, as a part of the distance between the two codewords. The output is differentiable in the codebook (each
    codeword gets the gradients of its rows), and not in the input. Raises BadInput for a codebook or an input of
    another shape."""

    def __init__(self, codebook: Tensor, *, margin: float = 0.01) -> None:
        super().__init__()
        if codebook.dim() != 2 or codebook.numel() == 0 or not codebook.is_floating_point():
            given = f"{codebook.dtype} of shape {tuple(codebook.shape)}"
            raise BadInput(f"a codebook is a floating-point matrix with a codeword a row, (k, d), got {given}")
        self.codebook = nn.Parameter(codebook.detach().clone())
        self.margin = part_of_step(margin)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        rows = x.detach().reshape(-1, x.shape[-1])
        return self.codebook[layer_prox.nearest(rows, self.codebook.detach())].view(x.shape)

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """The cheapest of v and of points in the cells of the 8 most promising codewords: not exact, never worse."""
        return self._prox(v, towards(v, b, beta_in, beta_out), beta_in)

    def prox_input_linear(self, v: Tensor, gradient: Tensor, beta_in: float) -> Tensor:
        """As good as `prox_input`."""
        return self._prox(v, along(v, gradient, beta_in), beta_in)

    def _prox(self, v: Tensor, price: layer_prox.Price, beta_in: float) -> Tensor:
        self._check(v)
        codebook = self.codebook.detach()
        return by_rows(lambda v, price: layer_prox.vector_quantiser(v, codebook, price, beta_in, self.margin), v, price)

    def _check(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.codebook.shape[1]:
            raise BadInput(
                f"the codewords have {self.codebook.shape[1]} features, and the input has shape {tuple(x.shape)}; "
                "its last dimension must be as long"
            )

    def extra_repr(self) -> str:
        return f"{self.codebook.shape[0]} codewords of {self.codebook.shape[1]} features"
