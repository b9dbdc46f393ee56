"""A group that goes on without the ranks that died.

Every verb is the inner group's, on copies. When one fails, those who are alive meet in the store: each writes how many
verbs it has completed, waits until everybody has who is not known to be dead, and the first to see that writes down who
goes on. They connect anew, numbered in the old order. A verb needs all ranks, so those who had completed it before it
failed elsewhere are at most one ahead, and give its result to the others. So every verb has one result, on all who are
left.

Death is a connection that has closed, as a mailbox tells. A rank that is silent may be alive: after the timeout it is a
`PeerLost`, as in every group.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .group import Group, Pending
from .mailbox import Mailbox
from .meeting import Store, named
from .training import PeerLost

R = TypeVar("R")

_PAUSE = 0.02


class Renewable(Group, Protocol):
    """What is asked of the group that ranks start with."""

    timeout: float
    step: int | None
    store: Store | None

    def again(self, members: Sequence[int], epoch: int) -> Group:
        """A new group of these ranks, who all call this with the same numbers."""
        ...


class Survivors:
    """The ranks of a group, as long as they live. rank and size change when one dies, at the verb that finds out.

    name: the number that this rank started with; names: those of all who are left, in order; epoch: how often they met.
    """

    def __init__(self, group: Renewable) -> None:
        assert group.store is not None
        self.name, self.names, self.epoch = group.rank, tuple(range(group.size)), 0
        self.timeout = group.timeout
        self.evidence: Callable[[], Iterable[int]] = tuple
        """The names that a mailbox of this rank knows to be gone."""
        self._start, self._inner = group, cast("Group", group)
        self._store = named(group.store, "piecework/survivors")
        self._completed, self._last = 0, cast("Any", None)
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

    def _meet(self, lost: PeerLost) -> bool:
        """Connect those who are left; returns whether this rank was given the result of the verb that failed here."""
        store = named(self._store, f"epoch {self.epoch + 1}")
        store.set(f"here/{self.name}", str(self._completed))
        names = self._agreed(store, lost)
        completed = [int(store.get(f"here/{name}")) for name in names]
        self._counted = (self.bytes_sent, self.rounds)
        self._inner = self._start.again(names, self.epoch + 1)
        cast("Any", self._inner).step = self._start.step
        self.names, self.epoch = names, self.epoch + 1
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


def surviving(group: Group) -> Group:
    """The group, made to go on without the ranks that die, where it can; one rank stays as it is."""
    able = group.size > 1 and hasattr(group, "again") and getattr(group, "store", None) is not None
    return cast("Group", Survivors(cast("Renewable", group))) if able else group
