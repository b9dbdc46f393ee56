"""Who waited for whom, when: what ranks note of their waits, and what all of them say together.

A rank notes each wait: the verb, for whom if that is known, when it came and when it went on. In a verb of all ranks
nobody is named; whoever came last was waited for, which only the notes of all ranks tell. Times are training seconds:
`fit` sets the ranks' clocks alike after each evaluation, when all have just met, and evaluations are no part of it. So
clocks agree as well as ranks leave a small all-reduce together.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import storage
from .training import BadInput

if TYPE_CHECKING:
    from .group import Group

TIMELINE = "timeline.jsonl"
FIRST, LAST = 500, 1500
"""How many of its waits a rank keeps."""


class Waits:
    """The waits of one rank: the first and the last of them. Nothing is noted before `begin`, nor after `pause`."""

    def __init__(self) -> None:
        self._first: list[list[Any]] = []
        self._last: deque[list[Any]] = deque(maxlen=LAST)
        self._num = 0
        self._origin: float | None = None

    def begin(self, seconds: float = 0.0) -> None:
        """Note from now on; now is so many training seconds."""
        self._origin = time.perf_counter() - seconds

    def pause(self) -> None:
        self._origin = None

    @contextmanager
    def waiting(self, verb: str, step: int | None, peers: Sequence[int] = ()) -> Iterator[None]:
        """Note how long this takes. peers: who is waited for; none where it is all ranks."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.note(verb, step, peers, began, time.perf_counter())

    def note(self, verb: str, step: int | None, peers: Sequence[int], began: float, ended: float) -> None:
        """began, ended: of `time.perf_counter`."""
        if self._origin is not None:
            kept = self._first if self._num < FIRST else self._last
            kept.append([step or 0, verb, list(peers), began - self._origin, ended - self._origin])
            self._num += 1

    def read(self) -> dict[str, Any]:
        """All that was kept."""
        waits = [*self._first, *self._last]
        return {"waits": waits, "left_out": self._num - len(waits)}


@dataclass(frozen=True)
class Wait:
    """peers: who was waited for, by number; none where it was all. began, ended: training seconds."""

    rank: int
    step: int
    verb: str
    peers: tuple[int, ...]
    began: float
    ended: float


@dataclass(frozen=True)
class Part:
    """A stretch of a rank's time that was no computation: waiting for a rank, or (peer None) for messages to travel."""

    rank: int
    step: int
    peer: int | None
    began: float
    ended: float


def write(path: Path, told: Sequence[Mapping[str, Any]], *, more: bool) -> None:
    """What `Waits.read` gave on each rank, as a row a wait. more: behind what the file has already."""
    lines = [
        json.dumps({"rank": rank, "step": step, "verb": verb, "peers": peers, "began": began, "ended": ended})
        for rank, one in enumerate(told)
        for step, verb, peers, began, ended in one["waits"]
    ]
    before = storage.read_bytes(path) if more and storage.is_there(path) else b""
    storage.replace_bytes(path, before + "".join(line + "\n" for line in lines).encode())


def read(path: Path) -> list[Wait]:
    """Raises BadInput for a file that `write` has not written."""
    found = []
    for number, line in enumerate(storage.read_bytes(path).decode(errors="replace").splitlines(), start=1):
        row = storage.parse_json(line, path)
        try:
            wait = Wait(
                int(row["rank"]), int(row["step"]), str(row["verb"]), tuple(map(int, row["peers"])),
                float(row["began"]), float(row["ended"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{path} is damaged: row {number} is not of a timeline") from error
        if not 0 <= wait.rank < 100_000 or not wait.began <= wait.ended:
            raise BadInput(f"{path} is damaged: row {number} has a time or a rank that cannot be")
        found.append(wait)
    return found


def parts(waits: Sequence[Wait]) -> list[Part]:
    """Waits as parts: those for all ranks end, as waiting, when the last one came; from then on messages travel."""
    together: dict[tuple[int, str, int], list[Wait]] = {}
    counts: dict[tuple[int, int, str], int] = {}
    found = []
    for wait in sorted(waits, key=lambda one: one.began):
        if wait.peers:
            found.append(Part(wait.rank, wait.step, wait.peers[0], wait.began, wait.ended))
        else:
            place = (wait.rank, wait.step, wait.verb)
            counts[place] = counts.get(place, -1) + 1
            together.setdefault((wait.step, wait.verb, counts[place]), []).append(wait)
    for calls in together.values():
        last = max(calls, key=lambda one: one.began)
        for wait in calls:
            met = min(max(last.began, wait.began), wait.ended)
            if met > wait.began and last.rank != wait.rank:
                found.append(Part(wait.rank, wait.step, last.rank, wait.began, met))
            if wait.ended > met:
                found.append(Part(wait.rank, wait.step, None, met, wait.ended))
    return sorted(found, key=lambda one: (one.began, one.rank))


def waits_of(group: Group) -> Waits | None:
    """Where the group notes its waits, if it does."""
    found = getattr(group, "waits", None)
    return found if isinstance(found, Waits) else None
