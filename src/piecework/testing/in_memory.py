"""A Group whose ranks are threads of one process: the same verbs and counts as `Ranks`, in microseconds, and stricter.

Stricter, because every mistake that would be garbage or a dead process on gloo is an error here: ranks in different
verbs, tensors that do not fit, a message longer than its buffer, a message changed before `wait()`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, Literal, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..group import Pending
from ..ranks import messages
from ..ranks.mailbox import Mailbox
from ..ranks.meeting import Store
from ..timeline import Waits
from ..training import PeerLost
from .in_memory_mail import MemoryMailbox, Office


@dataclass
class _Call:
    """A collective call under way: what each rank has brought, and what comes out when all have."""

    verbs: dict[int, str] = field(default_factory=dict)
    offers: dict[int, Any] = field(default_factory=dict)
    result: Any = None
    error: str | None = None
    done: bool = False
    abandoned: bool = False


@dataclass
class _Message:
    """One tensor on its way between two ranks; it has arrived when both ends have been posted."""

    sent: Tensor | None = None
    wanted: Tensor | None = None
    error: str | None = None

    @property
    def met(self) -> bool:
        return self.sent is not None and self.wanted is not None


class Board:
    """What the ranks of one `threads` share; every wait on it ends, by the timeout at the latest.

    size: ranks. wait: seconds a verb may wait. end: moment (`time.monotonic`) after which nobody waits any more."""

    def __init__(self, size: int, *, wait: float, end: float) -> None:
        self.size, self.wait, self.end_of_time = size, wait, end
        self._changed = Condition()
        self._calls: dict[int, _Call] = {}
        self._gone: dict[int, tuple[int, str]] = {}  # rank -> (who is to blame, what became of the rank)
        self._ended: dict[int, str] = {}  # rank -> how; who only gave up a call goes on
        self._between: dict[tuple[int, int], deque[_Message]] = {}
        self._doing: dict[int, str] = {}  # rank -> the verb it waits in
        self._offices: dict[int, Office] = {}  # by the number of the mailbox
        self._later: dict[int, tuple[Sequence[int], Board]] = {}  # members and board by epoch
        self.store: Store = cast("Store", cast("Any", dist).HashStore())

    def leave(self, rank: int, why: str, blame: int | None = None) -> None:
        """The rank makes no more calls; whoever waits for it loses it at once."""
        with self._changed:
            self._gone.setdefault(rank, (rank if blame is None else blame, why))
            for (source, target), queue in self._between.items():
                end = "sent" if source == rank else "wanted" if target == rank else None
                if end is not None and queue and getattr(queue[0], end) is not None:
                    queue.clear()  # what it has posted and nobody has met dies with it, as on a closed connection
            self._changed.notify_all()

    def end(self, rank: int, why: str) -> None:
        """The rank has come to its end, here and in every group made of this one."""
        self.leave(rank, why)
        with self._changed:
            self._ended[rank] = why
            self._changed.notify_all()
            later = list(self._later.values())
        for members, board in later:
            if rank in members:
                board.end(members.index(rank), why)

    def again(self, members: Sequence[int], epoch: int) -> Board:
        """The board on which these ranks go on."""
        with self._changed:
            if epoch not in self._later:
                self._later[epoch] = (members, Board(len(members), wait=self.wait, end=self.end_of_time))
            board = self._later[epoch][1]
            ended = {rank: why for rank, why in self._ended.items() if rank in members}
        for rank, why in ended.items():
            board.end(members.index(rank), why)
        return board

    def mailbox(self, group: Threads, number: int, capacity: int) -> MemoryMailbox:
        """This rank's mailbox of those that all ranks make with this number."""
        with self._changed:
            office = self._offices.setdefault(number, Office())
        return MemoryMailbox(group, office, self._changed, self._ended.keys(), capacity)

    def meet(self, group: Threads, verb: str, offer: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """Bring an offer to the group's next collective call; everybody gets what `combine` makes of all offers."""
        with self._changed:
            number, group.calls = group.calls, group.calls + 1
            call = self._calls.setdefault(number, _Call())
            if call.abandoned:
                self._lose(group, verb, *next(iter(self._gone.values())))
            call.verbs[group.rank], call.offers[group.rank] = verb, offer
            if len(set(call.verbs.values())) > 1:
                told = ", ".join(f"rank {rank} in {call.verbs[rank]}" for rank in sorted(call.verbs))
                call.error = f"the ranks are in different calls: {told}; all must make the same calls in the same order"
            elif len(call.offers) == self.size:
                try:
                    call.result = combine([call.offers[rank] for rank in range(self.size)])
                except ValueError as error:
                    call.error = str(error)
                call.done = True
                self._calls.pop(number)
            self._changed.notify_all()
            try:
                self._await(
                    group,
                    verb,
                    ready=lambda: call.done or call.error is not None,
                    absent=lambda: set(range(self.size)) - set(call.offers),
                )
            except PeerLost:
                call.abandoned = True
                raise
            if call.error is not None:
                raise ValueError(call.error)
            return call.result

    def post(self, source: int, target: int, end: Literal["sent", "wanted"], tensor: Tensor) -> _Message:
        """Put one end of a message on the board; ends meet in the order in which each side posts them."""
        with self._changed:
            queue = self._between.setdefault((source, target), deque())
            message = next((message for message in queue if getattr(message, end) is None), None)
            if message is None:
                message = _Message()
                queue.append(message)
            setattr(message, end, tensor)
            if message.met:
                queue.remove(message)
                message.error = _misfit(message, source, target)
                self._changed.notify_all()
            return message

    def arrive(self, group: Threads, message: _Message, peer: int) -> None:
        """Wait until both ends of the message are there."""
        with self._changed:
            self._await(group, "exchange", ready=lambda: message.met, absent=lambda: {peer})
        if message.error is not None:
            raise ValueError(message.error)

    def _await(self, group: Threads, verb: str, *, ready: Callable[[], bool], absent: Callable[[], set[int]]) -> None:
        with group.waits.waiting(verb, group.step, sorted(absent()) if verb == "exchange" else ()):
            self._wait_until(group, verb, ready, absent)

    def _wait_until(self, group: Threads, verb: str, ready: Callable[[], bool], absent: Callable[[], set[int]]) -> None:
        until = min(time.monotonic() + self.wait, self.end_of_time)
        self._doing[group.rank] = verb
        while not ready():
            missing = sorted(absent())
            gone = [rank for rank in self._gone if rank in missing]
            if gone:
                self._lose(group, verb, *self._gone[gone[0]])
            left = until - time.monotonic()
            if left <= 0:
                told = ", ".join(
                    f"{rank} (in {self._doing[rank]})" if rank in self._doing else str(rank) for rank in missing
                )
                self._lose(group, verb, missing[0] if len(missing) == 1 else None, f"no word from rank {told}")
            self._changed.wait(left)
        del self._doing[group.rank]

    def _lose(self, group: Threads, verb: str, peer: int | None, why: str) -> NoReturn:
        rank = group.rank
        if peer == rank:
            peer, why = None, "the other ranks had given up before this one came"
        self.leave(rank, f"rank {rank} gave up in {verb}: {why}", blame=peer)
        raise PeerLost(rank=rank, peer=peer, verb=verb, timeout=self.wait, step=group.step, cause=why)


class Threads:
    """One rank of a `Board`. Sums are added up in rank order, so they are the same on every rank and in every run."""

    def __init__(self, rank: int, board: Board) -> None:
        self.rank, self.size, self.timeout = rank, board.size, board.wait
        self.step: int | None = None
        self.bytes_sent = 0
        self.rounds = 0
        self.calls = 0
        self.store = board.store
        self.waits = Waits(rank, range(board.size))
        self._num_mailboxes = 0
        self._board = board

    def sum_(self, *tensors: Tensor) -> None:
        messages.check_summable("sum_", tensors)
        packs = messages.by_dtype(tensors)
        if self.size == 1 or not packs:
            return
        offer = [[tensor.clone() for tensor in together] for together in packs]
        for mine, total in zip(packs, self._board.meet(self, "sum_", offer, _sums), strict=True):
            for tensor, value in zip(mine, total, strict=True):
                tensor.copy_(value)
            if sum(tensor.numel() for tensor in mine):
                self.count(sum(map(messages.num_bytes, mine)))

    def broadcast_(self, tensor: Tensor, src: int = 0) -> None:
        messages.check_source("broadcast_", src, size=self.size)
        if self.size == 1 or tensor.numel() == 0:
            return
        value = self._board.meet(
            self, f"broadcast_ from rank {src}", tensor.detach().clone(), lambda offers: _one(offers, src)
        )
        self.count(messages.num_bytes(tensor) if self.rank == src else 0)
        if self.rank != src:
            tensor.detach().copy_(value)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        mine = tensor.detach().clone()
        if self.size == 1:
            return [mine]
        found: list[Tensor] = self._board.meet(self, "gather", mine, _rows)
        self.count(messages.HEADER_BYTES)
        if any(part.numel() for part in found):
            self.count(messages.num_bytes(tensor))
        return [part.to(tensor.device, copy=True) for part in found]

    def any(self, flag: bool) -> bool:
        if self.size == 1:
            return bool(flag)
        found = self._board.meet(self, "any", bool(flag), any)
        self.count(1)
        return bool(found)

    def exchange(self, send: Mapping[int, Tensor], recv: Mapping[int, Tensor]) -> Pending:
        messages.check_peers("exchange", [*send, *recv], rank=self.rank, size=self.size)
        arrivals = [
            (peer, buffer, self._board.post(peer, self.rank, "wanted", buffer.detach()))
            for peer, buffer in recv.items()
        ]
        departures = [
            (peer, tensor, self._board.post(self.rank, peer, "sent", tensor.detach().clone()))
            for peer, tensor in send.items()
        ]
        if send or recv:
            self.count(sum(map(messages.num_bytes, send.values())))
        return _Exchange(self, self._board, arrivals, departures)

    def again(self, store: Store, name: int, members: Sequence[int], epoch: int, timeout: float) -> Threads:
        """A new group of these ranks, who all call this with the same numbers."""
        group = Threads(members.index(name), self._board.again(members, epoch))
        group.waits = self.waits
        self.waits.meet(name, members)
        return group

    def hang_up(self) -> None:
        """Make no more calls: whoever waits for this rank in one loses it."""
        self._board.leave(self.rank, f"rank {self.rank} has left")

    def mailbox(self, capacity: int) -> Mailbox:
        self._num_mailboxes += 1
        return self._board.mailbox(self, self._num_mailboxes, capacity)

    def count(self, num_bytes: int) -> None:
        """Add a message to the account."""
        self.bytes_sent += num_bytes
        self.rounds += 1


_Posted = list[tuple[int, Tensor, _Message]]


class _Exchange:
    """Buffers are filled in `wait`, and not before: who reads them earlier finds the old values."""

    def __init__(self, group: Threads, board: Board, arrivals: _Posted, departures: _Posted) -> None:
        self._group, self._board, self._arrivals, self._departures = group, board, arrivals, departures

    def wait(self) -> None:
        arrivals, departures = self._arrivals, self._departures
        self._arrivals, self._departures = [], []
        for peer, buffer, message in arrivals:
            self._board.arrive(self._group, message, peer)
            assert message.sent is not None
            buffer.detach().copy_(message.sent.view(buffer.shape))
        for peer, tensor, message in departures:
            self._board.arrive(self._group, message, peer)
            assert message.sent is not None
            if not torch.equal(_bits(tensor), _bits(message.sent)):
                raise ValueError(
                    f"exchange: rank {self._group.rank} changed what it sends to rank {peer} before wait()"
                )


def _bits(tensor: Tensor) -> Tensor:
    """As bytes, so that NaN equals NaN."""
    return messages.as_bytes(tensor, torch.device("cpu"))


def _misfit(message: _Message, source: int, target: int) -> str | None:
    sent, wanted = message.sent, message.wanted
    assert sent is not None
    assert wanted is not None
    if sent.dtype == wanted.dtype and sent.numel() == wanted.numel():
        return None
    return (
        f"exchange: rank {source} sends {tuple(sent.shape)} {sent.dtype} and rank {target} has a buffer "
        f"{tuple(wanted.shape)} {wanted.dtype}; the two must have one dtype and size"
    )


def _agree(verb: str, kinds: Sequence[Any]) -> None:
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(f"{verb}: rank 0 brings {kinds[0]} and rank {rank} {kind}; they must agree")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _sums(offers: Sequence[list[list[Tensor]]]) -> list[list[Tensor]]:
    _agree("sum_", [[list(map(_kind, together)) for together in offer] for offer in offers])
    totals = offers[0]
    for offer in offers[1:]:
        for total, part in zip(totals, offer, strict=True):
            for into, tensor in zip(total, part, strict=True):
                into += tensor.to(into.device)
    return totals


def _one(offers: Sequence[Tensor], src: int) -> Tensor:
    _agree("broadcast_", list(map(_kind, offers)))
    return offers[src]


def _rows(offers: Sequence[Tensor]) -> Sequence[Tensor]:
    messages.check_headers([messages.header(tensor) for tensor in offers], offers[0], 0)
    return offers
