"""Sweeps over one mini-batch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...training import Batch, Metrics
from .bench import Bench
from .memory import Memory, OfClasses, OfSamples, Stateless
from .probe import balanced, cosine, figures
from .sweep import Sweep

if TYPE_CHECKING:
    from . import BlockADMM


class Sweeps:
    """`sweeps` sweeps over each mini-batch, backward or all blocks at once."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._recipe, self._penalties = bench, bench.recipe, bench.penalties
        self._memory = _memory(bench.recipe)

    def advance(self, batch: Batch, step: int) -> Metrics:
        """Work through a mini-batch."""
        bench, penalties = self._bench, self._penalties
        for block in bench.blocks:
            block.begin(step)
        sweep = Sweep(bench.blocks, penalties, bench.neighbours, batch.x, batch.y)
        probing = bench.probing(step)
        if probing:
            sweep.seen.directions = {}
        sweep.start(lambda number, f: self._memory.begin(number, f, batch, penalties.beta[number]))
        true = None
        if probing or self._recipe.mode == "batch":
            sweep.seen.outputs, true = sweep.backpropagate()
        for number in range(self._recipe.sweeps):
            if number > 0:
                sweep.refresh()
                self._balance(sweep)
            if self._recipe.order == "jacobi":
                sweep.jacobi()
            else:
                done = number == self._recipe.sweeps - 1 and isinstance(self._memory, Stateless) and not probing
                sweep.backward(release=done)
        for number, cut_ in sweep.cuts.items():
            self._memory.end(number, cut_, batch, penalties.beta[number])
        metrics: Metrics = {}
        if sweep.seen.outputs is not None:
            metrics["loss"] = bench.loss(sweep.seen.outputs, batch.y).detach()
        if probing:
            assert true is not None
            metrics |= self._probed(sweep, true)
        return metrics

    def _probed(self, sweep: Sweep, true: dict[int, list[Tensor]]) -> Metrics:
        assert sweep.seen.directions is not None
        terms = [term.double().cpu() for term in sweep.seen.lagrangian.values()]
        lagrangian = torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)
        self._bench.group.sum_(lagrangian)
        return {
            "cosine": cosine(sweep.seen.directions, true, self._bench.group),
            "lagrangian": lagrangian,
            **figures(sweep, self._penalties.beta),
        }

    def _balance(self, sweep: Sweep) -> None:
        if not self._recipe.balance:
            return
        for number, residual in sweep.residuals.items():
            beta = self._penalties.beta[number]
            assert isinstance(beta, Tensor)
            self._penalties.beta[number] = balanced(sweep.cuts[number], residual, beta)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.load_state_dict(state["memory"])


def _memory(recipe: BlockADMM) -> Memory:
    if recipe.mode == "batch":
        return OfSamples(1.0, recipe.dual_step, variables=True)
    if recipe.dual_memory == "sample":
        return OfSamples(recipe.dual_decay, recipe.dual_step, variables=False)
    if recipe.dual_memory == "class":
        return OfClasses(recipe.dual_decay, recipe.dual_step)
    return Stateless()
