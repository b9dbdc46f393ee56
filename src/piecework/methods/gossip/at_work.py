"""Gossip at work on one model, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...evaluation import device_of
from ...group import Group
from ...losses import Loss, smoothed
from ...training import BadInput, Batch, CannotTrain, Metrics, stream
from ..noise import forked_generator, may_draw
from ..optimizer_state import entries_of, put_entries
from ..parameters import dictionaries, no_gradient, trainable
from ..schedule import set_rate
from .alike import refusal, start_alike
from .peers import Peers

if TYPE_CHECKING:
    from . import Gossip


class GossipAtWork:
    """One rank of a gossip training. Without `sync` its model is the rank's own."""

    data: Literal["shard", "same"] = "shard"
    batches: Literal["mini", "full"] = "mini"

    def __init__(self, recipe: Gossip, model: nn.Module, loss: Loss, group: Group) -> None:
        self.model, self.group = model, group
        self.deterministic = group.size == 1 or recipe.overlap == 0 or recipe.on_time
        self._recipe = recipe
        self._loss, self._objective = loss, smoothed(loss, recipe.label_smoothing)
        self._parameters: list[nn.Parameter] = trainable(model, "gossip")
        if group.size > 1 and (moving := dictionaries(model)):
            raise CannotTrain(
                f"the dictionary of NMF layer {moving[0]} follows the rows it sees, and each of {group.size} ranks "
                "sees others; train with deepfacto, which adds them up, or on one rank"
            )
        start_alike(recipe, model, group)
        self._optimizer = recipe.make_optimizer(self._parameters)
        self._peers = Peers(recipe, model, self._optimizer, self._parameters, group)
        self._device = device_of(model)
        self._draws = may_draw(model)
        self._step = self._peers.push_sum.step
        self._looked = False

    @property
    def words(self) -> dict[str, Any]:
        """Of the last `sync`."""
        return self._peers.words

    def step(self, batch: Batch) -> Metrics:
        if len(batch) == 0:
            raise BadInput("a mini-batch has no rows; give every rank the same number, at least one")
        if not self.model.training:
            self.model.train()
        self._peers.resume()
        lr = self._set_rate()
        loss = self._backward(batch.x.to(self._device), batch.y.to(self._device))
        self._peers.before()
        self._optimizer.step()
        mixed = self._peers.after()
        self._step += 1
        return {"loss": loss, "lr": torch.tensor(lr, dtype=torch.float64), **mixed}

    def sync(self) -> None:
        """The average of all ranks, messages under way included; and of their running statistics."""
        self._peers.sync()

    def leave(self) -> None:
        """As `Attached.leave`. `step` must not be called again. For loops of one's own; `fit` needs all its ranks."""
        self._peers.leave()

    def admit(self) -> int:
        """As `Attached.admit`. For loops of one's own."""
        return self._peers.admit(lambda notes: refusal(self._recipe, self.model, notes))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "optimizer": entries_of(self._optimizer, self._parameters),
            "peers": self._peers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        put_entries(self._optimizer, self._parameters, list(state["optimizer"]))
        self._peers.load_state_dict(state["peers"])
        self._step = int(state["step"])

    def _set_rate(self) -> float:
        if self._recipe.optimizer is None:
            return set_rate(self._recipe, self._step, self._optimizer)
        return float(self._optimizer.param_groups[0]["lr"])

    def _backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Leave the gradient of this rank's mean loss in the parameters; returns the user's loss."""
        self._optimizer.zero_grad(set_to_none=True)
        seed = stream(self._recipe.seed, self.group.rank, self._step).initial_seed() if self._draws else None
        with forked_generator(seed, self._device):
            z = self.model(x)
        loss = self._objective(z, y)
        if not loss.requires_grad:
            raise no_gradient(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        if not self._looked and any(parameter.grad is None for parameter in self._parameters):
            raise no_gradient(self.model)
        self._looked = True
        return (loss if self._objective is self._loss else self._loss(z.detach(), y)).detach()
