"""Emulated compute: ranks that sleep in place of the heavy kernels of their layers, and train a small network besides.

    pace = Pace(seconds=0.2, noise=Noise(stalls=1 / 8), rank=group.rank)
    model = network(pace)          # 5 MB of float32 parameters, a sleep after each layer and before its backward pass

A step's computation takes exactly `seconds` from the start of the forward pass, the real computation included: a third
forward and two thirds backward, shared out among the layers by their parameters, so that gradients become available
layer by layer as on a real device. Many ranks then compute at the same time on few cores, while every message is real.
What a method does besides (optimiser, mixing, waiting) comes on top, as it would.

`emulated_runs.py` runs methods on such ranks, over shaped links.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from piecework.clock import Noise
from piecework.models import mlp

FEATURES, CLASSES, WIDTH, BLOCKS = 64, 10, 416, 7
"""digits; 1 252 170 parameters, 5.0 MB in float32, in nine layers of which seven have 0.7 MB each."""

FORWARD = 1 / 3


class Pace:
    """The clock of a rank's emulated kernels."""

    def __init__(self, seconds: float, *, noise: Noise | None = None, rank: int = 0) -> None:
        self._noise = noise or Noise()
        self._plain = self._seconds = seconds
        self._rank, self._step, self._due, self._began = rank, 0, 0.0, 0.0
        self.computing: list[float] = []
        """Seconds of each step from the start of the forward pass to the last sleep's end; with stalls."""
        self.late_s = 0.0
        """Most seconds that the real computation was behind its kernel at the end of a step."""

    def begin(self) -> None:
        stalled = self._noise.stalled(self._rank, self._step)
        self._seconds = self._plain * self._noise.factor(self._rank, self._step)
        self._step += 1
        self._began = self._due = time.monotonic()
        self.computing.append(0.0)
        if stalled:
            self.run(1.0)

    def run(self, part: float) -> None:
        """Sleep until this part of the step's computation would have ended; what was late is made up for later."""
        self._due += part * self._seconds
        now = time.monotonic()
        if now < self._due:
            time.sleep(self._due - now)
        self.computing[-1] = time.monotonic() - self._began

    def end(self) -> None:
        self.late_s = max(self.late_s, time.monotonic() - self._due)


class Kernel(nn.Module):
    """Sleeps after its layer's forward pass and before its layer's backward pass, in training mode."""

    def __init__(self, pace: Pace, share: float, *, is_last: bool) -> None:
        super().__init__()
        self._pace, self._share, self._is_last = pace, share, is_last

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        self._pace.run(self._share * FORWARD)
        return _SleepBackward.apply(x, self)

    def backward_sleep(self) -> None:
        self._pace.run(self._share * (1 - FORWARD))
        if self._is_last:
            self._pace.end()


class _SleepBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel) -> Tensor:
        ctx.kernel = kernel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.kernel.backward_sleep()
        return gradient, None


class _Start(nn.Module):
    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._pace.begin()
        return x


class Residual(nn.Module):
    """x + relu(linear(norm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).relu()


def plain(*, seed: int = 0, residual: bool = True) -> list[nn.Module]:
    """The layers of a network for digits (features already scaled), without kernels.

    residual: blocks with layer normalisation, as in the networks that are trained on many machines; otherwise an MLP of
    as many layers with ReLU, in which a gradient that is a step late does more harm."""
    if not residual:
        layers = list(mlp(FEATURES, (WIDTH,) * (BLOCKS + 1), CLASSES, seed=seed))
        return [nn.Sequential(*layers[start : start + 2]) for start in range(0, len(layers), 2)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [Residual(WIDTH) for _ in range(BLOCKS)]
        return [nn.Linear(FEATURES, WIDTH), *blocks, nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))]


def network(pace: Pace, *, seed: int = 0, residual: bool = True) -> nn.Sequential:
    """The same with a kernel at each of its layers."""
    parts = plain(seed=seed, residual=residual)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    layers: list[nn.Module] = [_Start(pace)]
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        layers += [part, Kernel(pace, size / sum(sizes), is_last=number == 0)]
    return nn.Sequential(*layers)
