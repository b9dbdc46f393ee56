"""Processes that join ranks at work: they ask in the ranks' store, and wait to be let in.

A newcomer reads on the door which ranks are there, takes the next free number, writes what it has to say of itself, and
then again and again that it is still there, until an answer comes: the names of all ranks, itself among them, or why
not. Numbers are used once, so no name ever means two processes.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from threading import Event, Thread
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..training import BadInput, PeerLost
from .meeting import Store, ground, named, within
from .process_group import Ranks

FIRST = 1_000_000
"""The name of the first newcomer: above all ranks that a job may start with."""

_BEAT = 0.1


@dataclass(frozen=True)
class Entry:
    """What a newcomer is told: its name, all names, and how far they are."""

    room: Store
    name: int
    names: tuple[int, ...]
    epoch: int
    completed: int
    answered: int


@dataclass(frozen=True)
class Asked:
    """Who is at the door: names to let in, why others are not, and how many have been answered in all."""

    welcome: list[int] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    answered: int = 0


def room(store: Store, identity: str) -> Store:
    """Where these ranks, and no others that use the same store, meet."""
    return named(ground(store), f"piecework/{identity}")


def open_door(store: Store, identity: str) -> None:
    """Tell newcomers which ranks they can join: those that opened it last."""
    named(ground(store), "piecework").set("door", identity)


def at_the_door(store: Store, answered: int, refuse: Callable[[Any], str | None]) -> Asked:
    """Those who have asked since, and are still there."""
    asked = []
    while store.check([f"ask/{answered}"]):
        asked.append(answered)
        answered += 1
    if not asked:
        return Asked(answered=answered)
    before = {number: _beat(store, number) for number in asked}
    time.sleep(5 * _BEAT)
    found = Asked(answered=answered)
    for number in asked:
        why = refuse(json.loads(store.get(f"ask/{number}"))["notes"])
        if why is not None:
            found.refused[str(number)] = why
        elif _beat(store, number) == before[number]:
            found.refused[str(number)] = f"it was silent for {5 * _BEAT:g} s when they looked"
        else:
            found.welcome.append(FIRST + number)
    return found


def _beat(store: Store, number: int) -> bytes:
    return store.get(f"beat/{number}") if store.check([f"beat/{number}"]) else b""


def written(asked: Asked | None) -> Tensor:
    """As bytes; of a rank that has not looked, none to speak of."""
    return torch.frombuffer(bytearray(json.dumps(asked and asdict(asked)).encode()), dtype=torch.uint8)


def read(message: Tensor) -> Asked:
    return Asked(**json.loads(message.numpy().tobytes()))


def answer(store: Store, asked: Asked, names: Sequence[int], epoch: int, completed: int) -> None:
    """Tell those at the door. Every rank says the same, so that it is said even if one ends meanwhile."""
    told = {"names": names, "epoch": epoch, "completed": completed, "answered": asked.answered}
    for name in asked.welcome:
        store.set(f"answer/{name - FIRST}", json.dumps(told))
    for number, why in asked.refused.items():
        store.set(f"answer/{number}", json.dumps({"refused": why}))


class Newcomer:
    """A process that is to join ranks at work, with their store. `Gossip.attach` and `bind` take it as their group."""

    def __init__(self, store: Store, *, timeout: float) -> None:
        self.store, self.timeout = store, timeout
        self.alone = Ranks.met(named(store, f"piecework/alone {secrets.token_hex(8)}"), 0, 1, timeout=timeout)
        """A group of this process."""

    def ask(self, notes: Any) -> Entry:
        """Wait to be let in. Raises BadInput with the others' reason where they refuse, PeerLost after the timeout."""
        until = time.monotonic() + self.timeout
        door = named(self.store, "piecework")
        while not door.check(["door"]):
            self._give_up(until, "no ranks are at work there that could be joined")
        own = room(self.store, door.get("door").decode())
        number = _number(own, notes)
        done = Event()
        Thread(target=_be_there, args=(own.clone(), number, done), name="piecework-asking", daemon=True).start()
        try:
            while not own.check([f"answer/{number}"]):
                self._give_up(until, "they have not called admit()")
        finally:
            done.set()
        told = json.loads(own.get(f"answer/{number}"))
        if "refused" in told:
            raise BadInput(f"the ranks at work refuse this one: {told['refused']}")
        names = tuple(told["names"])
        return Entry(own, FIRST + number, names, told["epoch"], told["completed"], told["answered"])

    def _give_up(self, until: float, why: str) -> None:
        if time.monotonic() > until:
            raise PeerLost(rank=0, peer=None, verb="the entry", timeout=self.timeout, cause=why)
        time.sleep(_BEAT)


def _number(store: Store, notes: Any) -> int:
    """The next one that nobody has."""
    own, number = json.dumps({"notes": notes, "by": secrets.token_hex(8)}), 0
    while store.compare_set(f"ask/{number}", "", own) != own.encode():
        number += 1
    return number


def _be_there(store: Store, number: int, done: Event) -> None:
    beats = 0
    with suppress(RuntimeError):
        while not done.wait(_BEAT):
            beats += 1
            store.set(f"beat/{number}", str(beats))


@contextmanager
def joining(host: str, port: int, *, timeout: float = 600.0) -> Iterator[Newcomer]:
    """A process that joins ranks at work, to be given to `Gossip.attach` or `bind` as their group.

    host, port: of the ranks' store: MASTER_ADDR and MASTER_PORT there. timeout: seconds to wait to be let in, and of
    each verb after that. Raises BadInput where no store answers. Leaves the ranks' connections on the way out."""
    if not timeout > 0:
        raise BadInput(f"timeout is in seconds and must be positive; got {timeout}")
    make = partial(dist.TCPStore, host, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    try:
        store = within(timeout + 1.0, lambda: make(timeout=timedelta(seconds=timeout)))
    except (RuntimeError, TimeoutError) as error:
        raise BadInput(f"no store of ranks answers at {host}:{port} within {timeout:g} s") from error
    newcomer = Newcomer(cast("Store", store), timeout=timeout)
    try:
        yield newcomer
    finally:
        newcomer.alone.leave()
