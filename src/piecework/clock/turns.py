"""Threads that take turns: one runs at a time, always the one whose virtual time is the least."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Lock

from ..training import PeerLost

Ready = Callable[[], float | None]
"""When what is waited for is there, in virtual seconds; None if nobody has sent it yet."""


class Turns:
    """The time of each rank, and whose turn it is. All calls are made by the rank whose turn it is.

    Whoever has the turn is the earliest, so all that happens before its time has happened already: what it sees does
    not depend on the machine."""

    def __init__(self, size: int) -> None:
        self.now = [0.0] * size
        self.doing = [""] * size
        """What each rank waits for, in words."""
        self._ready: list[Ready | None] = [None] * size
        self._ended = [False] * size
        self._turns = [Lock() for _ in range(size)]
        for turn in self._turns:
            turn.acquire()
        self._stuck = False

    def begin(self) -> None:
        """Give the first turn. Called once, from outside."""
        self._turns[0].release()

    def enter(self, rank: int) -> None:
        self._turns[rank].acquire()

    def pass_time(self, rank: int, seconds: float) -> None:
        """Let the rank be busy for so long."""
        self.now[rank] += seconds
        self._next(rank)

    def wait(self, rank: int, ready: Ready, what: str) -> None:
        """Let the rank sleep until `ready` says that it is time. Raises PeerLost where that will never be."""
        self._ready[rank], self.doing[rank] = ready, what
        self._next(rank)
        if self._stuck:
            told = "; ".join(
                f"rank {other} {'has ended' if self._ended[other] else f'waits in {doing}'}"
                for other, doing in enumerate(self.doing)
                if self._ended[other] or self._ready[other] is not None
            )
            self._ready[rank] = None
            raise PeerLost(rank=rank, peer=None, verb=what, timeout=0.0, cause=f"nobody can go on: {told}")
        moment = ready()
        assert moment is not None
        self._ready[rank] = None
        self.now[rank] = max(self.now[rank], moment)

    def end(self, rank: int) -> None:
        """The rank has no more turns."""
        self._ended[rank] = True
        following = self._earliest()
        if following is not None:
            self._turns[following].release()

    def _next(self, rank: int) -> None:
        following = self._earliest()
        assert following is not None
        if following != rank:
            self._turns[following].release()
            self._turns[rank].acquire()

    def _earliest(self) -> int | None:
        """Who can go on first; where nobody can, all are told, one after the other."""
        best, when = None, math.inf
        alive = [rank for rank, ended in enumerate(self._ended) if not ended]
        for rank in alive:
            moment = self._moment(rank)
            if moment < when:
                best, when = rank, moment
        if best is None and alive:
            self._stuck = True
            return alive[0]
        return best

    def _moment(self, rank: int) -> float:
        ready = self._ready[rank]
        if ready is None:
            return self.now[rank]
        moment = ready()
        return math.inf if moment is None else max(self.now[rank], moment)
