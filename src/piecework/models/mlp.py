"""Fully connected networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from ..nn import NMF, HardSigmoid, Sign
from ..training import BadInput

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "hard-sigmoid": HardSigmoid,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "sign": Sign,
    "identity": nn.Identity,
}

NON_NEGATIVE = ("relu", "hard-sigmoid", "sigmoid")
"""Activations whose outputs an NMF layer takes."""


def mlp(
    num_features: int,
    hidden: Sequence[int],
    num_outputs: int,
    *,
    activation: str = "relu",
    factors: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Linear layers with an activation between them: num_features - hidden - num_outputs.

    factors: the rank of an `NMF` layer between the last hidden layer and the output; None for no such layer.

    Weights are normal with variance 2/fan-in for the rectifiers (He et al. 2015) and 1/fan-in for the others; biases
    are normal with a tenth of that standard deviation, so that no two units share a kink. Only `seed` decides them.

    Raises BadInput for a width below 1, an unknown activation, or factors without non-negative hidden units."""
    if activation not in ACTIVATIONS:
        raise BadInput(f"no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    widths = [num_features, *hidden, num_outputs]
    if min(widths) < 1:
        raise BadInput(f"every layer needs at least one unit, got widths {' '.join(map(str, hidden))}")
    gain = 2.0 if activation in ("relu", "leaky-relu") else 1.0
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    if factors is not None:
        if not hidden or activation not in NON_NEGATIVE:
            what = "no hidden layer" if not hidden else f"the activation {activation}"
            raise BadInput(
                f"factors are those of non-negative hidden units, and this network has {what}; "
                f"take a hidden layer and one of {', '.join(NON_NEGATIVE)}"
            )
        widths = [*widths[:-1], factors, widths[-1]]
    for fan_in, fan_out in pairwise(widths):
        if factors is not None and len(layers) == 2 * len(hidden):
            layers.append(NMF(fan_in, factors, seed=seed, dtype=dtype))
            continue
        linear = nn.Linear(fan_in, fan_out, dtype=dtype, device="meta").to_empty(device="cpu")
        std = math.sqrt(gain / fan_in)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64) * std)
            linear.bias.copy_(torch.randn(fan_out, generator=generator, dtype=torch.float64) * (std / 10))
        layers += [linear, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])
