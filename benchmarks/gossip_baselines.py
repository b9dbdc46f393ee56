"""What gossip is compared with, under the contract of the methods: a recipe, `bind`, then `step(batch)` and `sync()`.

| recipe | what travels | source |
|---|---|---|
| `Overlapped` | gradients, in buckets during the backward pass | torch's DistributedDataParallel (Li et al. 2020) |
| `AllReduce` | gradients, as one sum after the backward pass | |
| `LocalSGD` | the parameters' mean, every so many steps | Stich 2019, arXiv:1805.09767, algorithm 1 |
| `DPSGD` | parameters to neighbours and back | Lian et al. 2017, arXiv:1705.09056, algorithm 1 |
| `ADPSGD` | the same between pairs, when it comes | Lian et al. 2018, arXiv:1710.06952, algorithm 1 |

`optimizer` makes any torch optimizer of the parameters; its state stays each rank's own. Between two calls of `sync` a
rank's model holds its own parameters; `sync` shows their mean, and the next step goes on from the rank's own.
`LocalSGD(every=None)` never communicates. `close` ends what runs in the background; collective.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piecework import Batch, Group
from piecework.group import Ranks, current
from piecework.losses import Loss
from piecework.methods.data_parallel import DataParallel
from piecework.methods.parameters import start_from_rank_0, trainable
from piecework.training import Metrics, stream

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Training(Protocol):
    model: nn.Module

    def step(self, batch: Batch) -> Metrics: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Baseline(Protocol):
    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training: ...


@dataclass(frozen=True, kw_only=True)
class Overlapped:
    """Gradients averaged during the backward pass: the baseline that counts."""

    optimizer: Factory
    bucket_cap_mb: float | None = None
    """MiB of gradients that travel together; None for torch's choice."""

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training:
        return _Overlapped(self, model, loss, group or current())


class _Overlapped:
    def __init__(self, recipe: Overlapped, model: nn.Module, loss: Loss, group: Group) -> None:
        if not isinstance(group, Ranks):
            raise ValueError("DistributedDataParallel needs the processes of a torch process group")
        self.model, self._loss = model, loss
        self._optimizer = recipe.optimizer(trainable(model, "ddp"))
        start_from_rank_0(model, group)
        self._parallel = DataParallel(model, group, bucket_cap_mb=recipe.bucket_cap_mb)

    def step(self, batch: Batch) -> Metrics:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._parallel.forward(batch.x), batch.y)
        self._parallel.backward(loss)
        self._optimizer.step()
        return {"loss": loss.detach()}

    def sync(self) -> None:
        return None

    def close(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """Gradients summed as one message when all are there."""

    optimizer: Factory

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training:
        return _AllReduce(self, model, loss, group or current())


class _AllReduce:
    def __init__(self, recipe: AllReduce, model: nn.Module, loss: Loss, group: Group) -> None:
        self.model, self._loss, self._group = model, loss, group
        self._parameters = trainable(model, "all-reduce")
        self._optimizer = recipe.optimizer(self._parameters)
        start_from_rank_0(model, group)

    def step(self, batch: Batch) -> Metrics:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.model(batch.x), batch.y)
        (loss / self._group.size).backward()
        self._group.sum_(*(parameter.grad for parameter in self._parameters if parameter.grad is not None))
        self._optimizer.step()
        return {"loss": loss.detach()}

    def sync(self) -> None:
        return None

    def close(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """Steps of one's own, and the mean of all ranks' parameters from time to time."""

    optimizer: Factory
    every: int | None = 8
    """Steps between averages; None for none at all."""
    warmup_steps: int = 0
    """First steps with an average after each (post-local SGD)."""

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training:
        return _LocalSGD(self, model, loss, group or current())


class _LocalSGD:
    def __init__(self, recipe: LocalSGD, model: nn.Module, loss: Loss, group: Group) -> None:
        self.model, self._loss, self._group, self._recipe = model, loss, group, recipe
        start_from_rank_0(model, group)
        parameters = trainable(model, "local-sgd")
        self._own = _Vector(parameters)
        self._optimizer = recipe.optimizer(parameters)
        self._steps = 0

    def step(self, batch: Batch) -> Metrics:
        self._own.show()
        loss = _gradient(self.model, self._loss, self._optimizer, batch)
        self._optimizer.step()
        self._steps += 1
        if self._due():
            _average_(self._own.x, self._group)
        return {"loss": loss}

    def _due(self) -> bool:
        every = self._recipe.every
        return every is not None and (self._steps <= self._recipe.warmup_steps or self._steps % every == 0)

    def sync(self) -> None:
        self._own.show_mean(self._group)

    def close(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """x <- W x - lr u(gradient at x), W symmetric and doubly stochastic; x travels while the gradient is computed."""

    optimizer: Factory
    graph: Literal["pairs", "ring"] = "pairs"
    """pairs: one peer a step with shares of a half, along the dimensions of a hypercube (ranks a power of two) or the
    two halves of a ring's edges. ring: both neighbours in each step with shares of a third, twice the bytes."""

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training:
        return _DPSGD(self, model, loss, group or current())


class _DPSGD:
    def __init__(self, recipe: DPSGD, model: nn.Module, loss: Loss, group: Group) -> None:
        self.model, self._loss, self._group, self._recipe = model, loss, group, recipe
        start_from_rank_0(model, group)
        parameters = trainable(model, "d-psgd")
        self._own = _Vector(parameters)
        self._optimizer = recipe.optimizer(parameters)
        self._arriving = [torch.empty_like(self._own.x) for _ in range(2)]
        self._steps = 0

    def step(self, batch: Batch) -> Metrics:
        self._own.show()
        peers = neighbours(self._recipe.graph, self._group.rank, self._group.size, self._steps)
        # The optimizer moves x only after the exchange has ended, so x itself can be the message.
        buffers = dict(zip(peers, self._arriving, strict=False))
        pending = self._group.exchange(dict.fromkeys(peers, self._own.x), buffers)
        loss = _gradient(self.model, self._loss, self._optimizer, batch)
        pending.wait()
        self._own.x.mul_(1 / (1 + len(peers)))
        for buffer in buffers.values():
            self._own.x.add_(buffer, alpha=1 / (1 + len(peers)))
        self._optimizer.step()
        self._steps += 1
        return {"loss": loss}

    def sync(self) -> None:
        self._own.show_mean(self._group)

    def close(self) -> None:
        return None


def neighbours(graph: str, rank: int, size: int, step: int) -> list[int]:
    """With whom a rank exchanges in a step: symmetric, so that equal shares make W doubly stochastic."""
    if size == 1:
        return []
    if graph == "ring":
        return sorted({(rank - 1) % size, (rank + 1) % size} - {rank})
    if size & (size - 1) == 0:
        return [rank ^ (1 << step % (size.bit_length() - 1))]
    first = (rank - step) % 2 == 0  # of the edge to the next rank, or the second of the edge from the one before
    if size % 2:  # an open chain: the last rank, and on odd steps the first, may have no partner
        peer = rank + 1 if first else rank - 1
        return [peer] if 0 <= peer < size else []
    return [(rank + 1) % size if first else (rank - 1) % size]


@dataclass(frozen=True, kw_only=True)
class ADPSGD:
    """Even ranks average with a random odd rank, one step after another in a thread of their own; nobody waits.

    Both sides move by half of the difference of what they sent, so that steps taken meanwhile are kept and the sum over
    the ranks is too. The gradient is that of the parameters at the beginning of the step."""

    optimizer: Factory
    bound: int | None = 1
    """Steps that an even rank may be ahead of its averages, at most one of which belongs to a step; None for any."""
    seed: int = 0

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training:
        return _ADPSGD(self, model, loss, group or current())


class _ADPSGD:
    def __init__(self, recipe: ADPSGD, model: nn.Module, loss: Loss, group: Group) -> None:
        if not isinstance(group, Ranks) or group.size < 2:
            raise ValueError("AD-PSGD needs at least two processes of a torch process group")
        self.model, self._loss, self._group, self._recipe = model, loss, group, recipe
        start_from_rank_0(model, group)
        parameters = trainable(model, "ad-psgd")
        self._own = _Vector(parameters)
        self._optimizer = recipe.optimizer(parameters)
        self._x = self._own.x.clone()  # what the threads average; the model keeps still during a gradient
        self._changed = threading.Condition()
        self._steps = self._averages = 0
        self._stopping, self._failed = False, None
        self._threads = [threading.Thread(target=self._guarded, args=args, daemon=True) for args in self._jobs()]
        # Collectives keep the group; a receive that waits for hours has one of its own.
        self._pg = dist.new_group(dist.get_process_group_ranks(group.process_group), timeout=timedelta(hours=12))
        for thread in self._threads:
            thread.start()

    def step(self, batch: Batch) -> Metrics:
        self._wait_for_averages()
        with self._changed:
            self._own.x.copy_(self._x)
        loss = _gradient(self.model, self._loss, self._optimizer, batch)
        with self._changed:
            self._own.x.copy_(self._x)
            self._optimizer.step()
            self._x.copy_(self._own.x)
            self._steps += 1
            self._changed.notify_all()
        return {"loss": loss}

    def sync(self) -> None:
        """The mean of the moment: averages go on meanwhile, until `close`."""
        with self._changed:
            self._own.x.copy_(self._x)
        _average_(self._own.x, self._group)

    def close(self) -> None:
        """Even ranks finish their last average and say goodbye to every odd one, which ends those ranks' threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._is_active:
            for thread in self._threads:
                thread.join()
            for peer in self._peers():
                self._send(torch.zeros(1), peer)  # shorter than what is expected: gloo leaves the rest untouched
        for thread in self._threads:
            thread.join()

    @property
    def _is_active(self) -> bool:
        return self._group.rank % 2 == 0

    def _peers(self) -> list[int]:
        return list(range(1 if self._is_active else 0, self._group.size, 2))

    def _jobs(self) -> list[tuple[object, ...]]:
        return [(self._propose,)] if self._is_active else [(self._answer, peer) for peer in self._peers()]

    def _guarded(self, job: Callable[..., None], *args: int) -> None:
        try:
            job(*args)
        except RuntimeError as error:
            with self._changed:
                self._failed = error
                self._changed.notify_all()

    def _wait_for_averages(self) -> None:
        bound = self._recipe.bound
        if bound is not None and self._is_active:
            with self._changed:
                self._changed.wait_for(lambda: self._failed or self._steps - self._averages <= bound)
        if self._failed is not None:
            raise self._failed

    def _propose(self) -> None:
        draw, peers = stream(self._recipe.seed, self._group.rank), self._peers()
        message, reply = torch.ones(self._x.numel() + 1), torch.empty_like(self._x)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._averages < self._steps)
                if self._stopping:
                    return
                message[1:].copy_(self._x)
            peer = peers[int(torch.randint(len(peers), (), generator=draw))]
            self._send(message, peer)
            self._receive(reply, peer)
            with self._changed:
                self._x.add_(reply.sub_(message[1:]), alpha=0.5)
                self._averages += 1
                self._changed.notify_all()

    def _answer(self, peer: int) -> None:
        message, reply = torch.empty(self._x.numel() + 1), torch.empty_like(self._x)
        while True:
            self._receive(message, peer)
            if message[0] == 0:
                return
            with self._changed:
                reply.copy_(self._x)
                self._x.lerp_(message[1:], 0.5)
            self._send(reply, peer)

    def _send(self, tensor: Tensor, peer: int) -> None:
        self._pg.send([tensor], peer, 0).wait()
        self._group.bytes_sent += tensor.numel() * tensor.element_size()
        self._group.rounds += 1

    def _receive(self, tensor: Tensor, peer: int) -> None:
        self._pg.recv([tensor], peer, 0).wait()


class _Vector:
    """The parameters as parts of one vector `x`, so that mixing is one operation; and their mean on show."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        if len(kinds) != 1:
            raise ValueError(f"these baselines take parameters of one dtype on one device, got {kinds}")
        self.x = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        parts = self.x.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part.view(parameter.shape)
        self._hidden: Tensor | None = None

    def show_mean(self, group: Group) -> None:
        if self._hidden is None:
            self._hidden = self.x.clone()
            _average_(self.x, group)

    def show(self) -> None:
        """The rank's own again."""
        if self._hidden is not None:
            self.x.copy_(self._hidden)
            self._hidden = None


def _average_(x: Tensor, group: Group) -> None:
    x.div_(group.size)
    group.sum_(x)


def _gradient(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    value = loss(model(batch.x), batch.y)
    value.backward()
    return value.detach()
