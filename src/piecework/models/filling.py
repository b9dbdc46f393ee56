"""Start weights that only a seed decides, and never the global generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def filled(make: Callable[[], nn.Sequential], std: Callable[[str, Tensor], float], seed: int) -> nn.Sequential:
    """A module made without memory, whose weights are then drawn from one generator.

    std: standard deviation of a parameter of two or more dimensions, by name; vectors called weight are 1 (those of
    normalisations), other vectors 0, and running statistics are as at the start."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * std(name, parameter))
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    return model
