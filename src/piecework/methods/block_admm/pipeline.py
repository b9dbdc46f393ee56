"""Blocks that never wait: each works on another mini-batch.

Batch b is passed forward through block t = 1..T on tick b + t and visited there on tick b + 2T - t; in between the
weights of block t have moved up to 2 (T - t) times. A tick is a step. What comes down is a displacement: it is applied
to what the block gives by then. The schedule is that of pipelined backpropagation without stashed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...group import Group
from ...losses import Loss
from ...training import Batch, Metrics
from .at_work import BlocksAtWork
from .block import Cut
from .probe import cosine, figures
from .sweep import Sweep

if TYPE_CHECKING:
    from . import BlockADMM


class Pipelined(BlocksAtWork):
    """One forward pass and one visit a block and tick, each of another mini-batch."""

    def __init__(self, recipe: BlockADMM, model: nn.Module, loss: Loss, group: Group) -> None:
        super().__init__(recipe, model, loss, group)
        self._flying: dict[int, Sweep] = {}
        self._true: dict[int, dict[int, list[Tensor]]] = {}

    def _advance(self, batch: Batch) -> Metrics:
        now, last = self._step, self._penalties.num_blocks - 1
        for block in self._blocks:
            block.begin(now)
        sweep = Sweep(self._blocks, self._penalties, self._neighbours, batch.x, batch.y)
        self._flying[now] = sweep
        if self._recipe.probe_every > 0 and now % self._recipe.probe_every == 0:
            for block in self._blocks:
                block.begin(now, again=True)
            sweep.seen.directions = {}
            _, self._true[now] = sweep.backpropagate()
        metrics: Metrics = {}
        for block in self._blocks:
            coming, going = now - block.number, now - 2 * last + block.number
            if coming >= 0:
                block.begin(coming)
                self._flying[coming].forward(block, lambda number, f: Cut(f))
            if going >= 0:
                block.begin(going, again=block.number < last)
                self._flying[going].visit(block)
            if block.number == last and coming >= 0:
                outputs = self._flying[coming].seen.outputs
                assert outputs is not None
                metrics["loss"] = self._loss(outputs, self._flying[coming].y).detach()
        if self.group.size == 1 and "loss" not in metrics:  # the pipe is filling
            metrics["loss"] = self._loss_now(batch)
        self._pass_on()
        if (done := now - 2 * last) >= 0:
            metrics |= self._finished(done)
        return metrics

    def _loss_now(self, batch: Batch) -> Tensor:
        h = batch.x
        with torch.no_grad():
            for block in self._blocks:
                block.begin(self._step, again=True)
                h = block(h)
            return self._loss(h, batch.y)

    def _pass_on(self) -> None:
        """What the neighbours sent on this tick is there for the next one."""
        now, last = self._step, self._penalties.num_blocks - 1
        lowest, highest = self._blocks[0].number, self._blocks[-1].number
        if lowest > 0:
            if (visited := now - 2 * last + lowest) >= 0:
                self._flying[visited].hand_down()
            if (sent := now - lowest + 1) >= 0:
                self._flying[sent].take_from_below()
        if highest < last and (coming := now - 2 * last + highest + 1) >= 0:
            self._flying[coming].take_from_above()

    def _finished(self, number: int) -> Metrics:
        sweep, true = self._flying.pop(number), self._true.pop(number, None)
        if true is None:
            return {}
        assert sweep.seen.directions is not None
        return {"cosine": cosine(sweep.seen.directions, true, self.group), **figures(sweep, self._penalties.beta)}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "flying": {str(number): sweep.state_dict() for number, sweep in self._flying.items()},
            "true": {
                str(number): {str(block): [one.clone() for one in found] for block, found in true.items()}
                for number, true in self._true.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._flying = {}
        for number, found in state["flying"].items():
            x, y = (found[name].to(self._device) for name in ("x", "y"))
            sweep = Sweep(self._blocks, self._penalties, self._neighbours, x, y)
            sweep.load_state_dict(found)
            self._flying[int(number)] = sweep
            self._neighbours.learn(x)
        self._true = {
            int(number): {int(block): list(found) for block, found in true.items()}
            for number, true in state["true"].items()
        }


__all__ = ["Pipelined"]
