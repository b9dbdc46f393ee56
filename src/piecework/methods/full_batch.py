"""The mean loss of all ranks' rows and its gradient: what the full-batch optimisers minimise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..group import Group
from ..losses import Loss
from ..training import BadInput, Batch, CannotTrain, Metrics
from .parameters import no_gradient, packed, refuse_noise_and_coupling, start_from_rank_0, trainable


@dataclass(frozen=True)
class Evaluation:
    """One pass over the data. weights, gradient: (P,) in the model's dtype; loss: the mean over all ranks' rows."""

    weights: Tensor
    loss: float
    gradient: Tensor

    @property
    def norm(self) -> float:
        """Euclidean length of the gradient, in float64."""
        return float(torch.linalg.vector_norm(self.gradient, dtype=torch.float64))

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


class FullBatch:
    """Mean loss and gradient at the model's current weights, one pass over the data an evaluation.

    The batch is read in tiles, so it may be backed by a mapped file; a tile moves to the model's device. One message
    of P + 3 numbers carries an evaluation over the ranks (two messages where the model is not float64: the loss and
    two counts always travel in float64), so all ranks see the same bits and decide the same. A rank may have
    no rows.

    The two evaluations worth keeping, the last one and the lowest one, are remembered: an optimiser that asks again at
    the point where its line search ended costs no pass. They count only for the same tensors x and y and unchanged
    weights, so every rank must pass the same Batch tensors again, or every rank new ones."""

    def __init__(self, model: nn.Module, loss: Loss, group: Group, *, tile: int, method: str) -> None:
        """Raises CannotTrain for a model whose loss is not a function of its weights, summed row by row."""
        self.model, self.group, self.passes = model, group, 0
        self.parameters = trainable(model, method)
        self._loss, self._tile = loss, tile
        kinds = {(parameter.dtype, parameter.device) for parameter in self.parameters}
        if len(kinds) > 1:
            listed = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise CannotTrain(f"{method} needs all parameters in one dtype on one device, and finds {listed}")
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device
        refuse_noise_and_coupling(model, method)
        start_from_rank_0(model, group)
        self._batch: Batch | None = None
        self._remembered: list[Evaluation] = []
        self._uncounted = False

    def evaluate(self, batch: Batch) -> Evaluation:
        """The loss and gradient at the current weights; remembered if they are known. Collective otherwise."""
        return self.known(batch) or self._pass(batch)

    def known(self, batch: Batch) -> Evaluation | None:
        """What is remembered about these weights and this batch."""
        if self._batch is None or self._batch.x is not batch.x or self._batch.y is not batch.y:
            return None
        weights = packed(self.parameters)
        return next((found for found in self._remembered if torch.equal(found.weights, weights)), None)

    @property
    def repeats(self) -> bool:
        """Whether the next pass repeats, after a resumption, one that was made before."""
        return self._uncounted

    def state(self) -> dict[str, int]:
        """How many passes were made, and whether the next evaluation would have been a remembered one."""
        known = self._batch is not None and self.known(self._batch) is not None
        return {"passes": self.passes, "known": int(known or self._uncounted)}

    def go_on(self, state: Mapping[str, int]) -> None:
        """Go on from `state`; a pass that repeats a remembered evaluation is made, but not counted again."""
        self.passes, self._uncounted = int(state["passes"]), bool(state["known"])
        self._batch, self._remembered = None, []

    def require_vectors(self, vectors: Sequence[Tensor]) -> None:
        """Raise BadInput unless each has an element for each trainable number of the model."""
        size = sum(parameter.numel() for parameter in self.parameters)
        for vector in vectors:
            if vector.shape != (size,):
                raise BadInput(
                    f"the state has a vector of shape {tuple(vector.shape)}; this model has {size} trainable numbers"
                )

    def _pass(self, batch: Batch) -> Evaluation:
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._backward(batch, sums)
        sums[1] = len(batch)
        sums[2] = len(batch) > 0 and any(parameter.grad is None for parameter in self.parameters)
        gradient = packed([_gradient(parameter) for parameter in self.parameters])
        self.group.sum_(gradient, sums)
        total, rows, refusals = sums.tolist()
        if rows == 0:
            raise BadInput("there are no rows to train on, on any rank")
        if refusals:
            raise no_gradient(self.model)
        for parameter in self.parameters:
            parameter.grad = None
        evaluation = Evaluation(packed(self.parameters), total / rows, gradient.div_(rows))
        self._remember(batch, evaluation)
        return evaluation

    def _backward(self, batch: Batch, sums: Tensor) -> None:
        """Add this rank's total loss to sums[0] and leave the gradient of the total in the parameters."""
        if not self.model.training:
            self.model.train()
        for parameter in self.parameters:
            parameter.grad = None
        with torch.enable_grad():
            for start in range(0, len(batch), self._tile):
                rows = slice(start, start + self._tile)
                z = self.model(batch.x[rows].to(self.device))
                total = self._loss.total(z, batch.y[rows].to(self.device))
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
                sums[0] += total.detach()

    def _remember(self, batch: Batch, evaluation: Evaluation) -> None:
        if self._uncounted:
            self._uncounted = False
        else:
            self.passes += 1
        if self._batch is None or self._batch.x is not batch.x or self._batch.y is not batch.y:
            self._batch, self._remembered = batch, []
        rivals = [found for found in self._remembered if found.finite]
        lowest = min(rivals, key=lambda found: found.loss, default=None)
        self._remembered = [evaluation] if lowest is None else [evaluation, lowest]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def full_batch_metrics(objective: FullBatch, found: Evaluation, *, stalled: bool) -> Metrics:
    """What a full-batch step reports, as 0-d float64 tensors in host memory, where the numbers are already."""
    values = {"loss": found.loss, "gradient_norm": found.norm, "evaluations": objective.passes, "stalled": stalled}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
