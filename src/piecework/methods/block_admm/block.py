"""A block at work: evaluations that repeat within a step, its optimiser, and the variable on its input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...nn import NMF
from ...nn.prox_layer import LinearProxLayer
from ...training import CannotTrain, stream
from ..noise import forked_generator, may_draw
from .cuts import is_prox

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Cut:
    """The variable X = f + d on the input of a block, all (n, ...), and its scaled dual u.

    f: what the block below gave; d: how far X is from it, None for 0; u: None for 0. X itself is not kept: at a large
    penalty the displacement would drown in its rounding."""

    f: Tensor
    d: Tensor | None = None
    u: Tensor | None = None
    moved: Tensor | None = None
    """How far X went in the last move, where `watched`."""
    watched: bool = False

    @property
    def x(self) -> Tensor:
        return self.f if self.d is None else self.f + self.d

    @property
    def reach(self) -> Tensor | None:
        """d - u: where the block below is to move its output, from what it gave; None for nowhere."""
        if self.u is None:
            return self.d
        return -self.u if self.d is None else self.d - self.u

    def gradient_step(self, gradient: Tensor, alpha: float | Tensor, beta: float | Tensor) -> None:
        """X <- X - alpha [gradient + beta (X - f - u)], the gradient being that of what lies above, a sample."""
        move = gradient * -alpha
        kept = 1 - alpha * beta
        if self.u is not None:
            move = move + alpha * beta * self.u
        if self.d is not None and not (isinstance(kept, float) and kept == 0):
            move = move + kept * self.d
        self.put(move)

    def put(self, d: Tensor) -> None:
        """Move X to f + d."""
        if self.watched:
            self.moved = d if self.d is None else d - self.d
        self.d = d

    def refresh(self, f: Tensor, dual_step: float) -> Tensor:
        """The block below gives f now: X stays, the dual moves by dual_step times the residual c = f - X, returned."""
        c = (f - self.f) if self.d is None else (f - self.f) - self.d
        self.f, self.d = f, -c
        if dual_step:
            self.u = dual_step * c if self.u is None else self.u + dual_step * c
        return c


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

    def __call__(self, x: Tensor) -> Tensor:
        """The block's output, with a graph where gradients are recorded."""
        with forked_generator(self._noise, self._device):
            out = self._again(x) if self._buffers and self._moved else self.module(x)
        self._moved = True
        if not isinstance(out, Tensor):
            raise CannotTrain(
                f"block {self.number} (its last layer is {type(self.module[-1]).__name__}) gives a "
                f"{type(out).__name__}, and block-admm joins blocks by one tensor; cut elsewhere (at=)"
            )
        return out

    def _again(self, x: Tensor) -> Tensor:
        """The output once more: on copies of the statistics, and with dictionaries that stay."""
        kept = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
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
