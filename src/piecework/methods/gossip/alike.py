"""Ranks that are to train together must have been started alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...group import Group
from ...training import BadInput
from ..alike import notes_of, require_alike, unlike
from ..parameters import start_from_rank_0
from .graphs import joins


def start_alike(recipe: Any, model: nn.Module, group: Group) -> None:
    """Check that the ranks fit together, and give all the weights of rank 0. Collective, but for a rank that joins:
    those at work have checked it, and what they train is not at any rank's weights."""
    if not getattr(group, "fresh", False):
        require_alike("gossip", notes_of(recipe, model), group)
        require_joined(recipe, group)
        start_from_rank_0(model, group)


def refusal(recipe: Any, model: nn.Module, notes: Any) -> str | None:
    """Why a newcomer with these notes cannot be let in, if so."""
    if not recipe.push_weight:
        return "without push weights nobody can join"
    return unlike(notes_of(recipe, model), notes, "it", "they")


def require_joined(recipe: Any, group: Group) -> None:
    """Raise BadInput for a graph that leaves ranks apart, where nothing else brings them together."""
    if not recipe.slow_every and not joins(recipe.graph, group.size):
        raise BadInput(
            f"gossip: over 64 sends the graph does not join the {group.size} ranks: some pass nothing on to others, "
            "directly or not; add edges, or let them meet (slow_every)"
        )
