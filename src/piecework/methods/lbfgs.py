"""Liu, Nocedal: On the limited memory BFGS method for large scale optimization (Math. Prog. 45, 1989), algorithm 2.1.

Problem: the mean loss f over all rows of all ranks. With g_t the gradient at the weights w_t and the last m pairs
s = w_{t+1} - w_t, y = g_{t+1} - g_t,

    d_t = -H_t g_t            H_t: the inverse Hessian that the pairs make of (s'y / y'y) I, by the two-loop recursion
    w_{t+1} = w_t + a d_t     a: strong Wolfe, f(w + a d) <= f + 1e-4 a g'd and |g(w + a d)'d| <= 0.9 |g'd|

The iteration is `torch.optim.LBFGS` with line_search_fn="strong_wolfe"; a step is one outer iteration (max_iter=1).

Differs from a loop over torch.optim.LBFGS
1. The evaluation at the end of a line search is remembered, so that the next step does not pay for it again. A loop
   over max_iter=1 pays one pass more an iteration; the weights are those of one call with max_iter=N.
2. torch drops pairs and ends by absolute thresholds, made for a loss of order one. Here the loss is multiplied by a
   power of two, chosen where the memory is empty such that the gradient is long, and the thresholds on progress are as
   good as zero: it goes on to rounding error. Powers of two cost no digits; but torch's first trial step,
   min(1, 1/|g|_1), is then 1/|g|_1 always.
3. A value at a trial step that is not finite counts as a high one; torch walks on into it.
4. A search that finds nothing better leaves the weights, empties the memory and says `stalled`. Where the direction was
   the steepest descent already nothing can be gained, and later steps on the same batch return at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..group import Group, current
from ..losses import Loss
from ..training import BadInput, Batch, Metrics
from .full_batch import Evaluation, FullBatch, full_batch_metrics
from .parameters import unpack_


@dataclass(frozen=True, kw_only=True)
class LBFGS:
    """Limited-memory BFGS on all rows, with a strong Wolfe line search: `torch.optim.LBFGS` on one rank or many.

    A step is one outer iteration: usually one pass over the data, a few where the search has to look further. There is
    no learning rate. Metrics: `loss` and `gradient_norm` (Euclidean, of the mean loss) where the step ended, over the
    rows of all ranks; `evaluations`, the passes over the data so far; `stalled`, 1 where the weights did not move."""

    history: int = 10
    """Pairs of step and gradient difference that are remembered; each takes the memory of two models."""

    max_line_search: int = 25
    """Trial points of one line search at most, each one pass over the data."""

    tile: int = 8192
    """Rows that pass through the network at once; it bounds the memory and decides how sums are rounded."""

    def __post_init__(self) -> None:
        for name in ("history", "max_line_search", "tile"):
            if getattr(self, name) < 1:
                raise BadInput(f"lbfgs: {name} must be at least 1, got {getattr(self, name)}")

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> _Training:
        """Start a Training from the weights of rank 0. Raises CannotTrain for a model without a derivative, with random
        layers (dropout), with batch normalisation, or with parameters of several dtypes or devices."""
        group = current() if group is None else group
        return _Training(self, FullBatch(model, loss, group, tile=self.tile, method="lbfgs"))


class _Training:
    data: Literal["shard", "same"] = "shard"
    batches: Literal["mini", "full"] = "full"
    deterministic = True

    def __init__(self, recipe: LBFGS, objective: FullBatch) -> None:
        self.model, self.group = objective.model, objective.group
        self._objective = objective
        self._optimizer = torch.optim.LBFGS(
            objective.parameters,
            max_iter=1,
            max_eval=recipe.max_line_search + 1,
            tolerance_grad=0.0,
            tolerance_change=torch.finfo(objective.dtype).tiny,
            history_size=recipe.history,
            line_search_fn="strong_wolfe",
        )
        self._scale = 1.0
        self._stuck = False

    def step(self, batch: Batch) -> Metrics:
        if self._objective.known(batch) is None:
            self._stuck = self._stuck and self._objective.repeats
        start = self._objective.evaluate(batch)
        if self._stuck or not start.finite or start.norm == 0:
            return full_batch_metrics(self._objective, start, stalled=True)
        fresh = not self._memory
        if fresh:
            self._scale = _scale(start)
        self._optimizer.step(lambda: self._scaled(batch, start))  # type: ignore[no-untyped-call]
        for parameter in self._objective.parameters:
            parameter.grad = None
        found = self._objective.evaluate(batch)
        better = found.finite and found.loss <= start.loss and not torch.equal(found.weights, start.weights)
        if not better:
            unpack_(start.weights, self._objective.parameters)
            self._optimizer.state.clear()
            self._stuck = fresh
            found = start
        return full_batch_metrics(self._objective, found, stalled=not better)

    def _scaled(self, batch: Batch, start: Evaluation) -> float:
        """The closure: the loss and, left in the parameters, its gradient, both multiplied by the scale."""
        found = self._objective.evaluate(batch)
        gradient = found.gradient * self._scale if found.finite else torch.zeros_like(found.gradient)
        parameters = self._objective.parameters
        parts = torch.split(gradient, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view(parameter.shape)
        return self._scale * (found.loss if found.finite else 1e3 * (1 + abs(start.loss)))

    @property
    def _memory(self) -> dict[str, Any]:
        # torch keeps the one state of the whole model under its first parameter.
        memory: dict[str, Any] = self._optimizer.state.get(self._objective.parameters[0], {})
        return memory

    def sync(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        # "al" is scratch space of the two-loop recursion, and part None.
        memory = {name: _copied(value) for name, value in self._memory.items() if name != "al"}
        return {
            "objective": self._objective.state(),
            "scale": self._scale,
            "stuck": int(self._stuck),
            "memory": memory,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vectors = [state["memory"].get("d"), *state["memory"].get("old_dirs", ()), *state["memory"].get("old_stps", ())]
        self._objective.require_vectors([vector for vector in vectors if vector is not None])
        self._objective.go_on(state["objective"])
        self._scale, self._stuck = float(state["scale"]), bool(state["stuck"])
        # Set directly: Optimizer.load_state_dict would cast the 0-d tensors and so change bits.
        self._optimizer.state.clear()
        if state["memory"]:
            memory = {name: _copied(value, self._objective.device) for name, value in state["memory"].items()}
            self._optimizer.state[self._objective.parameters[0]] = memory


def _scale(start: Evaluation) -> float:
    """The power of two that makes the gradient long enough for torch's thresholds, and not too long for its dtype."""
    exponent = 60 if start.gradient.dtype == torch.float64 else 20
    return 2.0 ** (exponent - math.frexp(start.norm)[1])


def _copied(value: Any, device: torch.device | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if device is None else value.detach().to(device, copy=True)
    return [_copied(entry, device) for entry in value] if isinstance(value, list) else value
