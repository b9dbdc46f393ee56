"""A mailbox in virtual time: a message arrives when the link has carried it, and never before."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ranks.mailbox import Letter

if TYPE_CHECKING:
    from .group import ClockGroup, World


class ClockMailbox:
    """One rank's mailbox; ranks on a clock close it, and neither die nor leave."""

    leaving: frozenset[int] = frozenset()

    def __init__(self, group: ClockGroup, world: World, number: int, capacity: int) -> None:
        self.capacity = capacity
        self._group, self._world, self._number = group, world, number
        self._listening: list[int] = []

    @property
    def gone(self) -> frozenset[int]:
        now = self._group.seconds()
        closed = self._world.closed.items()
        return frozenset(rank for (number, rank), moment in closed if number == self._number and moment <= now)

    def announce(self) -> None:
        raise NotImplementedError("ranks on a virtual clock do not leave")

    def listen(self, peers: Iterable[int]) -> None:
        self._listening += [peer for peer in peers if peer not in self._listening]

    def draft(self) -> Tensor:
        return torch.empty(self.capacity, dtype=torch.uint8)

    def post(self, peer: int, draft: Tensor, length: int) -> None:
        arrives = self._world.carry(self._group.rank, peer, length)
        key = (self._number, self._group.rank, peer)
        self._world.posted.setdefault(key, deque()).append((arrives, draft[:length].clone()))
        self._group.count(length)

    def take(self) -> list[Letter]:
        now, found = self._group.seconds(), []
        for peer in self._listening:
            queue = self._from(peer)
            while queue and queue[0][0] <= now:
                arrived, content = queue.popleft()
                found.append((arrived, peer, content))
        found.sort(key=lambda one: one[:2])
        return [Letter(peer, content, content) for _, peer, content in found]

    def returned(self) -> list[Letter]:
        return []

    def recycle(self, letter: Letter) -> None:
        return None

    def wait(self, peers: Collection[int]) -> None:
        def ready() -> float | None:
            moments = [queue[0][0] for peer in self._listening if (queue := self._from(peer))]
            closed = (self._world.closed.get((self._number, peer)) for peer in peers)
            moments += [moment for moment in closed if moment is not None]
            return min(moments, default=None)

        self._world.turns.wait(self._group.rank, ready, f"the mailbox, for rank {', '.join(map(str, sorted(peers)))}")

    def close(self, *, alone: bool = False) -> None:
        self._world.closed[self._number, self._group.rank] = self._group.seconds()

    def _from(self, peer: int) -> deque[tuple[float, Tensor]]:
        return self._world.posted.setdefault((self._number, peer, self._group.rank), deque())
