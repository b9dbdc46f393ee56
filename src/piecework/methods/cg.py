"""Polak, Ribière (1969) with Powell's beta >= 0: Gilbert, Nocedal, SIAM J. Optimization 2 (1992), section 4 (PR+).

Problem: the mean loss f over all rows of all ranks. With g_t the gradient at the weights w_t,

    b_t = max(0, g_t'(g_t - g_{t-1}) / g_{t-1}'g_{t-1})                                                     (1)
    d_t = -g_t + b_t d_{t-1}                                                                                (2)
    w_{t+1} = w_t + a d_t     a: strong Wolfe, f(w + a d) <= f + c1 a g'd and |g(w + a d)'d| <= c2 |g'd|      (3)

(3) is algorithms 3.5 and 3.6 of Nocedal, Wright: Numerical Optimization, 2nd edition, 2006, with cubic interpolation.

Differs from scipy.optimize.minimize(method="CG")
1. It can stop after any iteration and go on, to the bit. scipy's own searches are private, or (`line_search`) report a
   failure by a warning, which is process-wide state; hence the search below.
2. A direction that does not descend enough, d'g > -0.01 g'g, restarts from -g; scipy searches on along the old one.
3. The first trial step is scipy's guess from the last decrease, 2.02 (f_t - f_{t-1}) / g'd, without its bound of 1, so
   that multiplying the loss by a constant changes nothing.
4. A search that runs out of trials takes the best step with sufficient decrease (3, left); where there is none the
   weights stay, the next direction is -g and the step says `stalled`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..group import Group, current
from ..losses import Loss
from ..training import BadInput, Batch, Metrics
from .full_batch import Evaluation, FullBatch, full_batch_metrics
from .parameters import unpack_

_DESCENT = 0.01


@dataclass(frozen=True, kw_only=True)
class CG:
    """Nonlinear conjugate gradients (Polak-Ribière+) on all rows, with a strong Wolfe line search.

    A step is one outer iteration: about two passes over the data. There is no learning rate, and the memory is that of
    a few models. Metrics: `loss` and `gradient_norm` (Euclidean, of the mean loss) where the step ended, over the rows
    of all ranks; `evaluations`, the passes over the data so far; `stalled`, 1 where the weights did not move."""

    c1: float = 1e-4
    """Sufficient decrease of a line search, as a fraction of the decrease that the slope promises; 0 < c1 < c2."""

    c2: float = 0.4
    """A line search ends where the slope has shrunk to this fraction; c1 < c2 < 1; smaller searches longer."""

    max_line_search: int = 25
    """Trial points of one line search at most, each one pass over the data."""

    tile: int = 8192
    """Rows that pass through the network at once; it bounds the memory and decides how sums are rounded."""

    def __post_init__(self) -> None:
        if not 0 < self.c1 < self.c2 < 1:
            raise BadInput(f"cg: needs 0 < c1 < c2 < 1, got c1={self.c1}, c2={self.c2}")
        for name in ("max_line_search", "tile"):
            if getattr(self, name) < 1:
                raise BadInput(f"cg: {name} must be at least 1, got {getattr(self, name)}")

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> _Training:
        """Start a Training from the weights of rank 0. Raises CannotTrain for a model without a derivative, with random
        layers (dropout), with batch normalisation, or with parameters of several dtypes or devices."""
        group = current() if group is None else group
        return _Training(self, FullBatch(model, loss, group, tile=self.tile, method="cg"))


class _Training:
    data: Literal["shard", "same"] = "shard"
    batches: Literal["mini", "full"] = "full"
    deterministic = True

    def __init__(self, recipe: CG, objective: FullBatch) -> None:
        self.model, self.group = objective.model, objective.group
        self._recipe, self._objective = recipe, objective
        self._direction: Tensor | None = None  # d_{t-1} in float64, and with it:
        self._gradient: Tensor | None = None  # g_{t-1}, in the model's dtype
        self._loss = 0.0  # f_{t-1}
        self._stuck = False

    def step(self, batch: Batch) -> Metrics:
        if self._objective.known(batch) is None:
            self._stuck = self._stuck and self._objective.repeats
        start = self._objective.evaluate(batch)
        if self._stuck or not start.finite or start.norm == 0:
            return full_batch_metrics(self._objective, start, stalled=True)
        direction = self._next_direction(start)
        steepest = self._direction is None
        found = self._search(batch, start, direction)
        if found is None:
            unpack_(start.weights, self._objective.parameters)
            self._direction = self._gradient = None
            self._stuck = steepest
            return full_batch_metrics(self._objective, start, stalled=True)
        self._direction, self._gradient, self._loss = direction, start.gradient, start.loss
        return full_batch_metrics(self._objective, found, stalled=False)

    def _next_direction(self, start: Evaluation) -> Tensor:
        """(1) and (2) in float64; the old direction is dropped where the new one would not descend enough."""
        g = start.gradient.double()
        if self._direction is not None and self._gradient is not None:
            before = self._gradient.double()
            b = torch.clamp(g.dot(g - before) / before.dot(before), min=0)  # (1)
            d = b * self._direction - g  # (2)
            if bool(d.dot(g) <= -_DESCENT * g.dot(g)):
                return d
            self._direction = self._gradient = None
        return -g

    def _search(self, batch: Batch, start: Evaluation, direction: Tensor) -> Evaluation | None:
        """(3): the evaluation at the step taken, with the model there; None where no step gains anything."""
        parameters, origin = self._objective.parameters, start.weights.double()

        def move(step: float) -> Evaluation:
            unpack_(origin + step * direction, parameters)
            return self._objective.evaluate(batch)

        def along(step: float) -> tuple[float, float]:
            trial = move(step)
            return trial.loss, float(trial.gradient.double().dot(direction))

        slope = float(start.gradient.double().dot(direction))
        recipe = self._recipe
        step = strong_wolfe(
            along,
            start.loss,
            slope,
            self._first_trial(start, slope),
            c1=recipe.c1,
            c2=recipe.c2,
            trials=recipe.max_line_search,
        )
        if step == 0:
            return None
        found = move(step)
        moved = not torch.equal(found.weights, start.weights)
        return found if moved and found.finite and found.loss <= start.loss else None

    def _first_trial(self, start: Evaluation, slope: float) -> float:
        guess = math.nan if self._direction is None else 2.02 * (start.loss - self._loss) / slope
        return guess if guess > 0 and math.isfinite(guess) else 1 / math.sqrt(-slope)

    def sync(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "objective": self._objective.state(),
            "loss": self._loss,
            "stuck": int(self._stuck),
        }
        if self._direction is not None and self._gradient is not None:
            state |= {"direction": self._direction.clone(), "gradient": self._gradient.clone()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        direction, gradient = state.get("direction"), state.get("gradient")
        self._objective.require_vectors([vector for vector in (direction, gradient) if vector is not None])
        self._objective.go_on(state["objective"])
        self._loss, self._stuck = float(state["loss"]), bool(state["stuck"])
        device, dtype = self._objective.device, self._objective.dtype
        self._direction = None if direction is None else direction.to(device, torch.float64, copy=True)
        self._gradient = None if gradient is None else gradient.to(device, dtype, copy=True)


@dataclass(frozen=True)
class _Point:
    step: float
    value: float
    slope: float


def strong_wolfe(
    along: Callable[[float], tuple[float, float]],
    value: float,
    slope: float,
    step: float,
    *,
    c1: float,
    c2: float,
    trials: int,
) -> float:
    """A step that meets the strong Wolfe conditions; after `trials` evaluations the best that met the first, or 0.

    along(a) gives the value and the slope at step a; value, slope < 0: those at 0; step > 0: the first trial. Source:
    Nocedal, Wright 2006, algorithms 3.5 (until there is an interval) and 3.6 (within it), as one loop: `low` is the
    best point so far with sufficient decrease, and the slope there points to `high`."""
    low, high = _Point(0.0, value, slope), None
    for _ in range(trials):
        trial = _Point(step, *along(step))
        if not trial.value <= min(value + c1 * step * slope, low.value):  # also where it is not a number
            high = trial
        elif abs(trial.slope) <= -c2 * slope:
            return step
        else:
            towards = trial.slope * (math.copysign(1.0, high.step - low.step) if high else 1.0)
            before, low = low, trial
            if towards >= 0:
                high = before
            elif high is None:
                step = _beyond(before, low)
                continue
        assert high is not None
        step = _between(low, high)
        if abs(step - low.step) <= 1e-15 * abs(step) or not math.isfinite(step):
            break
    return low.step


def _beyond(before: _Point, low: _Point) -> float:
    """The minimum of the parabola through both slopes, kept between 1.1 and 10 times the step."""
    bend = (low.slope - before.slope) / (low.step - before.step)
    guess = low.step - low.slope / bend if bend > 0 else math.inf
    return min(max(guess, 1.1 * low.step), 10 * low.step)


def _between(low: _Point, high: _Point) -> float:
    """The minimum of the cubic through both values and slopes, a tenth of the interval away from its ends."""
    width = high.step - low.step
    if not (math.isfinite(high.value) and math.isfinite(high.slope)):
        return low.step + 0.1 * width
    lean = low.slope + high.slope - 3 * (high.value - low.value) / width
    square = lean * lean - low.slope * high.slope
    part = 0.5
    if square >= 0:
        root = math.copysign(math.sqrt(square), width)
        spread = high.slope - low.slope + 2 * root
        if spread != 0:
            part = 1 - (high.slope + root - lean) / spread
    return low.step + min(max(part, 0.1), 0.9) * width
