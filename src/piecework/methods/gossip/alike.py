"""Ranks that are to train together must have been started alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from ...group import Group
from ...meter import exchange_notes
from ...training import BadInput
from ..parameters import start_from_rank_0
from .graphs import joins


def start_alike(recipe: Any, model: nn.Module, group: Group) -> None:
    """Check that the ranks fit together, and give all the weights of rank 0. Collective, but for a rank that joins:
    those at work have checked it, and what they train is not at any rank's weights."""
    if not getattr(group, "fresh", False):
        require_alike(recipe, model, group)
        require_joined(recipe, group)
        start_from_rank_0(model, group)


def refusal(recipe: Any, model: nn.Module, notes: Any) -> str | None:
    """Why a newcomer with these notes cannot be let in, if so."""
    if not recipe.push_weight:
        return "without push weights nobody can join"
    return unlike(notes_of(recipe, model), notes, "it", "they")


def notes_of(recipe: Any, model: nn.Module) -> dict[str, dict[str, str]]:
    """What must be alike: settings, and the shapes of the model."""
    settings = {one.name: repr(getattr(recipe, one.name)) for one in fields(recipe)}
    settings = {name: "a function" if " at 0x" in text else text for name, text in settings.items()}
    shapes = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in model.state_dict().items()}
    return {"settings": settings, "shapes": shapes}


def require_alike(recipe: Any, model: nn.Module, group: Group) -> None:
    """Raise BadInput, on all ranks, where one has other settings or another model than rank 0. Collective."""
    if group.size == 1:
        return
    notes = exchange_notes(group, notes_of(recipe, model))
    for rank, note in enumerate(notes):
        if difference := unlike(notes[0], note, f"rank {rank}", "rank 0"):
            raise BadInput(f"gossip: {difference}; start all ranks alike")


def unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any], them: str, us: str) -> str | None:
    """Where the notes of two ranks differ, as a clause; None where they do not."""
    for what, told in (("settings", "was started with"), ("shapes", "has a model with")):
        if found := _first_difference(ours[what], theirs[what]):
            name, own, other = found
            return f"{them} {told} {name} {other}, {us} with {own}"
    return None


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
