"""A mini-batch in the blocks of one rank: forward, then visits of the blocks that move targets and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...losses import Loss
from ...training import CannotTrain
from ..blocks import Block
from .neighbours import Neighbours
from .variable import Cut

Start = Callable[[int, Tensor], Cut]
"""(number of a block, what the block below gave) -> the variable on that block's input."""


@dataclass(frozen=True)
class Penalties:
    """What a visit needs to know of the recipe. beta: that of the cut on the input of each block, by block number."""

    beta: list[float | Tensor]
    alpha_beta: float
    local_steps: int
    dual_step: float
    keep_graphs: bool
    linear: bool
    objective: Loss
    num_blocks: int
    lowest: int
    """The first block of all that learns: nothing below it is visited."""

    def alpha(self, number: int) -> float | Tensor:
        return self.alpha_beta / self.beta[number]


@dataclass
class Seen:
    """What the visits of a step leave behind: the outputs of the deployed network (where the last block is here), and
    the terms of the augmented Lagrangian as they were when their block was visited, a sample."""

    outputs: Tensor | None = None
    lagrangian: dict[int, Tensor] = field(default_factory=dict)
    directions: dict[int, list[Tensor]] | None = None
    """Sums of the gradients given to each block's optimiser; None: not recorded."""


class Sweep:
    """One mini-batch at work in consecutive blocks, those of this rank. x: the rows; y: their labels."""

    def __init__(
        self, blocks: Sequence[Block], penalties: Penalties, neighbours: Neighbours, x: Tensor, y: Tensor
    ) -> None:
        self._blocks, self._penalties, self._neighbours = blocks, penalties, neighbours
        self._x, self.y, self._n = x, y, len(x)
        self._given: dict[int, Tensor] = {}  # what each block gave last, by its number
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        self.cuts: dict[int, Cut] = {}
        self.residuals: dict[int, Tensor] = {}
        self.seen = Seen()
        self._watched = any(isinstance(beta, Tensor) for beta in penalties.beta)  # penalties that change
        self._lowest = penalties.lowest
        self._from_above: tuple[Tensor | None, float | Tensor] = (None, 1.0)

    # -- evaluations ----------------------------------------------------------------------------------------------

    def start(self, begin: Start) -> None:
        """Pass the rows through the blocks; `begin` says where each variable starts."""
        for block in self._blocks:
            self.forward(block, begin)

    def refresh(self) -> None:
        """Pass each block's own input through it again, after the weights have moved; the duals follow."""
        for block in self._blocks:
            if not self._is_last(block) and block.number >= self._lowest:
                self._evaluate(block)
        if not self._is_last(self._blocks[-1]):
            self._neighbours.up(self._given[self._blocks[-1].number])
        for number, cut in self.cuts.items():
            if number > self._lowest:
                if number == self._blocks[0].number:
                    self.take_from_below()
                self.residuals[number] = cut.refresh(self._given[number - 1], self._penalties.dual_step)

    def forward(self, block: Block, begin: Start) -> None:
        """Pass what the block below gave through this one; the last one waits for its visit."""
        if block.number > 0:
            if block.number - 1 not in self._given:
                self.take_from_below()
            self.cuts[block.number] = cut = begin(block.number, self._given[block.number - 1])
            cut.watched = self._watched or self.seen.directions is not None
        if not self._is_last(block):
            self._evaluate(block)
            if block is self._blocks[-1]:
                self._neighbours.up(self._given[block.number])

    def _evaluate(self, block: Block) -> Tensor:
        if self._penalties.keep_graphs and not block.prox and block.number >= self._lowest:
            self._graphs[block.number] = self._graph(block)
            out = self._graphs[block.number][1].detach()
        else:
            with torch.no_grad():
                out = block(self._input(block))
        self._given[block.number] = out
        return out

    def _input(self, block: Block) -> Tensor:
        return self.cuts[block.number].x if block.number in self.cuts else self._x

    def _graph(self, block: Block) -> tuple[Tensor, Tensor]:
        """(input, output) of the block, where the input is a leaf if what lies below learns."""
        x = self._input(block).detach()
        if block.number > self._lowest and not block.prox:
            x.requires_grad_()
        with torch.enable_grad():
            return x, block(x)

    # -- the network as it is deployed --------------------------------------------------------------------------------

    def backpropagate(self) -> tuple[Tensor | None, dict[int, list[Tensor]]]:
        """(outputs, gradient of the mean objective by block) of the present weights; nothing moves.

        Block by block, so that it takes no more memory than a sweep. Nothing is known below a layer without a
        derivative; the outputs are known where the last block is."""
        inputs, h = {}, self._x if self._blocks[0].number == 0 else self._neighbours.from_below(self._n)
        for block in self._blocks:
            inputs[block.number] = h
            with torch.no_grad():
                h = block(h)
        outputs, g, true = None, None, {}
        if self._is_last(self._blocks[-1]):
            outputs = h
        else:
            self._neighbours.up(h)
            g, _ = self._neighbours.from_above(self._n)
        for block in reversed(self._blocks):
            if block.number < self._lowest or (g is None and not self._is_last(block)):
                continue
            if block.prox:
                g = None
                continue
            x = inputs[block.number].detach().requires_grad_(block.number > self._lowest)
            with torch.enable_grad():
                out = block(x)
                out = self._penalties.objective(out, self.y) if self._is_last(block) else out
            true[block.number], g = self._gradients(block, out, x, g)
        if self._blocks[0].number > 0:
            self._neighbours.down(g, 1.0)
        return outputs, true

    # -- visits ---------------------------------------------------------------------------------------------------

    def backward(self, *, release: bool = False) -> None:
        """Visit the blocks from the last to the first; each hands its new target down at once.

        release: let each variable go when nothing in this sweep needs it any more."""
        self.take_from_above()
        for block in reversed(self._blocks):
            self.visit(block)
            if release:
                self.cuts.pop(block.number + 1, None)
                self._given.pop(block.number, None)
        self.hand_down()

    def jacobi(self) -> None:
        """Visit all blocks with the targets of before: the blocks of other ranks do the same meanwhile."""
        self.hand_down()
        self.take_from_above()
        for block in self._blocks:  # upwards, so that no visit sees a target of this sweep
            self.visit(block)

    def take_from_below(self) -> None:
        """Receive what the block below this rank's gives."""
        self._given[self._blocks[0].number - 1] = self._neighbours.from_below(self._n)

    def take_from_above(self) -> None:
        """Receive the target of this rank's last block, if there are blocks above."""
        if not self._is_last(self._blocks[-1]):
            self._from_above = self._neighbours.from_above(self._n)

    def hand_down(self) -> None:
        """Send the block below this rank's its target."""
        number = self._blocks[0].number
        if number > 0:
            self._neighbours.down(self.cuts[number].reach, self._penalties.beta[number])

    def visit(self, block: Block) -> None:
        """Move the block's input variable, then its weights."""
        if block.number < self._lowest:
            return
        if self._is_last(block):
            self._visit_last(block)
            return
        reach, beta = self._target(block)
        self._note(block, reach, beta)
        if reach is None:  # no signal has come down yet
            self._graphs.pop(block.number, None)
            self._idle(block)
            return
        if block.prox:
            self._visit_prox(block, reach, beta)
            return
        x, out = self._graphs.pop(block.number) if block.number in self._graphs else self._graph(block)
        gradients, g = self._gradients(block, out, x, reach * (-beta / self._n))
        origin = out.detach() if self._penalties.local_steps > 1 else None
        del out
        self._move_input(block, g)
        self._move_weights(block, gradients)
        for _ in range(self._penalties.local_steps - 1):
            assert origin is not None
            self._repeat(block, x.detach(), origin, reach, beta)

    def _visit_last(self, block: Block) -> None:
        objective = self._penalties.objective
        x, out = self._graph(block)
        if self.seen.outputs is None:
            self.seen.outputs = out.detach()
        loss = objective(out, self.y)
        self.seen.lagrangian[block.number] = loss.detach()
        gradients, g = self._gradients(block, loss, x, None)
        del out, loss
        self._move_input(block, g)
        self._move_weights(block, gradients)
        for _ in range(self._penalties.local_steps - 1):
            with torch.enable_grad():
                loss = objective(block(x.detach()), self.y)
            gradients, _ = self._gradients(block, loss, None, None)
            self._move_weights(block, gradients)

    def _repeat(self, block: Block, x: Tensor, origin: Tensor, reach: Tensor, beta: float | Tensor) -> None:
        """One more step of the weights towards the same target, `reach` away from `origin`."""
        if block.optimizer is None:
            return
        with torch.enable_grad():
            out = block(x)
        residual = (out.detach() - origin).sub_(reach)
        gradients, _ = self._gradients(block, out, None, residual.mul_(beta / self._n))
        self._move_weights(block, gradients)

    def _visit_prox(self, block: Block, reach: Tensor, beta: float | Tensor) -> None:
        given, x = self._given[block.number], self._input(block).detach()
        if block.number > self._lowest:
            cut = self.cuts[block.number]
            v = cut.f if cut.u is None else cut.f + cut.u
            below = self._penalties.beta[block.number]
            a = block.prox_input(v, given, reach, below, beta, linear=self._penalties.linear)
            cut.put(a - cut.f)
        for _ in range(self._penalties.local_steps):
            self._repeat(block, x, given, reach, beta)

    def _gradients(
        self, block: Block, out: Tensor, x: Tensor | None, seed: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The gradients of the block's parameters, and of its input where that is asked for."""
        wanted: list[Tensor] = list(block.parameters)
        below = x is not None and x.requires_grad
        if below:
            assert x is not None
            wanted.append(x)
        if not wanted:
            return [], None
        found = torch.autograd.grad(out, wanted, seed, allow_unused=True) if out.requires_grad else (None,)
        if any(one is None for one in found):
            names = [*(name for name, one in block.module.named_parameters() if one.requires_grad), "its input"]
            missing = next(name for name, one in zip(names, [*found, None], strict=False) if one is None)
            raise CannotTrain(
                f"no derivative reaches {missing} of block {block.number}; give the layer without a derivative a "
                "prox_input (as piecework.nn.Sign has), freeze what lies below it, or cut behind it"
            )
        kept = [one for one in found if one is not None]
        return (kept[:-1], kept[-1]) if below else (kept, None)

    def _move_input(self, block: Block, g: Tensor | None) -> None:
        if g is not None:
            number = block.number
            penalties = self._penalties
            self.cuts[number].gradient_step(g * self._n, penalties.alpha(number), penalties.beta[number])

    def _move_weights(self, block: Block, gradients: list[Tensor]) -> None:
        if block.optimizer is None:
            return
        if self.seen.directions is not None:
            before = self.seen.directions.get(block.number)
            self.seen.directions[block.number] = (
                [one.clone() for one in gradients]
                if before is None
                else [old + one for old, one in zip(before, gradients, strict=True)]
            )
        block.step(gradients)

    def _idle(self, block: Block) -> None:
        """A block without a target: its variable only goes back towards what the block below gives."""
        cut = self.cuts.get(block.number)
        if cut is not None and cut.reach is not None and not block.prox:
            beta = self._penalties.beta[block.number]
            cut.gradient_step(torch.zeros_like(cut.f), self._penalties.alpha(block.number), beta)

    def _target(self, block: Block) -> tuple[Tensor | None, float | Tensor]:
        above = self.cuts.get(block.number + 1)
        return self._from_above if above is None else (above.reach, self._penalties.beta[block.number + 1])

    def _note(self, block: Block, reach: Tensor | None, beta: float | Tensor) -> None:
        if self.seen.directions is None or reach is None:
            return
        u = self.cuts[block.number + 1].u if block.number + 1 in self.cuts else None
        square = reach.square().sum() - (0 if u is None else u.square().sum())
        self.seen.lagrangian[block.number] = square * (beta / (2 * self._n))

    def state_dict(self) -> dict[str, Any]:
        """What is under way, as tensors and plain values; graphs are not kept."""
        cuts = {
            str(number): {name: value.clone() for name, value in vars(cut).items() if isinstance(value, Tensor)}
            | {"watched": cut.watched}
            for number, cut in self.cuts.items()
        }
        reach, beta = self._from_above
        steps = self.seen.directions
        return {
            "x": self._x.clone(),
            "y": self.y.clone(),
            "given": {str(number): value.clone() for number, value in self._given.items()},
            "cuts": cuts,
            "reach": None if reach is None else reach.clone(),
            "beta": float(beta),
            "directions": None
            if steps is None
            else {str(number): [one.clone() for one in found] for number, found in steps.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`, on a sweep of the same rows."""
        self._given = {int(number): value for number, value in state["given"].items()}
        self.cuts = {int(number): Cut(**found) for number, found in state["cuts"].items()}
        self._from_above = (state["reach"], state["beta"])
        steps = state["directions"]
        self.seen.directions = None if steps is None else {int(number): list(found) for number, found in steps.items()}

    def _is_last(self, block: Block) -> bool:
        return block.number == self._penalties.num_blocks - 1
