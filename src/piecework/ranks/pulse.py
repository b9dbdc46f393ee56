"""Every rank's sign of life, written into the store where the ranks met.

A peer that falls silent, or says that it has posted more than has arrived, is an error after the timeout, and who finds
one tells the others: so nobody takes a rank that gave up for one that died.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from contextlib import suppress
from threading import Event, Thread

from .meeting import Store


class Pulse:
    """Every rank's word that it is alive and how many messages it has posted to whom, in the store.

    A thread writes this rank's and reads those of the peers that are waited for. Where the store does not answer,
    peers fall silent. `broken` is what another rank found before it gave up: (peer, why)."""

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.period = min(1.0, max(0.02, timeout / 10))
        self.posted = [0] * size
        self.received = [0] * size
        self.broken: tuple[int, str] | None = None
        self.leaving: frozenset[int] = frozenset()
        """Peers that have announced that they will go."""
        self._leaves = False
        self._store, self._rank, self._timeout = store, rank, timeout
        self._watched: frozenset[int] = frozenset()
        self._words: dict[int, bytes] = {}
        self._heard: dict[int, float] = {}
        self._late: dict[int, tuple[int, float]] = {}
        self._verdict: tuple[int, str] | None = None
        self._wake, self._looked, self._ended = Event(), Event(), False
        Thread(target=self._run, name="piecework-pulse", daemon=True).start()

    def watch(self, peers: Collection[int]) -> None:
        """Read the words of these peers from now on."""
        if not self._watched.issuperset(peers):
            self._watched |= frozenset(peers)
            self._wake.set()

    def complaint(self, peer: int, since: float) -> str | None:
        """What is wrong with a peer that has been waited for since then, if anything is."""
        now = time.monotonic()
        if now - max(since, self._heard.get(peer, 0.0)) > self._timeout:
            return "it gives no sign of life"
        count, first = self._late.get(peer, (0, now))
        if count > self.received[peer] and now - max(since, first) > self._timeout:
            return "it is alive and its messages do not arrive: the link between the two is cut or far too slow"
        return None

    def condemn(self, peer: int, why: str) -> None:
        """Tell all that this rank gives up, so that they do not take its end for a death that they can live with."""
        self._verdict = (peer, why)
        self._looked.clear()
        self._wake.set()
        self._looked.wait(2.0)

    def leave(self) -> None:
        """Announce that this rank will go."""
        self._leaves = True
        self._wake.set()

    def look_for_a_verdict(self) -> None:
        """Before a closed connection counts as a death: whether that rank had given up and said why."""
        self._looked.clear()
        self._wake.set()
        self._looked.wait(2.0)

    def stop(self) -> None:
        self._ended = True
        self._wake.set()

    def _run(self) -> None:
        beats = 0
        while not self._ended:
            beats += 1
            with suppress(RuntimeError):
                self._exchange(beats)
            self._looked.set()
            self._wake.wait(self.period)
            self._wake.clear()

    def _exchange(self, beats: int) -> None:
        if self._verdict is not None and not self._store.check(["verdict"]):
            self._store.set("verdict", json.dumps(self._verdict))
        self._store.set(str(self._rank), json.dumps([beats, self.posted]))
        if self._leaves:
            self._store.set(f"leaves/{self._rank}", "")
            self._store.set("leaves", "")
        if self._store.check(["leaves"]):
            others = set(range(len(self.posted))) - {self._rank}
            self.leaving = frozenset(peer for peer in others if self._store.check([f"leaves/{peer}"]))
        if self.broken is None and self._store.check(["verdict"]):
            peer, why = json.loads(self._store.get("verdict"))
            self.broken = (peer, f"another rank found: {why}" if self._verdict is None else why)
        for peer in self._watched:
            if self._store.check([str(peer)]):
                self._read(peer, self._store.get(str(peer)))

    def _read(self, peer: int, word: bytes) -> None:
        if self._words.get(peer) == word:
            return
        now = time.monotonic()
        self._words[peer], self._heard[peer] = word, now
        count = json.loads(word)[1][self._rank]
        late = self._late.get(peer)
        if count <= self.received[peer]:
            self._late.pop(peer, None)
        elif late is None or late[0] <= self.received[peer]:
            self._late[peer] = (count, now)
