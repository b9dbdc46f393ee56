"""Layers that look at the order of the entries of a row (the last dimension): the k largest, sorting, the winner."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..solvers import layer_prox
from ..solvers.layer_prox import Price
from ..training import BadInput
from .prox_layer import along, by_rows, positive, towards


class TopK(nn.Module):
    """Keeps the k largest entries of each row, and puts zeros elsewhere.

    by: "value" or "magnitude". margin: in units of x, how far apart the proximal step keeps kept entries and others
    where it changes which are kept. exchange: whether the linearised proximal step changes it; without, it moves the
    kept entries as if they stayed so. Among equal entries the choice is arbitrary. Backpropagation gets the derivative
    of the kept entries, and learns nothing about the choice. Raises BadInput for k < 1, for a row with fewer than k
    entries, for another `by` and for a margin that is not positive."""

    def __init__(self, k: int, *, by: str = "value", margin: float = 1e-3, exchange: bool = False) -> None:
        super().__init__()
        if k < 1:
            raise BadInput(f"at least one entry must be kept, got k={k}")
        if by not in ("value", "magnitude"):
            raise BadInput(f"by is 'value' or 'magnitude', got {by!r}")
        self.k, self.by, self.margin, self.exchange = k, by, positive("margin", margin), exchange

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return layer_prox.keep_largest(x, self.k, magnitude=self._by_magnitude)

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """By turns the best set for a level and the best level for a set: not exact, never worse than v."""
        return self._prox(v, towards(v, b, beta_in, beta_out), beta_in)

    def prox_input_linear(self, v: Tensor, gradient: Tensor, beta_in: float) -> Tensor:
        """A gradient step of the kept entries; with `exchange` as good as `prox_input`."""
        price = along(v, gradient, beta_in)
        if self.exchange:
            return self._prox(v, price, beta_in)
        self._check(v)
        kept = layer_prox.largest(v.detach(), self.k, magnitude=self._by_magnitude)
        return torch.where(kept, price.minimiser(v.detach(), beta_in), v.detach())

    def _prox(self, v: Tensor, price: Price, beta_in: float) -> Tensor:
        self._check(v)

        def solve(v: Tensor, price: Price) -> Tensor:
            return layer_prox.top_k(v, self.k, price, beta_in, self.margin, magnitude=self._by_magnitude)

        return by_rows(solve, v, price)

    @property
    def _by_magnitude(self) -> bool:
        return self.by == "magnitude"

    def _check(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] < self.k:
            raise BadInput(f"cannot keep the {self.k} largest entries of rows in an input of shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"k={self.k}, by={self.by!r}"


class Sort(nn.Module):
    """Sorts each row upwards. It has a derivative, a permutation; what that never shows is another order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """An isotonic regression a row, in the order of v: exact. Runs on the CPU."""
        return by_rows(lambda v, price: layer_prox.sort(v, price, beta_in), v, towards(v, b, beta_in, beta_out))

    def prox_input_linear(self, v: Tensor, gradient: Tensor, beta_in: float) -> Tensor:
        """Exact too."""
        return by_rows(lambda v, price: layer_prox.sort(v, price, beta_in), v, along(v, gradient, beta_in))


class OneHot(nn.Module):
    """1 at the largest entry of each row (the first of equal ones), and 0 elsewhere. The output has no graph.

    margin: in units of x, by how much a new winner wins after the proximal step. Raises BadInput unless it is
    positive."""

    def __init__(self, margin: float = 0.1) -> None:
        super().__init__()
        self.margin = positive("margin", margin)

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(x.detach().argmax(-1), x.shape[-1]).to(x.dtype)

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """Stay, or the nearest row where another entry wins by the margin, over all winners: exact."""
        return self._prox(v, towards(v, b, beta_in, beta_out), beta_in)

    def prox_input_linear(self, v: Tensor, gradient: Tensor, beta_in: float) -> Tensor:
        """Exact too."""
        return self._prox(v, along(v, gradient, beta_in), beta_in)

    def _prox(self, v: Tensor, price: Price, beta_in: float) -> Tensor:
        return by_rows(lambda v, price: layer_prox.one_hot(v, price, beta_in, self.margin), v, price)
