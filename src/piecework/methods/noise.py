"""Random layers (dropout) know only torch's global generator: it is forked for them, and seeded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..nn import BlackBox
from .parameters import random_layers

_GLOBAL_GENERATOR = threading.Lock()
"""Ranks in memory are threads and share torch's global generator: one forward pass at a time draws from it."""


def may_draw(model: nn.Module) -> bool:
    """Whether a forward pass or a proximal step may draw random numbers: torch's layers are known, of the user's
    nothing is, nor of the function in a black box."""
    known = ("torch.nn.", "piecework.")
    return bool(random_layers(model)) or any(
        isinstance(one, BlackBox) or not type(one).__module__.startswith(known) for one in model.modules()
    )


@contextmanager
def forked_generator(seed: int | None, device: torch.device) -> Iterator[None]:
    """Run on a fork of torch's global generators, seeded; with None nothing is forked."""
    if seed is None:
        yield
        return
    cuda = [device.index] if device.type == "cuda" else []
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[cuda[0]].manual_seed(seed)
        yield
