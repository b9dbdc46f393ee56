"""Ranks that are to train together must have been started alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from ..group import Group
from ..meter import exchange_notes
from ..training import BadInput

_TOLD = (
    ("settings", "was started with"),
    ("shapes", "has a model with"),
    ("layers", "has a model with"),
    ("rows", "was given a first mini-batch with"),
)


def notes_of(recipe: Any, model: nn.Module) -> dict[str, dict[str, str]]:
    """What must be alike: settings, and the shapes and layers of the model. Functions are not looked into."""
    settings = {one.name: repr(getattr(recipe, one.name)) for one in fields(recipe)}
    settings = {name: "a function" if " at 0x" in text else text for name, text in settings.items()}
    shapes = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in model.state_dict().items()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    shapes = {name: f"{text}{', frozen' if name in frozen else ''}" for name, text in shapes.items()}
    layers = {f"layer {name}": type(module).__name__ for name, module in model.named_modules() if name}
    return {"settings": settings, "shapes": shapes, "layers": layers}


def require_alike(method: str, notes: Mapping[str, Mapping[str, str]], group: Group) -> None:
    """Raise BadInput, on all ranks, where one tells other notes than rank 0. Collective."""
    if group.size == 1:
        return
    told = exchange_notes(group, dict(notes))
    for rank, note in enumerate(told):
        if difference := unlike(told[0], note, f"rank {rank}", "rank 0"):
            raise BadInput(f"{method}: {difference}; start all ranks alike")


def unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any], them: str, us: str) -> str | None:
    """Where the notes of two ranks differ, as a clause; None where they do not."""
    for what, told in _TOLD:
        if found := _first_difference(ours.get(what, {}), theirs.get(what, {})):
            name, own, other = found
            return f"{them} {told} {name} {other}, {us} with {own}"
    return None


def _first_difference(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, str, str] | None:
    for name in [*one, *other]:
        if one.get(name) != other.get(name):
            return name, one.get(name, "none of it"), other.get(name, "none of it")
    return None
