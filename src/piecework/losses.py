"""Losses and what each can do: value, closed-form gradient and curvature at the outputs, proximal map."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Loss(Protocol):
    """A loss on network outputs. z: (n, k) outputs; y: (n,) int64 classes from 0, or (n, k) real targets.

    A *total* is a sum over samples (the papers' convention); calling the loss gives the mean over samples, which is
    what every report shows."""

    name: str

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        """The mean loss a sample, 0-d; differentiable by autograd."""
        ...

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        """The sum over samples, 0-d, in float64 accumulation where z is float32."""
        ...

    def decide(self, z: Tensor) -> Tensor:
        """The predicted classes (n,) int64; for real targets the outputs themselves."""
        ...
