"""Blocks of a network at work: where it is cut, who holds which, and evaluations that repeat within a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..evaluation import deployed
from ..nn import NMF
from ..nn.prox_layer import LinearProxLayer, ProxLayer
from ..training import CannotTrain, stream
from .noise import forked_generator, may_draw

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def is_prox(block: nn.Module) -> bool:
    """Whether a block is a layer that gives its input's proximal step in the place of a derivative."""
    return isinstance(block, nn.Sequential) and len(block) == 1 and isinstance(block[0], ProxLayer)


def owners(costs: Sequence[float], size: int) -> list[int]:
    """The rank of each block: consecutive blocks, at least one a rank, the most expensive rank as cheap as can be."""
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(size):
        row = {}
        for end in range(1, len(costs) + 1):
            choices = [
                (max(worst, sum(costs[start:end])), start) for start, (worst, _) in best[-1].items() if start < end
            ]
            if choices:
                row[end] = min(choices)
        best.append(row)
    found, end = [0] * len(costs), len(costs)
    for rank in range(size - 1, -1, -1):
        start = best[rank + 1][end][1]
        found[start:end] = [rank] * (end - start)
        end = start
    return found


def not_a_tensor(block: nn.Module, number: int, out: object) -> CannotTrain:
    """The refusal of a block that gives something else than one tensor."""
    last = block[-1] if isinstance(block, nn.Sequential) else block
    return CannotTrain(
        f"block {number} (its last layer is {type(last).__name__}) gives a {type(out).__name__}, and blocks are joined "
        "by one tensor; cut elsewhere (at=)"
    )


def one_row(blocks: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """What each block gives for the first row, (1, ...), as it is deployed. Raises CannotTrain for no tensor."""
    found: list[Tensor] = []
    h: Any = x[:1]
    for number, block in enumerate(blocks):
        with deployed(block):
            h = block(h)
        if not isinstance(h, Tensor):
            raise not_a_tensor(block, number, h)
        found.append(h)
    return found


class Block:
    """Some modules in a row. Within a step all evaluations see the same noise, and statistics move in the first one."""

    def __init__(self, module: nn.Sequential, number: int, factory: Factory, seed: int, device: torch.device) -> None:
        self.module, self.number = module, number
        self.prox = is_prox(module)
        self.parameters = [one for one in module.parameters() if one.requires_grad]
        self.optimizer = factory(self.parameters) if self.parameters else None
        self._seed, self._device = seed, device
        self._draws = may_draw(module)
        self._buffers = bool(list(module.buffers()))
        self._noise: int | None = None
        self._moved = False

    def begin(self, step: int, *, again: bool = False) -> None:
        """The batch of this step comes: with its own noise, and statistics move once; or it comes again."""
        self._noise = stream(self._seed, self.number, step).initial_seed() if self._draws else None
        self._moved = again

    def __call__(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output, with a graph where gradients are recorded.

        weights: parameters by name to take in the place of the block's own."""
        with forked_generator(self._noise, self._device):
            if self._buffers and self._moved:
                out = self._again(x, weights or {})
            else:
                out = functional_call(self.module, dict(weights), (x,)) if weights else self.module(x)
        self._moved = True
        if not isinstance(out, Tensor):
            raise not_a_tensor(self.module, self.number, out)
        return out

    def _again(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The output once more: on copies of the statistics, and with dictionaries that stay."""
        kept = {name: buffer.clone() for name, buffer in self.module.named_buffers()} | dict(weights)
        tracked = [one for one in self.module.modules() if isinstance(one, NMF) and one.track]
        for layer in tracked:
            layer.track = False
        try:
            out: Tensor = functional_call(self.module, kept, (x,))
        finally:
            for layer in tracked:
                layer.track = True
        return out

    def step(self, gradients: Iterable[Tensor]) -> None:
        """One step of the block's optimiser along these gradients, one for each parameter."""
        assert self.optimizer is not None
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def prox_input(
        self,
        v: Tensor,
        given: Tensor,
        reach: Tensor,
        beta_in: float | Tensor,
        beta_out: float | Tensor,
        *,
        linear: bool,
    ) -> Tensor:
        """The proximal step of this block's one layer, whose output `given` is to move by `reach`.

        linear: with what lies above linearised there, where the layer knows that step."""
        layer: Any = self.module[0]
        with torch.no_grad(), forked_generator(self._noise, self._device):
            if linear and isinstance(layer, LinearProxLayer):
                a: Tensor = layer.prox_input_linear(v, reach * -beta_out, float(beta_in))
            else:
                a = layer.prox_input(v, given + reach, float(beta_in), float(beta_out))
        return a
