"""Blocks that never wait: each works on another mini-batch.

Batch b is passed forward through block t = 1..T on tick b + t and visited there on tick b + 2T - t; in between the
weights of block t have moved up to 2 (T - t) times. A tick is a step. What comes down is a displacement: it is applied
to what the block gives by then. The schedule is that of pipelined backpropagation without stashed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...training import Batch, Metrics
from .bench import Bench
from .probe import cosine, figures
from .sweep import Sweep
from .variable import Cut


class Pipeline:
    """One forward pass and one visit a block and tick, each of another mini-batch."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._blocks = bench, bench.blocks
        self._last = bench.penalties.num_blocks - 1
        self._flying: dict[int, Sweep] = {}
        self._true: dict[int, dict[int, list[Tensor]]] = {}

    def advance(self, batch: Batch, step: int) -> Metrics:
        """A tick; the batch enters the pipe."""
        now, last = step, self._last
        for block in self._blocks:
            block.begin(now)
        sweep = self._sweep(batch.x, batch.y)
        self._flying[now] = sweep
        if self._bench.probing(now):
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
                metrics["loss"] = self._bench.loss(outputs, self._flying[coming].y).detach()
        if self._bench.group.size == 1 and "loss" not in metrics:  # the pipe is filling
            metrics["loss"] = self._loss_now(batch, now)
        self._pass_on(now)
        if (done := now - 2 * last) >= 0:
            metrics |= self._finished(done)
        return metrics

    def _sweep(self, x: Tensor, y: Tensor) -> Sweep:
        return Sweep(self._blocks, self._bench.penalties, self._bench.neighbours, x, y)

    def _loss_now(self, batch: Batch, now: int) -> Tensor:
        h = batch.x
        with torch.no_grad():
            for block in self._blocks:
                block.begin(now, again=True)
                h = block(h)
            return self._bench.loss(h, batch.y)

    def _pass_on(self, now: int) -> None:
        """What the neighbours sent on this tick is there for the next one."""
        last = self._last
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
        return {
            "cosine": cosine(sweep.seen.directions, true, self._bench.group),
            **figures(sweep, self._bench.penalties.beta),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "flying": {str(number): sweep.state_dict() for number, sweep in self._flying.items()},
            "true": {
                str(number): {str(block): [one.clone() for one in found] for block, found in true.items()}
                for number, true in self._true.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._flying = {}
        for number, found in state["flying"].items():
            sweep = self._sweep(found["x"], found["y"])
            sweep.load_state_dict(found)
            self._flying[int(number)] = sweep
            self._bench.neighbours.learn(found["x"])
        self._true = {
            int(number): {int(block): list(found) for block, found in true.items()}
            for number, true in state["true"].items()
        }
