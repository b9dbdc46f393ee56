"""A head at work: the local loss of a block, its derivative at the block's output, and the head's own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...losses import Loss
from ...training import Batch, CannotTrain, stream
from ..blocks import Factory
from ..noise import forked_generator, may_draw

_HEAD, _START = (int.from_bytes(word, "big") for word in (b"head", b"start"))

HeadFactory = Callable[[Tensor, int], nn.Module]
"""(one row of what the block gives, number of outputs) -> a module that gives outputs for what the block gives."""


@runtime_checkable
class Charging(Protocol):
    """A head with a loss of its own."""

    def charge(self, h: Tensor, batch: Batch, objective: Loss) -> Tensor:
        """What a block is charged, 0-d, for its output on these rows."""
        ...


class Head:
    """module: gives outputs for what a block gives. It steps along its own loss, whatever the block learns from."""

    def __init__(self, module: nn.Module, number: int, factory: Factory, seed: int, device: torch.device) -> None:
        self.module, self.number = module.to(device), number
        self.parameters = [one for one in module.parameters() if one.requires_grad]
        self.optimizer = factory(self.parameters) if self.parameters else None
        self._seed, self._device = seed, device
        self._draws = may_draw(module)

    def judge(
        self, out: Tensor, batch: Batch, objective: Loss, step: int, *, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(local loss, its derivative at the block's output where wanted); the head has taken its step."""
        noise = stream(self._seed, self.number, step, _HEAD).initial_seed() if self._draws else None
        h = out.detach().requires_grad_(wanted)
        with torch.enable_grad(), forked_generator(noise, self._device):
            loss = self._loss(h, batch, objective)
        leaves = [*self.parameters, *([h] if wanted else [])]
        found: Any = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves and loss.requires_grad else ()
        if len(found) < len(leaves) or any(one is None for one in found):
            raise CannotTrain(
                f"no derivative of its loss reaches a parameter of the head of block {self.number}, or what it is "
                "given; give a head (make_head) that has one, and freeze what is not to learn"
            )
        if self.optimizer is not None:
            for parameter, gradient in zip(self.parameters, found, strict=False):
                parameter.grad = gradient
            self.optimizer.step()
            for parameter in self.parameters:
                parameter.grad = None
        return loss.detach(), found[-1].contiguous() if wanted else None

    def _loss(self, h: Tensor, batch: Batch, objective: Loss) -> Tensor:
        if isinstance(self.module, Charging):
            return self.module.charge(h, batch, objective)
        return objective(self.module(h), batch.y)


def built(make: Callable[[], nn.Module], seed: int, number: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A new head; what it draws for its start, (seed, number) decides."""
    noise = stream(seed, number, _START).initial_seed()
    with forked_generator(noise, torch.device("cpu")):
        module = make()
    return module.to(device=device, dtype=dtype).train()
