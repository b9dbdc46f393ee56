"""Steps on sampled rows with momentum (SPRING: Goldshlager, Abrahamsen, Lin, arXiv 2401.10190, equations 14 and 15).

    phi_t = mu phi_{t-1} + J^T (K + damping I)^-1 (s - mu J phi_{t-1})
    theta <- theta - lr_t phi_t / (1 - mu^{2t})^(1/2)

phi_t is the minimum of |J phi - s|^2 + damping |phi - mu phi_{t-1}|^2 over the sampled rows.

Differs from the paper
1. The damping is relative to the mean diagonal of K of each sample, so that a smaller last one is treated alike. It is
   raised where the loss on the sample rises or falls by less than a quarter of what is promised, and eased again. A
   step that is taken back is tried again without momentum, so that more damping makes it short.
2. Without momentum, the default, large steps are possible: the rate starts at 1, is held or not, and falls linearly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...batches import MiniBatches
from ...group import Group
from ...training import BadInput, Batch, DidNotSolve
from .choice import DAMPING, Choice, Linearised
from .jacobian import Jacobian
from .kronecker import LayerFactors
from .objective import LeastSquares, Point
from .systems import Pull

if TYPE_CHECKING:
    from . import GaussNewton

RAISE, EASE = 3.0, 2.0
"""Factors of the damping after a step that the sample refutes, and after one that it confirms."""
MOST_RAISE = 1e12
"""In units of the recipe's damping."""


class SampledSteps:
    """SPRING at work: the previous step, how far the damping is raised, and which rows come next."""

    def __init__(self, recipe: GaussNewton, objective: LeastSquares, choice: Choice) -> None:
        self._recipe, self._objective, self._choice = recipe, objective, choice
        self._sampler: Sampler | None = None
        self._layers = LayerFactors()
        self._phi: Tensor | None = None
        self._raised = 1.0

    def step(self, batch: Batch, number: int) -> tuple[dict[str, float], str]:
        """Move the model; the figures of step 0, 1, ... and the solver that it took. Collective."""
        point, jacobian = self._here(self._rows(batch, number))
        if not math.isfinite(point.at.total):
            raise DidNotSolve(
                f"the loss is not finite at step {number}: a step on a sample was too long; raise damping or "
                "sample_rows, or lower lr"
            )
        made = self._choice.linearise(point, None, step=number, tolerance=1.0, jacobian=jacobian, layers=self._layers)
        began = time.perf_counter()
        figures = self._search(point, made, number)
        return {
            "loss": point.at.loss,
            **figures,
            "predicted_seconds": made.estimate.seconds,
            "solve_seconds": time.perf_counter() - began,
        }, made.estimate.solver

    def _here(self, rows: Batch) -> tuple[Point, Jacobian | None]:
        """The sample's point, and its Jacobian where its factors fit into memory."""
        objective, sample_rows = self._objective, self._recipe.sample_rows
        assert sample_rows is not None
        if self._choice.has_room(objective.plan(rows), sample_rows):
            return objective.linearised(rows)
        return objective.point(rows), None

    def _rows(self, batch: Batch, number: int) -> Batch:
        recipe, objective = self._recipe, self._objective
        assert recipe.sample_rows is not None
        if self._sampler is None or self._sampler.batch is not batch:
            total = torch.tensor([len(batch)], dtype=torch.float64)
            objective.group.sum_(total)
            self._sampler = Sampler(
                batch,
                int(total),
                objective.group,
                rows=recipe.sample_rows,
                outputs=objective.plan(batch).num_outputs,
                seed=recipe.seed,
            )
        return self._sampler.rows(number)

    def _search(self, point: Point, made: Linearised, number: int) -> dict[str, float]:
        """Take the step, where the recipe adapts with a damping at which the loss of the sample falls."""
        objective, recipe, mu = self._objective, self._recipe, self._recipe.momentum
        before = mu * self._phi if mu and self._phi is not None else None
        pulls = objective.pulls(point)
        lr = rate(number, recipe.lr, recipe.sample_steps, recipe.hold)
        rejected, ratio = 0, math.nan
        while True:
            damping = self._raised * (recipe.damping or DAMPING) * made.unit
            if before is None:
                direction = made.system.solve(point.s, damping, pulls)
            else:
                direction = made.system.solve(point.s, 0.0, [Pull(damping, before), *pulls])
            length = lr * unbiased(mu, number + 1)
            objective.move_((point.weights.double() - length * direction.step.double()).to(objective.dtype))
            if recipe.adapt:
                ratio = self._ratio(point, length * direction.step, length * direction.moved)
            if ratio > 0 or not recipe.adapt:
                self._phi = direction.step if mu else None
                break
            self._raised, before = min(MOST_RAISE, self._raised * RAISE), None
            rejected += 1
            if rejected > recipe.max_retries:
                objective.move_(point.weights)
                self._phi = None
                break
        if ratio > 0.75:
            self._raised = max(1.0, self._raised / EASE)
        elif 0 < ratio < 0.25:
            self._raised = min(MOST_RAISE, self._raised * RAISE)
        self._choice.note(made, direction.solved.iterations, damping + objective.decay(point.at.rows))
        return {
            "damping": damping / made.unit if made.unit > 0 else 0.0,
            **({"gain_ratio": ratio} if recipe.adapt else {}),
            "rejected": float(rejected),
            "iterations": float(direction.solved.iterations),
            **({} if math.isnan(direction.solved.residual) else {"linear_residual": direction.solved.residual}),
        }

    def _ratio(self, point: Point, step: Tensor, moved: Tensor) -> float:
        """The fall of the sample's loss over the promised one; nan where either is not to be had."""
        promised = self._objective.promised(point, step, moved)
        there = self._objective.evaluate(point.batch)
        return (point.at.total - there.total) / promised if promised > 0 and math.isfinite(there.total) else math.nan

    def state(self) -> dict[str, Any]:
        phi = {} if self._phi is None else {"phi": self._phi.clone()}
        return {"raised": self._raised, "layers": self._layers.state(), **phi}

    def go_on(self, state: Mapping[str, Any]) -> None:
        self._raised, phi = float(state["raised"]), state.get("phi")
        self._layers.go_on(state["layers"], self._objective.device)
        self._phi = None if phi is None else phi.to(self._objective.device, self._objective.dtype, copy=True)


class Sampler:
    """This rank's part of the rows of each step: mini-batches without replacement, in an order of its own."""

    def __init__(self, batch: Batch, total: int, group: Group, *, rows: int, outputs: int, seed: int) -> None:
        if rows < outputs:
            raise BadInput(
                f"gauss-newton: sample_rows={rows} is fewer rows than the network has outputs ({outputs}): no step "
                "would see every class; raise it"
            )
        self.batch = batch
        own = max(1, round(rows * len(batch) / max(1, total)))
        self._mini = (
            MiniBatches(batch, data="same", rank=0, size=1, batch_size=own, seed=seed + 7919 * group.rank)
            if len(batch)
            else None
        )

    def rows(self, step: int) -> Batch:
        """Of step 0, 1, ..."""
        return self.batch if self._mini is None else self._mini.batch(step)


def rate(step: int, lr: float, steps: int | None, hold: float = 0.0) -> float:
    """lr_t of step 0, 1, ...: constant, or for a part `hold` of the steps, and then falling linearly to nothing."""
    return lr if steps is None else lr * max(0.0, min(1.0, (1 - step / steps) / (1 - hold)))


def unbiased(momentum: float, step: int) -> float:
    """What takes the bias of its start at 0 from phi; step counts from 1."""
    return (1 - momentum ** (2 * step)) ** -0.5 if momentum else 1.0
