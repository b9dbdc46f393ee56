"""Who waited for whom, when: what ranks note of their waits, and what all of them say together.

A rank notes each wait: the verb, for whom if that is known, when it came and when it went on. In a verb of all ranks
nobody is named; whoever came last was waited for, which only the notes of all ranks tell. Where those of a rank are
missing, because it is dead or had more waits than are kept, nobody is said to be late. Ranks have the numbers that they
started with. Times are training seconds:
`fit` sets the ranks' clocks alike after each evaluation, when all have just met, and evaluations are no part of it. So
clocks agree as well as ranks leave a small all-reduce together.
"""

from __future__ import annotations

import json
import math
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
    """The waits of one rank: the first and the last of them. Nothing is noted before `begin`, nor after `pause`.

    rank, ranks: the number that this rank started with, and those of all who are there, in their order of now."""

    def __init__(self, rank: int = 0, ranks: Sequence[int] = (0,)) -> None:
        self.rank, self.ranks = rank, tuple(ranks)
        self._calls = 0  # of verbs of all ranks, noted or not: the same number on all
        self._first: list[list[Any]] = []
        self._last: deque[list[Any]] = deque(maxlen=LAST)
        self._num = 0
        self._origin: float | None = None

    def meet(self, rank: int, ranks: Sequence[int]) -> None:
        """From now on these are the ranks that are there, after others have gone or come."""
        self.rank, self.ranks, self._calls = rank, tuple(ranks), 0

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
        self._calls += not peers
        if self._origin is not None:
            kept = self._first if self._num < FIRST else self._last
            known = [self.ranks[peer] if peer < len(self.ranks) else peer for peer in peers]
            together = [] if peers else [self._calls, len(self.ranks)]
            kept.append([step or 0, verb, known, began - self._origin, ended - self._origin, *together])
            self._num += 1

    def read(self) -> dict[str, Any]:
        """All that was kept."""
        waits = [*self._first, *self._last]
        return {"rank": self.rank, "waits": waits, "left_out": self._num - len(waits)}


@dataclass(frozen=True)
class Wait:
    """peers: who was waited for, by number; none where it was all. began, ended: training seconds. call: the number of
    a verb of all ranks; of: how many ranks took part in it."""

    rank: int
    step: int
    verb: str
    peers: tuple[int, ...]
    began: float
    ended: float
    call: int = 0
    of: int = 0


@dataclass(frozen=True)
class Timeline:
    """left_out: how many waits were not kept, all ranks together."""

    waits: list[Wait]
    left_out: int


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
    rows: list[dict[str, Any]] = []
    for one in told:
        for step, verb, peers, began, ended, *together in one["waits"]:
            row = {"rank": one["rank"], "step": step, "verb": verb, "peers": peers, "began": began, "ended": ended}
            rows.append(row | dict(zip(("call", "of"), together, strict=False)))
        if one["left_out"]:
            rows.append({"rank": one["rank"], "left_out": one["left_out"]})
    before = storage.read_bytes(path) if more and storage.is_there(path) else b""
    storage.replace_bytes(path, before + "".join(json.dumps(row) + "\n" for row in rows).encode())


def read(path: Path) -> Timeline:
    """Raises BadInput for a file that `write` has not written."""
    waits, left_out = [], 0
    for number, line in enumerate(storage.read_bytes(path).decode(errors="replace").splitlines(), start=1):
        row = storage.parse_json(line, path)
        try:
            if "left_out" in row:
                left_out += int(row["left_out"])
                continue
            wait = Wait(
                int(row["rank"]), int(row["step"]), str(row["verb"]), tuple(map(int, row["peers"])),
                float(row["began"]), float(row["ended"]), int(row.get("call", 0)), int(row.get("of", 0)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise BadInput(f"{path} is damaged: row {number} is not of a timeline") from error
        if not 0 <= wait.rank < 100_000 or not wait.began <= wait.ended < math.inf:
            raise BadInput(f"{path} is damaged: row {number} has a time or a rank that cannot be")
        waits.append(wait)
    return Timeline(waits, left_out)


def parts(waits: Sequence[Wait]) -> list[Part]:
    """Waits as parts: those for all ranks end, as waiting, when the last one came; from then on messages travel."""
    together: dict[tuple[int, str, int], list[Wait]] = {}
    found = []
    for wait in waits:
        if wait.peers:
            found.append(Part(wait.rank, wait.step, wait.peers[0], wait.began, wait.ended))
        else:
            together.setdefault((wait.step, wait.verb, wait.call), []).append(wait)
    for calls in together.values():
        last = max(calls, key=lambda one: one.began)
        all_told = len(calls) == last.of
        for wait in calls:
            met = min(max(last.began, wait.began), wait.ended) if all_told else wait.began
            if met > wait.began and last.rank != wait.rank:
                found.append(Part(wait.rank, wait.step, last.rank, wait.began, met))
            if wait.ended > met:
                found.append(Part(wait.rank, wait.step, None, met, wait.ended))
    return sorted(found, key=lambda one: (one.began, one.rank))


def waits_of(group: Group) -> Waits | None:
    """Where the group notes its waits, if it does."""
    found = getattr(group, "waits", None)
    return found if isinstance(found, Waits) else None
