"""A model's parameters as one vector, for methods that mix models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from piecework import Batch, Group
from piecework.losses import Loss


class Vector:
    """The parameters as parts of one vector `x`, so that mixing is one operation; and their mean on show."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        if len(kinds) != 1:
            raise ValueError(f"these baselines take parameters of one dtype on one device, got {kinds}")
        self.x = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        parts = self.x.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part.view(parameter.shape)
        self._hidden: Tensor | None = None

    def show_mean(self, group: Group) -> None:
        if self._hidden is None:
            self._hidden = self.x.clone()
            average_(self.x, group)

    def show(self) -> None:
        """The rank's own again."""
        if self._hidden is not None:
            self.x.copy_(self._hidden)
            self._hidden = None


def average_(x: Tensor, group: Group) -> None:
    x.div_(group.size)
    group.sum_(x)


def gradient_of(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    value = loss(model(batch.x), batch.y)
    value.backward()
    return value.detach()
