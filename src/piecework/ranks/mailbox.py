"""Messages that come when they come: post to a peer, take what has arrived, wait only for who is alive.

On gloo a pending receive completes in `wait()` alone, and a wait that expires closes the connection. So every source
has a thread that waits for as long as it takes, on connections of the mailbox's own, and hands over what has come. Who
is alive is known otherwise: every rank writes into the store, again and again, that it is there and how much it has
posted. A peer whose connection closes is gone. One that is silent, or whose messages do not arrive, is an error after
the timeout: it cannot be told apart from one that will come back.

A rank sends one message at a time: two that share a link arrive later than one after the other, and TCP makes them
later still. A peer that does not take its message is not waited for any longer than `PATIENCE` of the timeout.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any, Protocol

import torch
from torch import Tensor

from ..timeline import Waits
from ..training import PeerLost
from .meeting import Store, connect, named
from .pulse import Pulse

HEAD = 64
"""Bytes in front of a message, of which 8 are used: what follows stays aligned."""

PATIENCE = 0.1
"""Part of the timeout for which a message may hold up those posted after it to other peers."""

_TAG = 0x70776D
_END = -1
_FOREVER = timedelta(days=365)


@dataclass
class Letter:
    """A message that has arrived, or that came back: `peer` sent it, or was to get it.

    content: (bytes,) uint8, this letter's own until it is given back with `Mailbox.recycle`."""

    peer: int
    content: Tensor
    whole: Tensor = field(repr=False)


class Mailbox(Protocol):
    """Messages of at most `capacity` bytes between the ranks of a group; for one thread of each rank.

    gone: peers that post no more, because they closed their mailbox or ended; what they had posted has been taken or
        is about to be. Of those that ended without a word, what was under way is lost.
    leaving: peers that have announced that they will go."""

    capacity: int

    @property
    def gone(self) -> frozenset[int]: ...

    @property
    def leaving(self) -> frozenset[int]: ...

    def announce(self) -> None:
        """Tell all peers that this rank will close its mailbox."""
        ...

    def listen(self, peers: Iterable[int]) -> None:
        """Take messages of these peers from now on; what they have posted before waits for that."""
        ...

    def draft(self) -> Tensor:
        """(capacity,) uint8 to write a message into; uninitialised."""
        ...

    def post(self, peer: int, draft: Tensor, length: int) -> None:
        """Send the first `length` bytes of a draft, which must not be touched again. Never blocks."""
        ...

    def take(self) -> list[Letter]:
        """What has arrived since the last call, in the order of arrival; of one peer, in the order of posting.

        Raises PeerLost where another rank has given up."""
        ...

    def returned(self) -> list[Letter]:
        """What was posted to a peer that went before it took it."""
        ...

    def recycle(self, letter: Letter) -> None:
        """Give a letter's memory back."""
        ...

    def wait(self, peers: Collection[int]) -> None:
        """Return when there is something to take, one of these peers has gone, or any has announced that it will.

        Raises PeerLost when one of them has been silent for the group's timeout, or its messages do not get through.
        A peer that is alive and has posted nothing is waited for as long as it takes."""
        ...

    def close(self, *, alone: bool = False) -> None:
        """Say that nothing more will come, and end the threads when all peers have said so. Messages not taken are
        lost. alone: the peers go on; return when they have what was posted."""
        ...


class GlooMailbox:
    """A mailbox of the processes of a group, on gloo connections of its own.

    store: where the ranks meet, with a name of this mailbox's own in front. Made by all ranks together.
    timeout: seconds of silence after which a peer is an error; count: told the bytes of each message posted;
    step: the step under way, for errors; waits: where waits are noted."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        capacity: int,
        timeout: float,
        count: Callable[[int], None],
        step: Callable[[], int | None] = lambda: None,
        waits: Waits | None = None,
    ) -> None:
        self.capacity = capacity
        self._waits = Waits() if waits is None else waits
        self._rank, self._size, self._timeout, self._count, self._step = rank, size, timeout, count, step
        self._pg = connect(store, rank, size, timeout)
        self._changed = Condition()
        self._inbox: deque[Letter] = deque()
        self._returned: list[Letter] = []
        self._free: list[Tensor] = []
        self._gone: set[int] = set()
        self._noticed: frozenset[int] = frozenset()
        self._closed = False
        self._listeners: dict[int, Thread] = {}
        self._senders: dict[int, tuple[SimpleQueue[Any], Thread]] = {}
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._under_way = [0] * size  # messages that gloo has been given and the peer has not taken
        self._passed_by: set[int] = set()  # peers that take too long
        self._postman = _thread(self._dispatch, (), "piecework-post")
        self._pulse = Pulse(named(store.clone(), "pulse"), rank, size, timeout)

    @property
    def gone(self) -> frozenset[int]:
        with self._changed:
            return frozenset(self._gone)

    @property
    def leaving(self) -> frozenset[int]:
        self._noticed = self._pulse.leaving
        return self._noticed

    def announce(self) -> None:
        self._pulse.leave()

    def listen(self, peers: Iterable[int]) -> None:
        for peer in peers:
            if peer not in self._listeners:
                self._listeners[peer] = _thread(self._listen, (peer,), f"piecework-from-{peer}")

    def draft(self) -> Tensor:
        return self._whole()[HEAD:]

    def post(self, peer: int, draft: Tensor, length: int) -> None:
        whole = _whole_of(draft)
        self._pulse.posted[peer] += 1
        self._count(length)
        self._send(peer, whole, length)

    def take(self) -> list[Letter]:
        if (broken := self._pulse.broken) is not None:
            self._fail(*broken)
        with self._changed:
            found = list(self._inbox)
            self._inbox.clear()
        return found

    def returned(self) -> list[Letter]:
        with self._changed:
            found, self._returned = self._returned, []
        return found

    def recycle(self, letter: Letter) -> None:
        if letter.whole.numel() == HEAD + self.capacity:  # it may be one that a checkpoint brought back
            with self._changed:
                self._free.append(letter.whole)

    def wait(self, peers: Collection[int]) -> None:
        with self._waits.waiting("mailbox", self._step(), sorted(peers)):
            self._wait(peers)

    def _wait(self, peers: Collection[int]) -> None:
        began = time.monotonic()
        self._pulse.watch(peers)
        with self._changed:
            while not self._inbox and not self._gone & set(peers) and self._pulse.leaving == self._noticed:
                if (broken := self._pulse.broken) is not None:
                    self._fail(*broken)
                for peer in peers:
                    why = self._pulse.complaint(peer, since=began)
                    if why is not None:
                        self._pulse.condemn(peer, why)
                        self._fail(peer, why)
                self._changed.wait(self._pulse.period)

    def close(self, *, alone: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        self.listen(peer for peer in range(self._size) if peer != self._rank)
        for peer in set(range(self._size)) - {self._rank} - self.gone:
            self._send(peer, self._whole(), _END)
        self._outbox.put(None)
        until = time.monotonic() + min(self._timeout, 5.0)
        self._postman.join(max(0.0, until - time.monotonic()))
        senders = [thread for _, thread in self._senders.values()]
        for thread in senders if alone else self._listeners.values():
            thread.join(max(0.0, until - time.monotonic()))
        self._hang_up()
        self._pulse.stop()
        del self._pg

    def _hang_up(self) -> None:
        """End the threads that still wait for a peer: one that woke while the interpreter ends would abort it."""
        for peer, listener in self._listeners.items():
            if listener.is_alive():
                with suppress(RuntimeError):  # a receive that expires closes the connection
                    self._pg.recv([torch.empty(1, dtype=torch.uint8)], peer, _TAG + 1).wait(timedelta(milliseconds=1))
                listener.join(1.0)

    def _whole(self) -> Tensor:
        with self._changed:
            if self._free:
                return self._free.pop()
        return torch.empty(HEAD + self.capacity, dtype=torch.uint8)

    def _send(self, peer: int, whole: Tensor, length: int) -> None:
        whole[:8].view(torch.int64)[0] = length
        self._outbox.put((peer, whole, length))

    def _dispatch(self) -> None:
        """Send what was posted, one message after the other; a peer that takes too long is passed by from then on."""
        while (posted := self._outbox.get()) is not None:
            self._begin(*posted)
            with self._changed:
                self._passed_by -= {peer for peer in self._passed_by if not self._under_way[peer]}
                self._changed.wait_for(lambda: not self._in_front(), PATIENCE * self._timeout)
                self._passed_by |= self._in_front()
        for queue, _ in self._senders.values():
            queue.put(None)

    def _in_front(self) -> set[int]:
        """Peers whose messages hold up the next one."""
        return {peer for peer, number in enumerate(self._under_way) if number} - self._passed_by

    def _begin(self, peer: int, whole: Tensor, length: int) -> None:
        if peer not in self._senders:
            queue: SimpleQueue[Any] = SimpleQueue()
            self._senders[peer] = queue, _thread(self._attend, (peer, queue), f"piecework-to-{peer}")
        try:
            work = self._pg.send([whole[: HEAD + max(length, 0)]], peer, _TAG)
        except RuntimeError:
            work = None  # the connection has closed
        with self._changed:
            self._under_way[peer] += 1
        self._senders[peer][0].put((work, whole, length))

    def _attend(self, peer: int, queue: SimpleQueue[Any]) -> None:
        """Wait for the peer to take what was posted; that is the only way to learn that it did."""
        while (posted := queue.get()) is not None:
            work, whole, length = posted
            arrived = work is not None
            if work is not None:
                try:
                    work.wait(_FOREVER)
                except RuntimeError:
                    arrived = False
            with self._changed:
                self._under_way[peer] -= 1
                if arrived or length < 0:
                    self._free.append(whole)
                else:
                    self._returned.append(Letter(peer, whole[HEAD : HEAD + length], whole))
                self._changed.notify_all()
            del posted, work, whole

    def _listen(self, peer: int) -> None:
        pg = self._pg
        while True:
            whole = self._whole()
            try:
                pg.recv([whole], peer, _TAG).wait(_FOREVER)
            except RuntimeError:
                if not self._closed:
                    self._pulse.look_for_a_verdict()
                break
            length = int(whole[:8].view(torch.int64))
            if length == _END:
                break
            with self._changed:
                self._pulse.received[peer] += 1
                self._inbox.append(Letter(peer, whole[HEAD : HEAD + length], whole))
                self._changed.notify_all()
        with self._changed:
            self._gone.add(peer)
            self._changed.notify_all()

    def _fail(self, peer: int | None, why: str) -> None:
        raise PeerLost(
            rank=self._rank,
            peer=None if peer == self._rank else peer,
            verb="the mailbox",
            timeout=self._timeout,
            step=self._step(),
            cause=why,
        )


def _whole_of(draft: Tensor) -> Tensor:
    """The buffer behind a draft, head included."""
    return torch.as_strided(draft, (HEAD + draft.numel(),), (1,), draft.storage_offset() - HEAD)


def _thread(work: Callable[..., None], arguments: tuple[Any, ...], name: str) -> Thread:
    thread = Thread(target=work, args=arguments, name=name, daemon=True)
    thread.start()
    return thread
