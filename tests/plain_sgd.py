"""Gradient descent as a user would write it against the contract: the method that the tests of the loop train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from piecework.group import Group, Solo
from piecework.losses import Loss
from piecework.training import Batch, CannotTrain, Metrics


@dataclass(frozen=True, kw_only=True)
class PlainSGD:
    """Momentum SGD.

    full: on all rows at each step; same: every rank sees every batch; averaged: the deployed network is the mean of all
    iterates, so that the trajectory's weights and the model's are different things."""

    lr: float = 0.1
    momentum: float = 0.5
    full: bool = False
    same: bool = False
    averaged: bool = False

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> PlainTraining:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise CannotTrain("plain SGD found no parameter to train; unfreeze one with requires_grad_()")
        return PlainTraining(self, model, loss, group or Solo())


class PlainTraining:
    deterministic = True

    def __init__(self, recipe: PlainSGD, model: nn.Module, loss: Loss, group: Group) -> None:
        self.recipe, self.model, self.loss, self.group = recipe, model, loss, group
        self.data: Literal["shard", "same"] = "same" if recipe.same else "shard"
        self.batches: Literal["mini", "full"] = "full" if recipe.full else "mini"
        self.parameters = [one for one in model.parameters() if one.requires_grad]
        for parameter in self.parameters:
            group.broadcast_(parameter.data)
        self.weights = [one.detach().clone() for one in self.parameters]
        self.velocity = [torch.zeros_like(one) for one in self.parameters]
        self.mean = [one.clone() for one in self.weights]
        self.steps = 0

    def step(self, batch: Batch) -> Metrics:
        self._put(self.weights)
        # An empty rank has a total of 0 and a gradient of zeros.
        z = self.model(batch.x)
        total = self.loss(z, batch.y) * len(batch) if len(batch) else z.sum() * 0
        gradients = [one.detach().clone() for one in torch.autograd.grad(total, self.parameters)]
        rows = torch.tensor(float(len(batch)), dtype=torch.float64)
        self.group.sum_(*gradients)
        self.group.sum_(rows)
        self.steps += 1
        for weight, velocity, gradient, mean in zip(self.weights, self.velocity, gradients, self.mean, strict=True):
            velocity.mul_(self.recipe.momentum).add_(gradient / rows.item())
            weight.sub_(self.recipe.lr * velocity)
            mean.lerp_(weight, 1 / self.steps)
        self._put(self.weights)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        return {"loss": total.detach() / max(len(batch), 1), "gradient_norm": norm} if len(batch) else {}

    def sync(self) -> None:
        self._put(self.mean if self.recipe.averaged else self.weights)

    def state_dict(self) -> dict[str, Any]:
        own = {"weights": self.weights, "mean": self.mean} if self.recipe.averaged else {}
        return {"steps": self.steps, "velocity": self.velocity, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        weights = state["weights"] if self.recipe.averaged else [one.detach() for one in self.parameters]
        self._copy(self.weights, weights)
        self._copy(self.mean, state["mean"] if self.recipe.averaged else weights)
        self._copy(self.velocity, state["velocity"])
        self.steps = state["steps"]

    def _put(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            self._copy([one.data for one in self.parameters], weights)

    @staticmethod
    def _copy(into: list[Tensor], given: list[Tensor]) -> None:
        for own, new in zip(into, given, strict=True):
            own.copy_(new)
