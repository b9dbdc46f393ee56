"""The step: solve, try, accept or raise the damping; and its variant on sampled rows with momentum."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...training import BadInput, Batch, DidNotSolve, Metrics
from .choice import DAMPING, DIRECT, Choice, Linearised
from .elimination import eliminate_, output_layer
from .objective import Evaluation, LeastSquares, Point
from .sampled import SampledSteps
from .systems import Direction

if TYPE_CHECKING:
    from . import GaussNewton

GEODESIC_PROBE = 0.1
"""Of the step: how far the residuals are looked at for their second derivative."""
GEODESIC_LIMIT = 0.75
"""Of 2 |a| / |d|: where the correction is longer, the quadratic model of the path is not to be trusted."""
HIDDEN = 30.0
"""Roundings of the outputs below which their bend is not to be seen."""
LEAST_DAMPING = {torch.float64: 1e-18, torch.float32: 1e-12}
"""Relative to the mean diagonal of K."""
MOST_DAMPING = 1e18
"""Relative too: a step is then less than rounding, and stalls one after the other do not overflow."""
DEAR_RETRIES = ("cg", "rpchol", "nystrom", "kfac")
"""Solvers for which a damping that proves too small costs many products."""
CAREFUL_DAMPING = 30.0
"""Relative damping at the start for those."""


class LevenbergMarquardt:
    """Gauss-Newton steps on all rows; each ends where the loss is lower, or says that it stalled."""

    data: Literal["shard", "same"] = "shard"
    batches: Literal["mini", "full"] = "full"
    deterministic = True

    def __init__(self, recipe: GaussNewton, objective: LeastSquares) -> None:
        self.model, self.group = objective.model, objective.group
        self.words: dict[str, str] = {}
        self._recipe, self._objective = recipe, objective
        self._choice = Choice(recipe, objective)
        self._step = 0
        self._damping: float | None = None  # a row: the system's is this times their number
        self._growth = 2.0  # nu of Nielsen's rule
        self._contraction = 1.0  # of |s| in the last step that was taken
        self._known: _Known | None = None
        self._sampled = SampledSteps(recipe, objective, self._choice)
        self._output = output_layer(objective) if recipe.eliminate_output else None

    # -- the step ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> Metrics:
        recipe = self._recipe
        if recipe.sample_rows is not None and (recipe.sample_steps is None or self._step < recipe.sample_steps):
            figures, solver = self._sampled.step(batch, self._step)
            self._step, self._known, self.words = self._step + 1, None, {"solver": solver}
            return _metrics(figures)
        start = self._start(batch)
        began = time.perf_counter()
        damping = None if self._damping is None else self._damping * start.at.rows
        made = self._choice.linearise(start, damping, step=self._step, tolerance=self._tolerance())
        if damping is None:
            usual = CAREFUL_DAMPING if made.estimate.solver in DEAR_RETRIES else DAMPING
            self._damping = (recipe.damping or usual) * made.unit / start.at.rows
        end, figures = self._search(start, made)
        self._known = _Known(batch, _versions(batch), self._objective.weights, end)
        self._step, self.words = self._step + 1, {"solver": made.estimate.solver}
        assert self._damping is not None
        return _metrics({
            "loss": end.loss,
            "damping": self._damping * end.rows / made.unit if made.unit > 0 else 0.0,
            **figures,
            "predicted_seconds": made.estimate.seconds,
            "solve_seconds": time.perf_counter() - began,
        })  # fmt: skip

    def _start(self, batch: Batch) -> Point:
        if self._known is not None and self._known.holds(batch, self._objective.weights):
            return self._objective.point(batch, self._known.at)
        start = self._objective.point(batch)
        if not math.isfinite(start.at.total):
            raise DidNotSolve(
                "the loss at the start is not finite: the network's outputs, or their residuals, overflow; scale the "
                "features or the start weights down"
            )
        return start

    def _tolerance(self) -> float:
        """Of the linear system: it need not be solved better than steps contract."""
        return max(1e-8, 0.1 * self._contraction)

    def _search(self, start: Point, made: Linearised) -> tuple[Evaluation, dict[str, float]]:
        """Raise the damping until a step is taken; the model is at its end, or where it was."""
        objective, rows = self._objective, start.at.rows
        least = LEAST_DAMPING.get(objective.dtype, 1e-8) * made.unit / rows
        most = MOST_DAMPING * made.unit / rows
        rejected, solves, decay = 0, 0, objective.decay(rows)
        pulls = objective.pulls(start)
        assert self._damping is not None
        while True:
            damping = max(self._damping, least) * rows
            direction = made.system.solve(start.s, damping, pulls)
            solves += direction.solved.iterations
            end, ratio = self._try(start, made, direction, damping + decay)
            taken = end is not None and (ratio > 0 or not self._recipe.adapt)
            rejected += not taken
            if taken or not self._recipe.adapt or rejected > self._recipe.max_retries:
                break
            self._damping = min(max(self._damping, least) * self._growth, most)
            self._growth *= 2
        self._growth = 2.0
        if end is None or not taken:
            end = start.at
            objective.move_(start.weights)
        elif self._recipe.adapt:
            self._damping = max(least, self._damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3))  # (4)
        if taken:
            # A loss of the user's own may be negative, and then says nothing of |s|.
            before = start.at.total
            self._contraction = math.sqrt(end.total / before) if before > 0 and end.total >= 0 else 1.0
        self._choice.note(made, direction.solved.iterations, damping + decay)
        dimension = made.system.effective_dimension(damping + decay)
        return end, {
            "gain_ratio": ratio,
            "rejected": float(rejected),
            "iterations": float(solves),
            "linear_residual": direction.solved.residual,
            **({} if dimension is None else {"effective_dimension": dimension}),
            "stalled": float(not taken),
        }

    def _try(
        self, start: Point, made: Linearised, direction: Direction, damping: float
    ) -> tuple[Evaluation | None, float]:
        """Move the model along the direction, corrected: what the loss is there, and how much of its promised fall it
        fell; None and nan for a direction that is not worth a trial. damping: with weight decay."""
        objective = self._objective
        promised = objective.promised(start, direction.step, direction.moved)
        if not math.isfinite(promised) or not promised > 0 or not bool(direction.step.isfinite().all()):
            return None, math.nan
        weights = start.weights.double() - direction.step.double()
        if self._geodesic(made):
            correction = self._correction(start, made, direction, damping)
            if correction is not None:
                weights = weights + correction
            elif self._recipe.adapt:
                return None, math.nan
        objective.move_(weights.to(objective.dtype))
        if self._output is not None:
            eliminate_(objective, start.batch, self._output, start.at.rows)
        end = objective.evaluate(start.batch)
        return end, (start.at.total - end.total) / promised if math.isfinite(end.total) else math.nan

    def _geodesic(self, made: Linearised) -> bool:
        asked = self._recipe.geodesic
        return made.estimate.solver in DIRECT if asked is None else asked

    def _correction(self, start: Point, made: Linearised, direction: Direction, damping: float) -> Tensor | None:
        """a of (3), (P,); None where it is too long; 0 where rounding hides it.

        s_dd by one more forward pass at a tenth of the step (Transtrum and Sethna, section 3)."""
        objective, h = self._objective, GEODESIC_PROBE
        objective.move_((start.weights.double() - h * direction.step.double()).to(objective.dtype))
        there = objective.evaluate(start.batch)
        change = objective.root_t(start, there.z - start.at.z)
        bend = (change + h * direction.moved) * (2 / h**2)
        sizes = torch.stack([bend.double().square().sum(), start.at.z.double().square().sum()])
        self.group.sum_(sizes)
        size, scale = sizes.sqrt().tolist()
        if not math.isfinite(size):
            return None
        if size * h**2 / 2 < HIDDEN * torch.finfo(objective.dtype).eps * scale:
            return torch.zeros_like(direction.step, dtype=torch.float64)
        correction = -0.5 * made.system.solve(bend, damping).step.double()
        length = float(torch.linalg.vector_norm(direction.step.double()))
        if not 2 * float(torch.linalg.vector_norm(correction)) <= GEODESIC_LIMIT * length:
            return None
        return correction

    # -- the contract --------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "damping": -1.0 if self._damping is None else self._damping,
            "growth": self._growth,
            "contraction": self._contraction,
            "choice": self._choice.state(),
            "sampled": self._sampled.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "choice" not in state:
            raise BadInput("this state is not of gauss-newton: it has no choice of a solver")
        self._step, self._growth = int(state["step"]), float(state["growth"])
        self._damping = None if float(state["damping"]) < 0 else float(state["damping"])
        self._contraction = float(state["contraction"])
        self._choice.go_on(state["choice"])
        self._sampled.go_on(state["sampled"])
        self._known = None


@dataclass(frozen=True, eq=False)
class _Known:
    """Where the step before ended: the rows, as they were then, and the weights (P,). Every rank has the same tensors
    again, or every rank new ones."""

    batch: Batch
    versions: tuple[int, int]
    weights: Tensor
    at: Evaluation

    def holds(self, batch: Batch, weights: Tensor) -> bool:
        same = self.batch.x is batch.x and self.batch.y is batch.y and self.versions == _versions(batch)
        return same and torch.equal(self.weights, weights)


def _versions(batch: Batch) -> tuple[int, int]:
    """They count what is done to a tensor in place."""
    x, y = (0 if tensor.is_inference() else tensor._version for tensor in (batch.x, batch.y))
    return x, y


def _metrics(values: Mapping[str, float]) -> Metrics:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
