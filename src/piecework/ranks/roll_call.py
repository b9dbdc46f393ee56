"""Whether a failed communication has lost a peer, and whom: asked once, after the failure.

Nothing is sent while all is well. A rank whose call fails writes so into the store that the process group was started
from, and waits a moment to see which of the others do the same: the ranks that are alive fail in the same call, because
the connections of a lost rank close, or because they waited for it just as long. Whoever does not write is missing. In
an exchange only neighbours fail, so they write whom they were waiting for, and the chain ends at the lost rank. The
store may be lost as well (without torchrun rank 0 keeps it), and then its answer may never come: so it is asked in a
thread of its own, for a bounded time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Thread
from typing import cast

import torch
import torch.distributed as dist

from .meeting import Store

_PAUSE = 0.05
_LOSS = re.compile(r"timed? ?out|connect|closed by peer|broken pipe|socket|unreachable|abort", re.IGNORECASE)


@dataclass
class Roll:
    """What the ranks that noticed a failure have written.

    missing: who has not. suspects: who has, and the peer each of them was waiting for (None in a collective call).
    late: everybody else had, before this rank did. answered: whether the store did."""

    missing: list[int]
    suspects: dict[int, int | None] = field(default_factory=dict)
    late: bool = False
    answered: bool = False


def tells_of_a_loss(error: RuntimeError) -> bool:
    """Whether a backend's error is about a peer, and not about what it was given to send."""
    known = (dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, known) or _LOSS.search(str(error)) is not None


def first_sentence(error: RuntimeError) -> str:
    """What the backend said, without the place in its source and without its advice."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip().partition("\n")[0])
    return text.partition(". ")[0].strip().rstrip(".")


def own_timeout(pg: dist.ProcessGroup) -> float:
    """Seconds; torch has no public way to ask, so its default of 30 minutes stands in where the private one fails."""
    try:
        return float(pg._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return 1800.0


def store_of(pg: dist.ProcessGroup) -> Store | None:
    """The store the group met through; None for MPI, or where torch does not tell."""
    try:
        return cast("Store | None", dist.distributed_c10d._get_process_group_store(pg))
    except (AttributeError, KeyError, RuntimeError):
        return None


def call(
    store: Store | None,
    rank: int,
    size: int,
    suspect: int | None,
    *,
    patience: float,
    wake: Callable[[list[int]], None] | None = None,
) -> Roll:
    """Write whom this rank was waiting for, and stay `patience` seconds at most until at most one other is missing.

    wake: stirs those who have not noticed yet; called once, if this takes longer than a moment."""
    roll = Roll(missing=[peer for peer in range(size) if peer != rank])
    if store is None:
        return roll
    asking = Thread(target=_ask, args=(store, rank, suspect, roll, patience), daemon=True, name="piecework-roll-call")
    asking.start()
    asking.join(2 * _PAUSE)
    if asking.is_alive() and wake is not None:
        wake(list(roll.missing))
    asking.join(patience + 1.0)
    return roll if not asking.is_alive() else Roll(missing=roll.missing)


def blame(roll: Roll, rank: int, suspect: int | None) -> tuple[int | None, str]:
    """Who is lost, if that can be known, and a sentence for the error; `suspect` is the peer whose message failed."""
    if not roll.answered:
        return suspect, "the store that knows who is alive did not answer (without torchrun, rank 0 keeps it)"
    if roll.late:
        return None, "the other ranks had given up before this one came"
    seen, peer = {rank}, suspect
    while peer is not None and peer not in roll.missing:
        if peer in seen:  # two that wait for each other are both alive
            return suspect, f"rank {suspect} is alive: it was too slow, or the link failed"
        seen.add(peer)
        peer = roll.suspects.get(peer)
    if peer is not None:
        return peer, ""
    if not roll.missing:
        return None, "every rank is alive: one was too slow, or a link failed"
    if len(roll.missing) == 1:
        return roll.missing[0], ""
    return None, "no word from ranks " + ", ".join(map(str, roll.missing))


def _ask(store: Store, rank: int, suspect: int | None, roll: Roll, patience: float) -> None:
    until = time.monotonic() + patience
    try:
        _read(store, roll)
        roll.late = not roll.missing
        store.set(_key(rank), "" if suspect is None else str(suspect))
        while len(roll.missing) > 1 and time.monotonic() < until:
            time.sleep(_PAUSE)
            _read(store, roll)
        roll.answered = True
    except RuntimeError:
        return


def _read(store: Store, roll: Roll) -> None:
    for peer in list(roll.missing):
        if store.check([_key(peer)]):
            written = store.get(_key(peer)).decode()
            roll.suspects[peer] = int(written) if written else None
            roll.missing.remove(peer)


def _key(rank: int) -> str:
    return f"piecework/alive/{rank}"
