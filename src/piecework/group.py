"""Ranks that work together: one process (`Solo`), or the processes of a torch process group (`Ranks`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Pending(Protocol):
    """An exchange under way. There is only `wait`: polling never completes on gloo."""

    def wait(self) -> None:
        """Return when everything has been sent and received; `PeerLost` after the group's timeout."""
        ...


class Group(Protocol):
    """What a method may ask of its ranks. Every call is made by all ranks in the same order; every wait has a timeout.

    `bytes_sent` counts the payload this rank has handed over (tensor bytes, once a call, whatever the algorithm
    below moves) and `rounds` the calls that did; both stay 0 on one rank."""

    rank: int
    size: int
    bytes_sent: int
    rounds: int

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks; tensors of one dtype travel as one packed message (one round)."""
        ...

    def broadcast_(self, tensor: Tensor, src: int = 0) -> None:
        """Overwrite the tensor by that of rank `src`."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in rank order, on every rank; sizes may differ along the first dimension."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes."""
        ...

    def exchange(self, send: Mapping[int, Tensor], recv: Mapping[int, Tensor]) -> Pending:
        """Start sending tensors to peers and receiving into buffers from peers; either side may be empty.

        The tensors sent must not change, and the buffers must not be read, before `wait()`."""
        ...


class _Done:
    def wait(self) -> None:
        return None


class Solo:
    """One process: the normal case. Every verb is free."""

    rank = 0
    size = 1
    bytes_sent = 0
    rounds = 0

    def sum_(self, *tensors: Tensor) -> None:
        return None

    def broadcast_(self, tensor: Tensor, src: int = 0) -> None:
        return None

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def any(self, flag: bool) -> bool:
        return flag

    def exchange(self, send: Mapping[int, Tensor], recv: Mapping[int, Tensor]) -> Pending:
        if send or recv:
            raise ValueError(f"a single process has no peers; got send to {list(send)}, receive from {list(recv)}")
        return _Done()
