"""Where a model is cut into blocks, and what cannot be."""

from __future__ import annotations

from torch import nn

from ...layers import is_sequence, layers
from ...split import split
from ...training import BadInput, CannotTrain
from ..parameters import trainable

DEFAULT = 2
"""Blocks where none are asked for: more of them lose accuracy."""


def cut(model: nn.Module, *, at: tuple[int | str, ...], blocks: int | None) -> list[nn.Sequential]:
    """The model's blocks, which share its modules.

    at: places, as `split` takes them; or blocks: how many, by cost; with neither two.
    Raises CannotTrain for a model that cannot be trained in these blocks."""
    trainable(model, "local")
    if not is_sequence(model, open_hooked=False):
        if at or blocks != 1:
            raise CannotTrain(
                f"local cuts an nn.Sequential, and this model is one {type(model).__name__}; put its parts into an "
                "nn.Sequential, in their order, or train it as one block (blocks=1)"
            )
        return [nn.Sequential(model)]
    try:
        parts = split(model, at=at) if at else split(model, into=_number(model) if blocks is None else blocks)
    except BadInput as error:
        raise CannotTrain(f"local: {error}") from None
    found = [part for part in parts if isinstance(part, nn.Sequential)]
    for number, part in enumerate(found):
        _refuse_in_place(number, [module for _, module in layers(part, open_hooked=False)])
    return found


def _number(model: nn.Module) -> int:
    found = [module for _, module in layers(model, open_hooked=False) if any(True for _ in module.parameters())]
    return min(DEFAULT, len(found))


def _refuse_in_place(number: int, modules: list[nn.Module]) -> None:
    if number > 0 and getattr(modules[0], "inplace", False):
        raise CannotTrain(
            f"block {number} begins with a {type(modules[0]).__name__} that works in place, and would overwrite what "
            "the block below still needs; make it inplace=False, or cut behind it (at=)"
        )
