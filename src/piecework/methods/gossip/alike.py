"""Ranks that are to train together must have been started alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from ...group import Group
from ...meter import exchange_notes
from ...training import BadInput
from .graphs import joins


def require_alike(recipe: Any, model: nn.Module, group: Group) -> None:
    """Raise BadInput, on all ranks, where one has other settings or another model than rank 0. Collective."""
    if group.size == 1:
        return
    settings = {one.name: repr(getattr(recipe, one.name)) for one in fields(recipe)}
    settings = {name: "a function" if " at 0x" in text else text for name, text in settings.items()}
    shapes = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in model.state_dict().items()}
    notes = exchange_notes(group, {"settings": settings, "shapes": shapes})
    for rank, note in enumerate(notes):
        for what, told in (("settings", "was started with"), ("shapes", "has a model with")):
            if difference := _first_difference(notes[0][what], note[what]):
                name, ours, theirs = difference
                raise BadInput(f"gossip: rank {rank} {told} {name} {theirs}, rank 0 with {ours}; start all ranks alike")


def require_joined(recipe: Any, group: Group) -> None:
    """Raise BadInput for a graph that leaves ranks apart, where nothing else brings them together."""
    if not recipe.slow_every and not joins(recipe.graph, group.size):
        raise BadInput(
            f"gossip: over 64 sends the graph does not join the {group.size} ranks: some pass nothing on to others, "
            "directly or not; add edges, or let them meet (slow_every)"
        )


def _first_difference(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, str, str] | None:
    for name in [*one, *other]:
        if one.get(name) != other.get(name):
            return name, one.get(name, "none of it"), other.get(name, "none of it")
    return None
