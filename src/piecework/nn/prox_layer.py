"""Layers that say how their input should move, in the place of a derivative."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ProxLayer(Protocol):
    """A layer with a proximal step of its input: all that block-ADMM needs to train what lies before it."""

    def forward(self, x: Tensor) -> Tensor: ...

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """argmin over a of beta_in/2 ||a - v||^2 + beta_out/2 ||forward(a) - b||^2, row by row; same shape as v."""
        ...
