"""What a message costs: a full-duplex link from each rank to a switch without limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..training import BadInput


@dataclass(frozen=True)
class Link:
    """A message of s bytes takes latency_s + scale s / bytes_per_s; messages of one sender, and to one receiver, follow
    each other. scale: how many bytes a byte stands for, so that a small model can be in the place of a large one.
    switch_bytes_per_s: what all ranks together can send, as in one machine whose cores carry every message."""

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    scale: float = 1.0
    switch_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        for name, ok in (
            ("latency_s", 0 <= self.latency_s < math.inf),
            ("bytes_per_s", self.bytes_per_s > 0),
            ("switch_bytes_per_s", self.switch_bytes_per_s > 0),
            ("scale", 0 < self.scale < math.inf),
        ):
            if not ok:
                raise BadInput(f"a link's {name} cannot be {getattr(self, name)}")

    def passing_s(self, num_bytes: float) -> float:
        """Seconds for which the link is busy with a message."""
        return self.scale * num_bytes / self.bytes_per_s

    def switching_s(self, num_bytes: float) -> float:
        """Seconds for which the switch is busy with a message."""
        return self.scale * num_bytes / self.switch_bytes_per_s

    def message_s(self, num_bytes: float) -> float:
        return self.latency_s + self.passing_s(num_bytes)

    def all_reduce_s(self, num_bytes: float, ranks: int) -> float:
        """A ring: 2 (n - 1) rounds, in each of which every rank sends an n-th to the next."""
        return 2 * (ranks - 1) * self._round_s(num_bytes / ranks, ranks)

    def all_gather_s(self, num_bytes: float, ranks: int) -> float:
        """A ring of n - 1 rounds, in each of which every rank passes the whole of another on."""
        return (ranks - 1) * self._round_s(num_bytes, ranks)

    def broadcast_s(self, num_bytes: float, ranks: int) -> float:
        """A binary tree."""
        return math.ceil(math.log2(ranks)) * self.message_s(num_bytes) if ranks > 1 else 0.0

    def _round_s(self, num_bytes: float, ranks: int) -> float:
        """All ranks send a message at once, each to another."""
        return max(self.message_s(num_bytes), self.latency_s + ranks * self.switching_s(num_bytes))
