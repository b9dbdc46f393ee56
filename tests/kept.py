"""An optimiser that tells what it was given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Kept(torch.optim.SGD):
    """Plain gradient descent, by default without a move, that keeps the gradients of every step in `given`."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.0) -> None:
        super().__init__(parameters, lr=lr)
        self.given: list[list[Tensor]] = []

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.given.append([one.grad.clone() for one in self.param_groups[0]["params"]])
        super().step()
