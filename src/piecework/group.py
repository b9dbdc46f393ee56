"""Ranks that work together: one process (`Solo`), or the processes of a torch process group (`Ranks`)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .ranks import Ranks, roll_call
from .ranks.meeting import within
from .training import BadInput, PeerLost

if TYPE_CHECKING:
    from .ranks.mailbox import Mailbox


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
        """Replace each tensor by its sum over the ranks.

        Tensors of one dtype travel as one packed message (one round)."""
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

    def mailbox(self, capacity: int) -> Mailbox:
        """A new mailbox for messages of at most so many bytes that come when they come. It counts on this group."""
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

    def mailbox(self, capacity: int) -> Mailbox:
        raise ValueError("a single process has no peers to write to")


__all__ = ["Group", "Pending", "Ranks", "Solo", "current", "launched"]

_default: Ranks | None = None


def current() -> Group:
    """`Ranks` over the default process group where torch.distributed is initialised (the same object every time, so
    that its counts are those of everybody who uses it), else `Solo()`."""
    global _default
    if not (dist.is_available() and dist.is_initialized()):
        _default = None
        return Solo()
    if _default is None or _default._pg is not dist.group.WORLD:
        _default = Ranks()
    return _default


@contextmanager
def launched(
    device: str | torch.device = "cpu", *, timeout: float = 600.0, backend: str | None = None
) -> Iterator[Group]:
    """`current()`, after joining the ranks that torchrun has started, if it has; on the way out the group is left.

    Ranks are joined where RANK and WORLD_SIZE (more than 1) are in the environment. A process group that exists
    already is used and left alone, and a single process stays `Solo`.

    device: what the tensors will be on. "cpu" means gloo; "cuda" means NCCL for CUDA tensors and gloo for the others,
        and makes the GPU of LOCAL_RANK (or that of the device's index) the current one.
    timeout: seconds that joining, and each verb, may wait.
    backend: torch's name of another backend: "gloo" with several ranks on one GPU, "mpi".

    Raises `BadInput` for an incomplete environment or a GPU that is not there, `PeerLost` if ranks do not come."""
    global _default
    if not _to_be_joined():
        yield current()
        return
    _join(torch.device(device), timeout, backend)
    try:
        _default = Ranks(timeout=timeout)
        yield _default
    finally:
        if _default is not None:
            _default.leave()
        _default = None
        gc.collect()  # a process group that outlives its destruction aborts the interpreter on the way out
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(device: torch.device, timeout: float, backend: str | None) -> None:
    if device.type == "cuda":
        device = _own_gpu(device)
        torch.cuda.set_device(device)
    try:
        store, rank, size = _meet(timeout)
        # Workers that torchrun restarts find its store with the addresses of the attempt before them.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"),
            store=PrefixStore(f"attempt {attempt}", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" and backend is None else None,
        )
    except ValueError as error:
        raise BadInput(
            f"RANK and WORLD_SIZE are set, but the ranks cannot meet: {error}; start with torchrun"
        ) from error
    except RuntimeError as error:
        if "failed to listen" in str(error):
            raise BadInput(
                f"rank 0 holds the store where the ranks meet, and port {os.environ.get('MASTER_PORT')} of its machine "
                "is in use; set another MASTER_PORT for all ranks, or start with torchrun --standalone"
            ) from error
        if not roll_call.tells_of_a_loss(error):
            raise
        raise PeerLost(
            rank=int(os.environ["RANK"]),
            peer=None,
            verb="the start",
            timeout=timeout,
            cause=roll_call.first_sentence(error),
        ) from error


def _meet(timeout: float) -> tuple[Any, int, int]:
    """torch's rendezvous: the store, this process's rank, and the number of ranks."""
    try:
        met: tuple[Any, int, int] = within(
            timeout + 1.0, lambda: next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        )
        return met
    except TimeoutError:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        cause = f"what listens at {place} does not answer as the store of ranks does"
        rank = int(os.environ["RANK"])
        raise PeerLost(rank=rank, peer=None, verb="the start", timeout=timeout, cause=cause) from None


def _to_be_joined() -> bool:
    if not dist.is_available() or dist.is_initialized() or "RANK" not in os.environ:
        return False
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _own_gpu(device: torch.device) -> torch.device:
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BadInput(
            f"rank {os.environ['RANK']} would use GPU {index}, and this machine has {torch.cuda.device_count()}; start "
            'fewer ranks, or share one GPU with device="cuda:0", backend="gloo"'
        )
    return torch.device("cuda", index)
