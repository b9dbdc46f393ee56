"""A model's layers in the order in which they act, as far as `nn.Sequential` tells it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def layers(model: nn.Module, *, open_hooked: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules, sequences inside sequences opened; any other module is one layer. A module that stands at two
    places comes twice. The name of the model itself is empty.

    open_hooked: whether to open sequences that have hooks as well, which only run where the sequence is called."""
    return _layers(model, "", open_hooked)


def is_sequence(module: nn.Module, *, open_hooked: bool = True) -> bool:
    """Whether a module is nothing but its children in a row."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return open_hooked or not hooks


def _layers(module: nn.Module, name: str, open_hooked: bool) -> Iterator[tuple[str, nn.Module]]:
    if not is_sequence(module, open_hooked=open_hooked):
        yield name, module
        return
    for key, child in module._modules.items():  # named_children() would leave out a layer's second use
        assert child is not None
        yield from _layers(child, f"{name}.{key}" if name else key, open_hooked)
