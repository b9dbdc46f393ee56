"""Where a model is cut into blocks, and what cannot be."""

from __future__ import annotations

from torch import nn

from ...layers import is_sequence, layers
from ...nn.prox_layer import ProxLayer
from ...split import split
from ...training import BadInput, CannotTrain
from ..blocks import is_prox
from ..parameters import trainable


def cut(model: nn.Module, *, at: tuple[int | str, ...], blocks: int | None) -> list[nn.Sequential]:
    """The model's blocks, which share its modules.

    at: places, as `split` takes them; or blocks: how many, by cost; with neither every layer with parameters begins a
    block. In any case a layer with a `prox_input` becomes a block of its own.
    Raises CannotTrain for a model that cannot be trained in these blocks."""
    parameters = trainable(model, "block-admm", derivative=False)
    if not is_sequence(model, open_hooked=False):
        if at or (blocks or 1) > 1:
            raise CannotTrain(
                f"block-admm cuts an nn.Sequential, and this model is one {type(model).__name__}; put its parts into "
                "an nn.Sequential, in their order, or train it as one block (blocks=1)"
            )
        found = [nn.Sequential(model)]
    else:
        try:
            found = _cut(model, at, blocks)
        except BadInput as error:
            raise CannotTrain(f"block-admm: {error}") from None
    found = [part for block in found for part in _apart(block)]
    if is_prox(found[-1]):
        raise CannotTrain(
            f"block-admm needs a derivative of the loss, and the last layer ({type(found[-1][0]).__name__}) has none; "
            "put a layer with weights behind it"
        )
    known = {id(one) for block in found for one in block.parameters()}
    assert all(id(one) in known for one in parameters)
    return found


def _cut(model: nn.Module, at: tuple[int | str, ...], blocks: int | None) -> list[nn.Sequential]:
    if at:
        parts = split(model, at=at)
    elif blocks is not None:
        parts = split(model, into=blocks)
    else:
        found = [module for _, module in layers(model, open_hooked=False)]
        with_parameters = [number for number, module in enumerate(found) if any(True for _ in module.parameters())]
        parts = split(model, at=with_parameters[1:]) if len(with_parameters) > 1 else split(model, into=1)
    return [part for part in parts if isinstance(part, nn.Sequential)]


def _apart(block: nn.Sequential) -> list[nn.Sequential]:
    """The block, cut before and behind each layer that has a `prox_input`."""
    parts: list[list[nn.Module]] = [[]]
    for module in block:
        if isinstance(module, ProxLayer):
            parts += [[module], []]
        else:
            parts[-1].append(module)
    return [nn.Sequential(*part) for part in parts if part]
