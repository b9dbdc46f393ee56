"""A group that goes on when ranks die or leave, and that others can join.

Every verb is the inner group's, on copies. When one fails, those who are alive meet in the store: each writes how many
verbs it has completed, waits until everybody has who is not known to be gone, and the first to see that writes down who
goes on. They connect anew, numbered in the old order. A verb needs all ranks, so those who had completed it before it
failed elsewhere are at most one ahead, and give its result to the others. So every verb has one result, on all who are
left.

Gone is a rank whose connections have closed, as a mailbox tells, or that has said that it leaves. One that is silent
may be alive: after the timeout it is a `PeerLost`, as in every group. Newcomers (`newcomers.py`) ask in the store, and
are let in where all ranks call `admit`.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..group import Group, Pending
from ..timeline import Waits, waits_of
from ..training import PeerLost
from . import newcomers
from .mailbox import Mailbox
from .meeting import Store, named
from .newcomers import Newcomer

R = TypeVar("R")

_PAUSE = 0.02
_LONGEST_ENTRY = 30.0
"""Seconds that ranks wait for a newcomer which has asked and then does not come."""


class Renewable(Group, Protocol):
    """What is asked of the group that ranks start with."""

    timeout: float
    step: int | None
    store: Store | None

    def again(self, store: Store, name: int, members: Sequence[int], epoch: int, timeout: float) -> Group:
        """A new group of these names, of which this rank's is one. All of them call this with the same numbers.

        store: for this epoch alone. Raises PeerLost where one does not come."""
        ...

    def hang_up(self) -> None:
        """Close the connections to the other ranks, so that none waits for this one in a verb."""
        ...


class Survivors:
    """The ranks of a group, as long as they are there. rank and size change at the verb that finds out.

    name: the number that this rank started with, or was given when it came; names: those of all who are there, in
    order; epoch: how often they met; fresh: whether this rank has come last and has not been told yet where they are.
    """

    def __init__(self, group: Renewable) -> None:
        assert group.store is not None
        self.name, self.names, self.epoch, self.fresh = group.rank, tuple(range(group.size)), 0, False
        self._take(group, group)
        own = torch.frombuffer(bytearray(os.urandom(8)), dtype=torch.uint8)
        identity = bytes(group.gather(own)[0].tolist()).hex()
        self._store = newcomers.room(group.store, identity)
        self._completed, self._answered, self._last = 0, 0, cast("Any", None)
        if self.name == 0:
            newcomers.open_door(group.store, identity)

    @classmethod
    def entered(cls, own: Renewable, entry: newcomers.Entry) -> Survivors:
        """As a rank that others have let in. own: a group of this process alone."""
        group = cls.__new__(cls)
        group.name, group.names, group.epoch, group.fresh = entry.name, entry.names, entry.epoch, True
        group._store = entry.room
        met = own.again(group._at(entry.epoch), entry.name, entry.names, entry.epoch, _entry_timeout(own.timeout))
        group._take(own, met)
        group._completed, group._answered, group._last = entry.completed, entry.answered, None
        return group

    def _take(self, start: Renewable, inner: Group) -> None:
        self.timeout = start.timeout
        self.evidence: Callable[[], Iterable[int]] = tuple
        """The names that a mailbox of this rank knows to be gone, or to leave."""
        self._start, self._inner = start, inner
        self._counted = (0, 0)

    @property
    def rank(self) -> int:
        return self.names.index(self.name)

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def bytes_sent(self) -> int:
        return self._counted[0] + self._inner.bytes_sent

    @property
    def rounds(self) -> int:
        return self._counted[1] + self._inner.rounds

    @property
    def waits(self) -> Waits | None:
        return waits_of(self._start)

    @property
    def step(self) -> int | None:
        return self._start.step

    @step.setter
    def step(self, step: int | None) -> None:
        self._start.step = step
        if self._inner is not self._start:
            cast("Any", self._inner).step = step

    def sum_(self, *tensors: Tensor) -> None:
        def work(group: Group) -> list[Tensor]:
            copies = [tensor.detach().clone() for tensor in tensors]
            group.sum_(*copies)
            return copies

        for tensor, total in zip(tensors, self._together(work), strict=True):
            tensor.detach().copy_(total)

    def broadcast_(self, tensor: Tensor, src: int = 0) -> None:
        def work(group: Group) -> Tensor:
            copy = tensor.detach().clone()
            group.broadcast_(copy, min(src, group.size - 1))
            return copy

        tensor.detach().copy_(self._together(work))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return self._together(lambda group: group.gather(tensor))

    def any(self, flag: bool) -> bool:
        return self._together(lambda group: group.any(flag))

    def exchange(self, send: Mapping[int, Tensor], recv: Mapping[int, Tensor]) -> Pending:
        """As the inner group's: a peer that dies meanwhile is lost."""
        return self._inner.exchange(send, recv)

    def mailbox(self, capacity: int) -> Mailbox:
        """Of the ranks that are left now, by their numbers now."""
        return self._inner.mailbox(capacity)

    def _together(self, work: Callable[[Group], R]) -> R:
        while True:
            try:
                result = work(self._inner)
            except PeerLost as lost:
                behind = self._meet(lost)
                if not behind:
                    continue
                result = self._last
            self._completed, self._last = self._completed + 1, result
            return result

    def hang_up(self) -> None:
        """Take part in no more verbs: this rank leaves. Others who wait for it in one are told."""
        cast("Renewable", self._inner).hang_up()

    def admit(self, refuse: Callable[[Any], str | None]) -> int:
        """Let those in who have asked; returns how many. Collective.

        refuse: why a newcomer with these notes cannot be let in, if so; asked on one rank."""

        def work(group: Group) -> list[Tensor]:
            found = newcomers.at_the_door(self._store, self._answered, refuse) if group.rank == 0 else None
            return group.gather(newcomers.written(found))

        found = newcomers.read(self._together(work)[0])
        self._answered = found.answered
        names = (*self.names, *found.welcome)
        newcomers.answer(self._store, found, names, self.epoch + 1, self._completed)
        if not found.welcome:
            return 0
        with suppress(PeerLost):
            self._connect(names, self.epoch + 1, _entry_timeout(self.timeout))
            return len(found.welcome)
        self._connect(self.names, self.epoch + 2, self.timeout)  # it has asked, and ended before it came
        return 0

    def _at(self, epoch: int) -> Store:
        return named(self._store, f"epoch {epoch}")

    def _connect(self, names: tuple[int, ...], epoch: int, timeout: float) -> None:
        inner = self._start.again(self._at(epoch), self.name, names, epoch, timeout)
        self._counted = (self.bytes_sent, self.rounds)
        self._inner, self.names, self.epoch = inner, names, epoch
        cast("Any", inner).step = self._start.step

    def _meet(self, lost: PeerLost) -> bool:
        """Connect those who are left; returns whether this rank was given the result of the verb that failed here."""
        store = self._at(self.epoch + 1)
        store.set(f"here/{self.name}", str(self._completed))
        names = self._agreed(store, lost)
        completed = [int(store.get(f"here/{name}")) for name in names]
        self._connect(names, self.epoch + 1, self.timeout)
        if min(completed) == max(completed):
            return False
        self._last = self._shared(completed.index(max(completed)))
        return self._completed < max(completed)

    def _agreed(self, store: Store, lost: PeerLost) -> tuple[int, ...]:
        until = time.monotonic() + self.timeout
        while not store.check(["names"]):
            for name in self.evidence():
                store.set(f"gone/{name}", "")
            here = [name for name in self.names if store.check([f"here/{name}"])]
            gone = [name for name in self.names if store.check([f"gone/{name}"])]
            if gone and set(here) | set(gone) == set(self.names):
                store.compare_set("names", "", json.dumps(here))
            elif time.monotonic() > until:
                raise lost
            else:
                time.sleep(_PAUSE)
        names = tuple(json.loads(store.get("names")))
        if self.name not in names:
            raise PeerLost(
                rank=self.name, peer=None, verb=lost.verb, timeout=self.timeout, step=lost.step,
                cause="the others took this rank for dead and went on",
            )  # fmt: skip
        return names

    def _shared(self, source: int) -> Any:
        """The last result of a rank that is ahead, on all."""
        buffer = io.BytesIO()
        if self.rank == source:
            torch.save(self._last, buffer)
        own = torch.frombuffer(bytearray(buffer.getvalue() or b"-"), dtype=torch.uint8)
        found = self._inner.gather(own)[source]
        return torch.load(io.BytesIO(found.numpy().tobytes()), weights_only=True)


def _entry_timeout(timeout: float) -> float:
    return min(timeout, _LONGEST_ENTRY)


def surviving(group: Group | Newcomer, notes: Callable[[], Any] = dict) -> Group:
    """The group, made to go on without the ranks that die, where it can; one rank stays as it is.

    notes: what a newcomer has to say of itself to those that it wants to join."""
    if isinstance(group, Newcomer):
        return cast("Group", Survivors.entered(cast("Renewable", group.alone), group.ask(notes())))
    able = group.size > 1 and hasattr(group, "hang_up") and getattr(group, "store", None) is not None
    return cast("Group", Survivors(cast("Renewable", group))) if able else group
