"""How long a rank computes in a step, when things go wrong now and then."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..training import BadInput, stream


@dataclass(frozen=True)
class Noise:
    """What delays a rank; every draw is from (seed, rank, step).

    stalls: probability that a rank's step takes one step's time longer. slow_rank, slowness: a rank whose steps take so
    many times as long, for good. spread: standard deviation of the logarithm of each step's time, with mean 1."""

    stalls: float = 0.0
    slow_rank: int | None = None
    slowness: float = 2.0
    spread: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.stalls <= 1:
            raise BadInput(f"stalls is a probability, got {self.stalls}")
        if not 0 < self.slowness < math.inf or not 0 <= self.spread < 10:
            raise BadInput(f"slowness must be above 0 and spread in [0, 10), got {self.slowness} and {self.spread}")

    def stalled(self, rank: int, step: int) -> bool:
        return self.stalls > 0 and self._draw(rank, step) < self.stalls

    def factor(self, rank: int, step: int) -> float:
        """What a step's time is multiplied by, a stall apart."""
        slow = self.slowness if self.slow_rank == rank else 1.0
        if self.spread == 0:
            return slow
        normal = float(torch.randn((), generator=stream(self.seed, rank, step, 1), dtype=torch.float64))
        return slow * math.exp(self.spread * normal - self.spread**2 / 2)

    def seconds(self, seconds: float, rank: int, step: int) -> float:
        """Of a step that takes `seconds` without noise."""
        return seconds * self.factor(rank, step) * (2.0 if self.stalled(rank, step) else 1.0)

    def _draw(self, rank: int, step: int) -> float:
        return float(torch.rand((), generator=stream(self.seed, rank, step)))
