"""The verbs of a Group in virtual time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..group import Pending
from ..ranks import messages
from ..testing.faults import thread_rank
from ..training import PeerLost
from .link import Link
from .mail import ClockMailbox
from .turns import Turns

R = TypeVar("R")


@dataclass
class _Call:
    """A collective call: what each rank has brought; when it ends, and with what, once all have."""

    verb: str
    offers: dict[int, Any] = field(default_factory=dict)
    result: Any = None
    ends: float | None = None
    left: int = 0


class World:
    """What the ranks of one clock share."""

    def __init__(self, size: int, link: Link) -> None:
        self.size, self.link = size, link
        self.turns = Turns(size)
        self.calls: dict[int, _Call] = {}
        self.sent: dict[tuple[int, int], deque[tuple[float, Tensor]]] = {}  # (source, target) -> (arrival, content)
        self.posted: dict[tuple[int, int, int], deque[tuple[float, Tensor]]] = {}  # the same with a mailbox's number
        self.closed: dict[tuple[int, int], float] = {}  # (mailbox, rank) -> when it was closed
        self._out = [0.0] * size
        self._in = [0.0] * size
        self._switch = 0.0

    def carry(self, source: int, target: int, num_bytes: float, posted: float | None = None) -> float:
        """Put a message on the link, now or at a moment to come; returns when it arrives."""
        busy, latency = self.link.passing_s(num_bytes), self.link.latency_s
        now = self.turns.now[source]
        begins = max(now if posted is None else posted, self._out[source])
        self._out[source] = begins + busy
        # From now on, and not from `begins`: what waits at its sender must not hold up the messages of others.
        self._switch = max(now, self._switch) + self.link.switching_s(num_bytes)
        self._in[target] = max(max(begins + latency, self._in[target]) + busy, self._switch + latency)
        return self._in[target]


class ClockGroup:
    """One rank on a virtual clock. `compute` passes time; every verb takes what its messages take on the link.

    Sums are added up in rank order: the same bits in every run. Where nobody can go on, `PeerLost` says who waits for
    what, at once."""

    def __init__(self, rank: int, world: World) -> None:
        self.rank, self.size = rank, world.size
        self.bytes_sent = 0
        self.rounds = 0
        self.step: int | None = None
        self._world, self._turns = world, world.turns
        self._num_calls = self._num_mailboxes = 0

    def seconds(self) -> float:
        """This rank's time."""
        return self._turns.now[self.rank]

    def compute(self, seconds: float) -> None:
        """Be busy for so long."""
        self._turns.pass_time(self.rank, seconds)

    def sum_(self, *tensors: Tensor) -> None:
        messages.check_summable("sum_", tensors)
        num_bytes = sum(map(messages.num_bytes, tensors))
        offer = [tensor.detach().clone() for tensor in tensors]
        totals = self._meet("sum_", offer, _sums, self._world.link.all_reduce_s(num_bytes, self.size))
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.detach().copy_(total)
        self.count(num_bytes)

    def sum_in_buckets(self, ready: Sequence[float], num_bytes: Sequence[float]) -> None:
        """Pass the time of all-reduces that follow each other while ranks compute; nothing is added up.

        ready: seconds before now at which this rank had the content of each bucket; num_bytes: of each, as they are,
        without the link's scale. A bucket begins when all ranks have it and the one before is through."""
        link = self._world.link
        moments = [self.seconds() - early for early in ready]

        def through(offers: list[list[float]]) -> float:
            end = 0.0
            for bucket, size in enumerate(num_bytes):
                end = max(end, *(offer[bucket] for offer in offers))
                end += link.all_reduce_s(size / link.scale, self.size)
            return end

        end = self._meet("sum_in_buckets", moments, through, 0.0)
        self._turns.wait(self.rank, lambda: end, "sum_in_buckets")

    def broadcast_(self, tensor: Tensor, src: int = 0) -> None:
        messages.check_source("broadcast_", src, size=self.size)
        cost = self._world.link.broadcast_s(messages.num_bytes(tensor), self.size)
        value = self._meet(f"broadcast_ from {src}", tensor.detach().clone(), lambda offers: offers[src], cost)
        tensor.detach().copy_(value)
        self.count(messages.num_bytes(tensor) if self.rank == src else 0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        cost = self._world.link.all_gather_s(messages.num_bytes(tensor), self.size)
        found = self._meet("gather", tensor.detach().clone(), list, cost)
        self.count(messages.num_bytes(tensor))
        return [one.clone() for one in found]

    def any(self, flag: bool) -> bool:
        self.count(1)
        return bool(self._meet("any", bool(flag), any, self._world.link.all_reduce_s(1, self.size)))

    def exchange(self, send: Mapping[int, Tensor], recv: Mapping[int, Tensor]) -> Pending:
        messages.check_peers("exchange", [*send, *recv], rank=self.rank, size=self.size)
        for peer, tensor in send.items():
            arrives = self._world.carry(self.rank, peer, messages.num_bytes(tensor))
            queue = self._world.sent.setdefault((self.rank, peer), deque())
            queue.append((arrives, tensor.detach().clone()))
        self.count(sum(map(messages.num_bytes, send.values())))
        return _Exchange(self, self._world, dict(recv))

    def there_and_back(self, peer: int, num_bytes: float) -> float:
        """When the answer arrives to a message posted now, both of so many bytes; the peer answers at once, whatever it
        computes. Nothing is in the messages."""
        arrives = self._world.carry(self.rank, peer, num_bytes)
        return self._world.carry(peer, self.rank, num_bytes, arrives)

    def mailbox(self, capacity: int) -> ClockMailbox:
        self._num_mailboxes += 1
        return ClockMailbox(self, self._world, self._num_mailboxes, capacity)

    def count(self, num_bytes: int) -> None:
        """Add a message to the account."""
        if self.size > 1:
            self.bytes_sent += num_bytes
            self.rounds += 1

    def _meet(self, verb: str, offer: Any, combine: Callable[[list[Any]], Any], cost: float) -> Any:
        number, self._num_calls = self._num_calls, self._num_calls + 1
        call = self._world.calls.setdefault(number, _Call(verb))
        if call.verb != verb:
            raise ValueError(f"rank {self.rank} is in {verb}, others in {call.verb}; all must make the same calls")
        call.offers[self.rank] = offer
        if len(call.offers) == self.size:
            call.result = combine([call.offers[rank] for rank in range(self.size)])
            call.ends, call.left = self.seconds() + cost, self.size
        self._turns.wait(self.rank, lambda: call.ends, verb)
        call.left -= 1
        if call.left == 0:
            del self._world.calls[number]
        return call.result


class _Exchange:
    def __init__(self, group: ClockGroup, world: World, recv: dict[int, Tensor]) -> None:
        self._group, self._world, self._recv = group, world, recv

    def wait(self) -> None:
        recv, self._recv = self._recv, {}
        for peer, buffer in recv.items():
            queue = self._world.sent.setdefault((peer, self._group.rank), deque())
            self._world.turns.wait(self._group.rank, partial(_first, queue), f"exchange with rank {peer}")
            buffer.detach().copy_(queue.popleft()[1].view(buffer.shape))


def _first(queue: deque[tuple[float, Tensor]]) -> float | None:
    return queue[0][0] if queue else None


def _sums(offers: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack([offer[place] for offer in offers]).sum(0) for place in range(len(offers[0]))]


def on_a_clock(size: int, fn: Callable[[ClockGroup], R], *, link: Link | None = None) -> list[R]:
    """fn(group) on so many ranks that share a virtual clock; the results in rank order.

    fn passes time by `group.compute`, and reads it by `group.seconds()`. Raises the first error of a rank that is not
    the consequence of another's."""
    world = World(size, link or Link())
    found: list[Any] = [None] * size
    failures: list[BaseException | None] = [None] * size

    def work(rank: int) -> None:
        world.turns.enter(rank)
        try:
            with thread_rank():
                found[rank] = fn(ClockGroup(rank, world))
        except BaseException as error:  # whatever ends a rank is its outcome
            failures[rank] = error
        world.turns.end(rank)

    torch.get_num_threads()  # before any rank looks
    ranks = [threading.Thread(target=work, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)]
    for thread in ranks:
        thread.start()
    world.turns.begin()
    for thread in ranks:
        thread.join()
    errors = [error for error in failures if error is not None]
    for error in sorted(errors, key=lambda one: isinstance(one, PeerLost)):
        raise error
    return found
