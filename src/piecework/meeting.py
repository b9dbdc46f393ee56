"""Where processes meet: torch's stores, and gloo connections among those that come to one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore


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


def connect(store: Store, rank: int, size: int, timeout: float) -> dist.ProcessGroup:
    """Gloo connections among `size` processes that call this with the same store, apart from torch's default group.

    store: used up by this; timeout: seconds to wait for each other, and of every message that names none of its own.
    Raises RuntimeError, torch's, where one does not come."""
    pg = dist.ProcessGroupGloo(cast("Any", named(store, "meet")), rank, size, timedelta(seconds=timeout))
    return cast("dist.ProcessGroup", pg)  # it has the verbs of one, and is registered nowhere
