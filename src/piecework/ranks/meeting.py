"""Where processes meet: torch's stores, and gloo connections among those that come to one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

R = TypeVar("R")


class Store(Protocol):
    """Of torch's stores, what is used in this library (torch exports their class, but not its type)."""

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def set(self, key: str, value: str) -> None: ...

    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...

    def clone(self) -> Store: ...


def named(store: Store, name: str) -> Store:
    """The store, with a name of one's own in front of every key."""
    return cast("Store", PrefixStore(name, store))  # type: ignore[arg-type]


def ground(store: Store) -> Store:
    """The store without the names that others have put in front: what a process sees that comes by its address."""
    while isinstance(store, PrefixStore):
        store = cast("Store", store.underlying_store)
    return store


def within(seconds: float, work: Callable[[], R]) -> R:
    """work(), or TimeoutError: for calls of torch's that wait for ever where something listens that is no store."""
    found: SimpleQueue[tuple[R | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            found.put((work(), None))
        except BaseException as error:
            found.put((None, error))

    Thread(target=run, name="piecework-meeting", daemon=True).start()
    try:
        result, error = found.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return cast("R", result)


def connect(store: Store, rank: int, size: int, timeout: float) -> dist.ProcessGroup:
    """Gloo connections among `size` processes that call this with the same store, apart from torch's default group.

    store: used up by this; timeout: seconds to wait for each other, and of every message that names none of its own.
    Raises RuntimeError, torch's, where one does not come."""
    pg = dist.ProcessGroupGloo(cast("Any", named(store, "meet")), rank, size, timedelta(seconds=timeout))
    return cast("dist.ProcessGroup", pg)  # it has the verbs of one, and is registered nowhere
