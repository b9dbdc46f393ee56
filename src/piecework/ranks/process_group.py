"""The processes of a torch process group as a Group."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..timeline import Waits
from ..training import BadInput, PeerLost
from . import messages, roll_call
from .meeting import Store, connect, named

if TYPE_CHECKING:
    from ..group import Pending
    from .mailbox import Mailbox

_TAG = 0x70776B


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
        pairs = (pair.partition(":") for pair in dist.get_backend_config(pg).split(","))
        seconds = roll_call.own_timeout(pg) if timeout is None else float(timeout)
        self._set_up(pg, roll_call.store_of(pg), {kind: backend for kind, _, backend in pairs}, seconds)

    @classmethod
    def met(cls, store: Store, rank: int, size: int, *, timeout: float) -> Ranks:
        """A group of the processes that call this with the same store, without torch's default group: for ranks that
        come and go. store: with a name of this group's own in front. On gloo; `PeerLost` where one does not come."""
        group = cls.__new__(cls)
        group.rank, group.size = rank, size
        try:
            pg = connect(store, rank, size, timeout)
        except RuntimeError as error:
            if not roll_call.tells_of_a_loss(error):
                raise
            cause = roll_call.first_sentence(error)
            raise PeerLost(rank=rank, peer=None, verb="the meeting", timeout=timeout, cause=cause) from error
        group._set_up(pg, store, {"cpu": "gloo", "cuda": "gloo"}, timeout)
        return group

    def _set_up(self, pg: dist.ProcessGroup, store: Store | None, backends: Mapping[str, str], timeout: float) -> None:
        self.timeout = timeout
        self.step: int | None = None
        """The step under way, for errors; whoever drives the training may set it, as well as `timeout`."""
        self.bytes_sent = 0
        self.rounds = 0
        self.store = store
        """Where the ranks met, None where torch does not tell; writers put a name of their own in front."""
        self._pg, self._backends = pg, backends
        self.waits = Waits(self.rank, range(self.size))
        """When this rank waited for others."""
        self._packs = messages.Packs()
        self._lost: PeerLost | None = None
        self._mailboxes: list[Mailbox] = []
        self._others: list[Ranks] = []

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
            return _Exchange(self, [], [], [])
        self._refuse_if_broken("exchange")
        into = [(peer, messages.as_bytes(tensor, self._wire(tensor.device)), tensor) for peer, tensor in recv.items()]
        out = [(peer, messages.as_bytes(tensor, self._wire(tensor.device))) for peer, tensor in send.items()]
        try:
            works = self._post([(peer, carrier) for peer, carrier, _ in into], out)
        except RuntimeError as error:
            self._fail("exchange", error, None)
        self._count(sum(map(messages.num_bytes, send.values())))
        ends = [*((peer, carrier) for peer, carrier, _ in into), *out]
        return _Exchange(self, works, ends, [(carrier, tensor) for _, carrier, tensor in into])

    def _post(self, into: Sequence[tuple[int, Tensor]], out: Sequence[tuple[int, Tensor]]) -> list[dist.Work]:
        """Works of the messages in and then of those out; NCCL makes one work of the whole batch."""
        if (into or out)[0][1].device.type == "cpu":
            works = [self._pg.recv([carrier], peer, 0) for peer, carrier in into]
            return works + [self._pg.send([carrier], peer, 0) for peer, carrier in out]
        ops = [dist.P2POp(dist.irecv, carrier, group=self._pg, group_peer=peer) for peer, carrier in into]
        ops += [dist.P2POp(dist.isend, carrier, group=self._pg, group_peer=peer) for peer, carrier in out]
        return dist.batch_isend_irecv(ops)

    def mailbox(self, capacity: int) -> Mailbox:
        from .mailbox import GlooMailbox

        if self.store is None:
            raise BadInput("a mailbox needs the store that the ranks met through, and torch does not tell of one")
        self.any(False)  # all ranks are here: connecting has only the one timeout
        name = f"piecework/mailbox {len(self._mailboxes)}"
        box = GlooMailbox(
            named(self.store, name),
            self.rank,
            self.size,
            capacity=capacity,
            timeout=self.timeout,
            count=self._count,
            step=lambda: self.step,
            waits=self.waits,
        )
        self._mailboxes.append(box)
        return box

    def again(self, store: Store, name: int, members: Sequence[int], epoch: int, timeout: float) -> Ranks:
        """A new group of these members, of which `name` is this process, over connections of its own.

        All call this with the same numbers and a store for this epoch alone; `PeerLost` where one does not come."""
        group = Ranks.met(store, members.index(name), len(members), timeout=timeout)
        group.timeout, group.waits = self.timeout, self.waits
        self.waits.meet(name, members)
        self._others.append(group)
        return group

    def hang_up(self) -> None:
        """Close the connections to the other ranks, so that none waits for this one in a verb. On gloo."""
        self._wake([peer for peer in range(self.size) if peer != self.rank])

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
        """Close the mailboxes, and let go of the process group, which is about to be destroyed; no verb may follow."""
        for other in self._others:
            other.leave()
        for box in self._mailboxes:
            box.close()
        del self._pg, self.store

    def _run(self, verb: str, wire: torch.device, post: Callable[[], dist.Work]) -> None:
        with self.failures(verb), self.waits.waiting(verb, self.step):
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
        wake = self._wake if suspect is None and self._backends.get("cpu") == "gloo" else None
        patience = min(2.0, self.timeout)
        roll = roll_call.call(self.store, self.rank, self.size, suspect, patience=patience, wake=wake)
        peer, found = roll_call.blame(roll, self.rank, suspect)
        cause = "; ".join(filter(None, [roll_call.first_sentence(error), found]))
        self._lost = PeerLost(rank=self.rank, peer=peer, verb=verb, timeout=self.timeout, step=self.step, cause=cause)
        raise self._lost from error

    def _wake(self, peers: Sequence[int]) -> None:
        """Close the connections to those who have not noticed that their collective call cannot end.

        In a ring only the neighbours of a lost rank are told; the others would sit out their timeout. On gloo a receive
        that expires closes the connection, which is as good as a word. The tag is nobody else's: a message longer than
        the buffer would end the process."""
        for peer in peers:
            with suppress(RuntimeError):
                self._pg.recv([torch.empty(1, dtype=torch.uint8)], peer, _TAG).wait(timedelta(milliseconds=1))


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
        ends: Sequence[tuple[int, Tensor]],
        buffers: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self._group, self._works, self._ends, self._buffers = group, works, ends, buffers

    def wait(self) -> None:
        if not self._works:
            return
        self._group._refuse_if_broken("exchange")
        works, buffers = self._works, self._buffers
        self._works, self._buffers = (), ()
        # NCCL makes one work of the whole batch, and then no single peer can be named.
        one_each = len(works) == len(self._ends)
        until, began = time.monotonic() + self._group.timeout, time.perf_counter()
        for work, (peer, carrier) in zip(works, self._ends, strict=False):
            try:
                _finish(work, carrier.device, max(0.001, until - time.monotonic()))
            except RuntimeError as error:
                self._group._fail("exchange", error, peer if one_each else None)
        peers = dict.fromkeys(peer for peer, _ in self._ends)
        self._group.waits.note("exchange", self._group.step, [*peers], began, time.perf_counter())
        for carrier, buffer in buffers:
            messages.write_back(carrier, buffer)
