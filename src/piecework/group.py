"""Ranks that work together: one process (`Solo`), or the processes of a torch process group (`Ranks`)."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from . import messages, roll_call
from .training import BadInput, PeerLost


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


class Ranks:
    """The processes of a `torch.distributed` group (gloo, NCCL or MPI), the default group unless one is given.

    process_group: this process must be a member. Ranks and peers are numbered within the group.
    timeout: seconds that a verb may wait; None takes the process group's own.

    Tensors may be of any dtype (in `sum_`: of those that backends add up) and need not be contiguous; no gradient is
    recorded; CUDA tensors on gloo travel through the processor's memory. Sums have the same bits on every rank. The
    ranks' tensors must agree in shape (in `gather` after the first dimension; in `exchange` a message must be as long
    as its buffer, because gloo ends the process where it is longer). Not for several threads at once.

    Accounting: `bytes_sent` grows by the tensor bytes that this rank hands over (in `broadcast_` only the source does),
    `rounds` by one a message that this rank takes part in. `sum_` is a round a dtype and device, `broadcast_` one,
    `any` one of a byte, `exchange` one, `gather` two: a header of 16 bytes, and the tensor (its padding not counted).

    Errors: a rank that does not answer in time, or whose connection closes, is a `PeerLost`. Who is missing is found
    by a roll call through the group's store, for two seconds at most; `peer` is None where that stays open (no store,
    the store's host lost, several ranks silent). After a `PeerLost` the group is broken: every later call fails at
    once, and what the failed call was to fill is undefined. NCCL reports a loss like this only under
    TORCH_NCCL_BLOCKING_WAIT=1; otherwise torch's watchdog ends the process after the process group's timeout.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, *, timeout: float | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise BadInput(
                "Ranks needs a process group, and torch.distributed is not initialised; run under torchrun inside "
                "`with piecework.group.launched() as group:`, or call torch.distributed.init_process_group first"
            )
        if timeout is not None and not timeout > 0:
            raise BadInput(f"timeout is in seconds and must be positive; got {timeout}")
        pg = dist.group.WORLD if process_group is None else process_group
        if not isinstance(pg, dist.ProcessGroup):
            raise BadInput(f"this process is not a member of the process group given ({pg!r})")
        self.rank, self.size = dist.get_rank(pg), dist.get_world_size(pg)
        self.timeout = roll_call.own_timeout(pg) if timeout is None else float(timeout)
        self.step: int | None = None
        """The step under way, for errors; whoever drives the training may set it, as well as `timeout`."""
        self.bytes_sent = 0
        self.rounds = 0
        self._pg = pg
        self._packs = messages.Packs()
        self._lost: PeerLost | None = None
        pairs = (pair.partition(":") for pair in dist.get_backend_config(pg).split(","))
        self._backends = {kind: backend for kind, _, backend in pairs}

    def sum_(self, *tensors: Tensor) -> None:
        messages.check_summable("sum_", tensors)
        if self.size == 1:
            return
        for together in messages.by_dtype(tensors):
            self._sum_together(together)

    def _sum_together(self, tensors: Sequence[Tensor]) -> None:
        wire = self._wire(tensors[0].device)
        alone = len(tensors) == 1 and messages.plain(tensors[0], wire)
        flat = tensors[0] if alone else self._packs.fill(tensors, wire)
        if flat.numel() == 0:
            return
        self._reduce("sum_", torch.view_as_real(flat) if flat.is_complex() else flat, dist.ReduceOp.SUM)
        self._count(messages.num_bytes(flat))
        if not alone:
            self._packs.empty(flat, tensors)

    def _reduce(self, verb: str, flat: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp, options.timeout = dist.ReduceOp(op), self._limit
        self._run(verb, flat.device, lambda: self._pg.allreduce([flat], options))

    def broadcast_(self, tensor: Tensor, src: int = 0) -> None:
        messages.check_source("broadcast_", src, size=self.size)
        if self.size == 1 or tensor.numel() == 0:
            return
        carrier = messages.as_bytes(tensor, self._wire(tensor.device))
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = src, 0, self._limit
        self._run("broadcast_", carrier.device, lambda: self._pg.broadcast([carrier], options))
        self._count(messages.num_bytes(tensor) if self.rank == src else 0)
        if self.rank != src:
            messages.write_back(carrier, tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        if self.size == 1:
            return [tensor.detach().clone()]
        mine = torch.tensor(messages.header(tensor), device=self._wire(torch.device("cpu")))
        headers = [found.tolist() for found in self._gather_equal(mine)]
        self._count(messages.HEADER_BYTES)
        messages.check_headers(headers, tensor, self.rank)
        rows, row = [rows for rows, _ in headers], tuple(tensor.shape[1:])
        shapes = [(num, *row) if tensor.dim() else () for num in rows]
        if max(rows) * math.prod(row) == 0:
            return [tensor.new_empty(shape) for shape in shapes]
        row_bytes = math.prod(row) * tensor.element_size()
        carrier = messages.as_bytes(tensor, self._wire(tensor.device))
        if len(carrier) < max(rows) * row_bytes:
            carrier = torch.cat([carrier, carrier.new_zeros(max(rows) * row_bytes - len(carrier))])
        found = self._gather_equal(carrier)
        self._count(messages.num_bytes(tensor))
        cut = [part[: num * row_bytes] for part, num in zip(found, rows, strict=True)]
        cut = [part.clone() if len(part) < len(carrier) else part for part in cut]  # keeps no padding in memory
        return [part.view(tensor.dtype).view(shape).to(tensor.device) for part, shape in zip(cut, shapes, strict=True)]

    def _gather_equal(self, mine: Tensor) -> list[Tensor]:
        found = [torch.empty_like(mine) for _ in range(self.size)]
        from torch._C._distributed_c10d import AllgatherOptions  # torch.distributed exports the others, not this one

        options = AllgatherOptions()
        options.timeout = self._limit
        self._run("gather", mine.device, lambda: self._pg.allgather([found], [mine], options))
        return found

    def any(self, flag: bool) -> bool:
        if self.size == 1:
            return bool(flag)
        found = torch.tensor([bool(flag)], dtype=torch.uint8, device=self._wire(torch.device("cpu")))
        self._reduce("any", found, dist.ReduceOp.MAX)
        self._count(1)
        return bool(found.item())

    def exchange(self, send: Mapping[int, Tensor], recv: Mapping[int, Tensor]) -> Pending:
        messages.check_peers("exchange", [*send, *recv], rank=self.rank, size=self.size)
        if not send and not recv:
            return _Done()
        self._refuse_if_broken("exchange")
        ops, buffers = [], []
        for peer, tensor in recv.items():
            buffers.append((messages.as_bytes(tensor, self._wire(tensor.device)), tensor))
            ops.append(dist.P2POp(dist.irecv, buffers[-1][0], group=self._pg, group_peer=peer))
        for peer, tensor in send.items():
            carrier = messages.as_bytes(tensor, self._wire(tensor.device))
            ops.append(dist.P2POp(dist.isend, carrier, group=self._pg, group_peer=peer))
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            self._fail("exchange", error, None)
        self._count(sum(map(messages.num_bytes, send.values())))
        return _Exchange(self, works, ops, buffers)

    @property
    def _limit(self) -> timedelta:
        return timedelta(seconds=self.timeout)

    def _wire(self, device: torch.device) -> torch.device:
        """Where tensors of this device travel: there, or in the memory that the group's backend reads."""
        if device.type != "cpu" and self._backends.get(device.type) not in (None, "gloo", "mpi"):
            return device
        if "cpu" in self._backends:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def _count(self, num_bytes: int) -> None:
        self.bytes_sent += num_bytes
        self.rounds += 1

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The torch process group, for torch's own tools (DistributedDataParallel)."""
        return self._pg

    @contextmanager
    def failures(self, verb: str) -> Iterator[None]:
        """Messages that others send through the process group fail inside as this group's verbs do: `PeerLost`."""
        self._refuse_if_broken(verb)
        try:
            yield
        except RuntimeError as error:
            self._fail(verb, error, None)

    def leave(self) -> None:
        """Let go of the process group, which is about to be destroyed; no verb may follow."""
        del self._pg

    def _run(self, verb: str, wire: torch.device, post: Callable[[], dist.Work]) -> None:
        with self.failures(verb):
            # The operation carries its own timeout: a shorter one in `wait` would leave it running, and the process
            # could not end before the process group's timeout. The one here is for backends that ignore options.
            _finish(post(), wire, self.timeout + 1.0)

    def _refuse_if_broken(self, verb: str) -> None:
        if self._lost is not None:
            why = f"the group broke earlier, in {self._lost.verb}"
            raise PeerLost(
                rank=self.rank, peer=self._lost.peer, verb=verb, timeout=self.timeout, step=self.step, cause=why
            )

    def _fail(self, verb: str, error: RuntimeError, suspect: int | None) -> NoReturn:
        """Turn a backend's error into `PeerLost`; an error that speaks of no connection is raised as it is."""
        if not roll_call.tells_of_a_loss(error):
            raise error
        roll = roll_call.call(self._pg, suspect, patience=min(2.0, self.timeout))
        peer, found = roll_call.blame(roll, self.rank, suspect)
        cause = "; ".join(filter(None, [roll_call.first_sentence(error), found]))
        self._lost = PeerLost(rank=self.rank, peer=peer, verb=verb, timeout=self.timeout, step=self.step, cause=cause)
        raise self._lost from error


def _finish(work: dist.Work, wire: torch.device, seconds: float) -> None:
    if wire.type == "cpu":
        work.wait(timedelta(seconds=seconds))
    else:
        work.wait()  # orders the streams; with a timeout NCCL would make the processor wait for the device


class _Exchange:
    """Posted sends and receives of one `Ranks.exchange`; keeps their buffers alive until `wait`."""

    def __init__(
        self,
        group: Ranks,
        works: Sequence[dist.Work],
        ops: Sequence[dist.P2POp],
        buffers: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self._group, self._works, self._ops, self._buffers = group, works, ops, buffers

    def wait(self) -> None:
        if not self._works:
            return
        self._group._refuse_if_broken("exchange")
        works, buffers = self._works, self._buffers
        self._works, self._buffers = (), ()
        # NCCL makes one work of the whole batch, and then no single peer can be named.
        one_each = len(works) == len(self._ops)
        until = time.monotonic() + self._group.timeout
        for work, op in zip(works, self._ops, strict=False):
            try:
                _finish(work, op.tensor.device, max(0.001, until - time.monotonic()))
            except RuntimeError as error:
                self._group._fail("exchange", error, op.group_peer if one_each else None)
        for carrier, buffer in buffers:
            messages.write_back(carrier, buffer)


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
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
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
        if not roll_call.tells_of_a_loss(error):
            raise
        raise PeerLost(
            rank=int(os.environ["RANK"]),
            peer=None,
            verb="the start",
            timeout=timeout,
            cause=roll_call.first_sentence(error),
        ) from error


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
