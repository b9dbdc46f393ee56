"""Gossip attached to an optimiser and a loop of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...group import Group
from ...training import BadInput, CannotTrain, Metrics
from ..optimizer_state import entries_of, put_entries
from .alike import refusal, start_alike
from .peers import Peers

if TYPE_CHECKING:
    from . import Gossip


class Attached:
    """What `Gossip.attach` gives: from now on each `optimizer.step()` is followed by mixing.

        gossip = Gossip(overlap=1).attach(model, optimizer, group=group)
        for x, y in rows_of_this_rank:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        gossip.sync()                        # the average of all ranks is in the model

    After `sync` the model holds the average until the next forward pass in training mode (or `resume`), which puts this
    rank's own weights back. metrics: of the last step, detached."""

    def __init__(self, recipe: Gossip, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
        self.model, self.group, self.optimizer = model, group, optimizer
        self.metrics: Metrics = {}
        self._parameters = _mixed(model, optimizer)
        start_alike(recipe, model, group)
        self._recipe = recipe
        self._peers = Peers(recipe, model, optimizer, self._parameters, group)
        self._hooks = [
            model.register_forward_pre_hook(lambda module, _: self._peers.resume() if module.training else None),
            optimizer.register_step_pre_hook(lambda *_: self._peers.before()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]

    def sync(self) -> None:
        """The average of all ranks into the model, messages under way included. Collective; call it as often as you
        like: the training goes on as if it had not been called."""
        self._peers.sync()

    def resume(self) -> None:
        """This rank's own weights back into the model, after `sync`."""
        self._peers.resume()

    @contextmanager
    def average(self) -> Iterator[nn.Module]:
        """The model with the average of all ranks in it, for as long as this lasts. Collective."""
        self.sync()
        try:
            yield self.model
        finally:
            self.resume()

    def leave(self) -> None:
        """Give all that this rank has to another one, and mix no more; the others go on. Of one rank, at any time.

        Returns when all others have said that nothing more is under way to this one, which each does in its next step
        or `sync`. The model keeps this rank's own weights. Nothing collective may be called afterwards."""
        self._peers.leave()
        self.detach()

    def admit(self) -> int:
        """Let those in who wait to join (`piecework.ranks.joining`); returns how many. Collective."""
        return self._peers.admit(lambda notes: refusal(self._recipe, self.model, notes))

    def detach(self) -> None:
        """Stop mixing. What is under way is lost: `sync` first, or `leave`."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on: its weights, its optimiser's memory, the messages under way. Collective."""
        return {"optimizer": entries_of(self.optimizer, self._parameters), "peers": self._peers.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, on as many ranks, before the first step."""
        put_entries(self.optimizer, self._parameters, list(state["optimizer"]))
        self._peers.load_state_dict(state["peers"])

    def _after(self) -> None:
        self.metrics = self._peers.after()


def _mixed(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimiser's parameters, which must be of this model."""
    of_the_model = {id(parameter) for parameter in model.parameters()}
    found: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not found or any(id(parameter) not in of_the_model for parameter in found):
        raise CannotTrain("gossip: the optimiser must have parameters, and those of the model that it is attached with")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise BadInput(f"gossip attaches to a torch optimiser, got {type(optimizer).__name__}")
    return found
