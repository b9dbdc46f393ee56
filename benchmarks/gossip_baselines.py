"""What gossip is compared with, under the contract of the methods: a recipe, `bind`, then `step(batch)` and `sync()`.

| recipe | what travels | source |
|---|---|---|
| `Overlapped` | gradients, in buckets during the backward pass | torch's DistributedDataParallel (Li et al. 2020) |
| `AllReduce` | gradients, as one sum after the backward pass | |
| `LocalSGD` | the parameters' mean, every so many steps | Stich 2019, arXiv:1805.09767, algorithm 1 |
| `DPSGD` | parameters to neighbours and back | Lian et al. 2017, arXiv:1705.09056, algorithm 1 |
| `ADPSGD` (`ad_psgd.py`) | the same between pairs, when it comes | Lian et al. 2018, arXiv:1710.06952, algorithm 1 |

`optimizer` makes any torch optimizer of the parameters; its state stays each rank's own. Between two calls of `sync` a
rank's model holds its own parameters; `sync` shows their mean, and the next step goes on from the rank's own.
`LocalSGD(every=None)` never communicates. `close` ends what runs in the background; collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from one_vector import Vector, average_, gradient_of
from piecework import Batch, Group
from piecework.group import Ranks, current
from piecework.losses import Loss
from piecework.methods.data_parallel import DataParallel
from piecework.methods.parameters import start_from_rank_0, trainable
from piecework.training import Metrics

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
    wire: Literal["full", "bfloat16"] = "full"
    """bfloat16: torch's hook that halves the gradients' bytes (`bf16_compress_hook`)."""

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training:
        return _Overlapped(self, model, loss, group or current())


class _Overlapped:
    def __init__(self, recipe: Overlapped, model: nn.Module, loss: Loss, group: Group) -> None:
        if not isinstance(group, Ranks):
            raise ValueError("DistributedDataParallel needs the processes of a torch process group")
        self.model, self._loss = model, loss
        self._optimizer = recipe.optimizer(trainable(model, "ddp"))
        start_from_rank_0(model, group)
        made = DataParallel if recipe.wire == "full" else _Narrow
        self._parallel = made(model, group, bucket_cap_mb=recipe.bucket_cap_mb)

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


class _Narrow:
    """As `DataParallel`, with gradients in bfloat16 while they travel and are summed."""

    def __init__(self, model: nn.Module, group: Ranks, *, bucket_cap_mb: float | None) -> None:
        self.forward = DistributedDataParallel(
            model, process_group=group.process_group, gradient_as_bucket_view=True, bucket_cap_mb=bucket_cap_mb
        )
        self.forward.register_comm_hook(group, _narrow_average)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def _narrow_average(group, bucket):  # torch compares a hook's annotations, if it has any, with its own classes
    group.bytes_sent += 2 * bucket.buffer().numel()
    group.rounds += 1
    return bf16_compress_hook(group.process_group, bucket)


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
        self._own = Vector(parameters)
        self._optimizer = recipe.optimizer(parameters)
        self._steps = 0

    def step(self, batch: Batch) -> Metrics:
        self._own.show()
        loss = gradient_of(self.model, self._loss, self._optimizer, batch)
        self._optimizer.step()
        self._steps += 1
        if self._due():
            average_(self._own.x, self._group)
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
        self._own = Vector(parameters)
        self._optimizer = recipe.optimizer(parameters)
        self._arriving = [torch.empty_like(self._own.x) for _ in range(2)]
        self._steps = 0

    def step(self, batch: Batch) -> Metrics:
        self._own.show()
        peers = neighbours(self._recipe.graph, self._group.rank, self._group.size, self._steps)
        # The optimizer moves x only after the exchange has ended, so x itself can be the message.
        buffers = dict(zip(peers, self._arriving, strict=False))
        pending = self._group.exchange(dict.fromkeys(peers, self._own.x), buffers)
        loss = gradient_of(self.model, self._loss, self._optimizer, batch)
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
