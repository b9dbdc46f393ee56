"""The mailbox of ranks that are threads: what `GlooMailbox` does, without sockets and without a pulse."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable
from threading import Condition
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ranks.mailbox import Letter
from ..training import PeerLost

if TYPE_CHECKING:
    from .in_memory import Threads


class Office:
    """Where all mailboxes of one number meet: what is under way, and who posts no more."""

    def __init__(self) -> None:
        self.under_way: dict[tuple[int, int], deque[Tensor]] = {}
        self.closed: set[int] = set()
        self.leaving: set[int] = set()


class MemoryMailbox:
    """One rank's mailbox. A peer that has neither posted nor gone within the group's timeout is an error."""

    def __init__(
        self, group: Threads, office: Office, changed: Condition, dead: Collection[int], capacity: int
    ) -> None:
        self.capacity = capacity
        self._group, self._office, self._changed, self._dead = group, office, changed, dead
        self._listening: list[int] = []
        self._returned: list[Letter] = []
        self._noticed: frozenset[int] = frozenset()

    @property
    def leaving(self) -> frozenset[int]:
        with self._changed:
            self._noticed = frozenset(self._office.leaving - {self._group.rank})
            return self._noticed

    def announce(self) -> None:
        with self._changed:
            self._office.leaving.add(self._group.rank)
            self._changed.notify_all()

    @property
    def gone(self) -> frozenset[int]:
        with self._changed:
            return frozenset(self._office.closed | set(self._dead))

    def listen(self, peers: Iterable[int]) -> None:
        self._listening += [peer for peer in peers if peer not in self._listening]

    def draft(self) -> Tensor:
        return torch.full((self.capacity,), 0xA5, dtype=torch.uint8)

    def post(self, peer: int, draft: Tensor, length: int) -> None:
        if not 0 <= length <= self.capacity or len(draft) != self.capacity:
            raise ValueError(f"a message of {length} bytes does not fit a mailbox of {self.capacity}")
        content = draft[:length].clone()
        draft.fill_(0xA5)  # whoever uses it again is found out
        with self._changed:
            if peer in self._dead or peer in self._office.closed:
                self._returned.append(Letter(peer, content, content))
            else:
                self._office.under_way.setdefault((self._group.rank, peer), deque()).append(content)
            self._changed.notify_all()
        self._group.count(length)

    def take(self) -> list[Letter]:
        found = []
        with self._changed:
            for peer in self._listening:
                queue = self._office.under_way.get((peer, self._group.rank), deque())
                found += [Letter(peer, content, content) for content in queue]
                queue.clear()
        return found

    def returned(self) -> list[Letter]:
        with self._changed:
            for peer in {*self._dead, *self._office.closed}:
                queue = self._office.under_way.pop((self._group.rank, peer), deque())
                self._returned += [Letter(peer, content, content) for content in queue]
            found, self._returned = self._returned, []
        return found

    def recycle(self, letter: Letter) -> None:
        letter.whole.fill_(0xA5)

    def wait(self, peers: Collection[int]) -> None:
        with self._group.waits.waiting("mailbox", self._group.step, sorted(peers)):
            self._wait(peers)

    def _wait(self, peers: Collection[int]) -> None:
        until = time.monotonic() + self._group.timeout
        with self._changed:
            while not self._anything() and not {*self._dead, *self._office.closed} & set(peers):
                if self._office.leaving - {self._group.rank} != self._noticed:
                    return
                left = until - time.monotonic()
                if left <= 0:
                    raise PeerLost(
                        rank=self._group.rank,
                        peer=next(iter(peers)) if len(peers) == 1 else None,
                        verb="the mailbox",
                        timeout=self._group.timeout,
                        step=self._group.step,
                        cause="nothing has come",
                    )
                self._changed.wait(left)

    def close(self, *, alone: bool = False) -> None:
        with self._changed:
            self._office.closed.add(self._group.rank)
            self._changed.notify_all()

    def _anything(self) -> bool:
        return any(self._office.under_way.get((peer, self._group.rank)) for peer in self._listening)
