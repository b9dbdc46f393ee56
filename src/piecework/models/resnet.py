"""A small residual network for pictures, as a row of blocks that can be cut anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training import BadInput
from .filling import filled


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + f(x)), f two 3 x 3 convolutions with normalisation; stride 2 halves the sides."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.first(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.second(h)))


def resnet(
    shape: Sequence[int],
    num_outputs: int,
    *,
    width: int = 16,
    stages: int = 3,
    blocks: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Pictures as flat features (n, channels * height * width) of this shape to outputs (n, num_outputs).

    `stages` of `blocks` residual blocks each, the first of `width` channels; each further one has twice as many
    channels and half the sides (He et al. 2016, the form for CIFAR). Weights are normal with variance 2/fan-in, in the
    last layer 1/fan-in. Only `seed` decides them. Raises BadInput for a shape or sizes that do not fit."""
    if len(shape) != 3 or min(shape) < 1:
        raise BadInput(f"pictures have a shape (channels, height, width), got {tuple(shape)}")
    if min(num_outputs, width, stages, blocks) < 1:
        raise BadInput(f"a resnet needs sizes of at least 1, got {num_outputs}, {width}, {stages}, {blocks}")

    def make() -> nn.Sequential:
        found: list[nn.Module] = [
            nn.Unflatten(1, tuple(shape)),
            nn.Conv2d(shape[0], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
        for stage in range(stages):
            for number in range(blocks):
                wide = width * 2**stage
                found.append(ResidualBlock(channels, wide, 2 if stage > 0 and number == 0 else 1))
                channels = wide
        return nn.Sequential(*found, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_outputs))

    def std(_: str, weight: Tensor) -> float:
        return math.sqrt((1.0 if weight.dim() == 2 else 2.0) / weight[0].numel())

    return filled(make, std, seed).to(dtype)
