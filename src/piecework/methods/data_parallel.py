"""Gradients averaged over the processes of a torch process group: DistributedDataParallel, counted on the group."""

from __future__ import annotations

import inspect
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..group import Ranks


class Bucket(Protocol):
    """What this module needs of torch's `GradBucket`, which builds without distributed lack."""

    def buffer(self) -> Tensor:
        """The gradients of the bucket, flat."""
        ...


class DataParallel:
    """The model under `DistributedDataParallel`; on the outside it stays the plain module.

    The buckets' sums are counted on the group, wait no longer than the group does, and fail as the group's verbs do.
    bucket_cap_mb: MiB of gradients that travel together; None for torch's choice."""

    def __init__(self, model: nn.Module, group: Ranks, *, bucket_cap_mb: float | None = None) -> None:
        self._group = group
        # The start weights are equal already, and buffers stay each rank's own. torch 2.13 has another name for the
        # latter and warns of the old one.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        silent: dict[str, Any] = {name: False for name in (buffers, "init_sync") if name in known}
        self._wrapped = DistributedDataParallel(
            model,
            process_group=group.process_group,
            gradient_as_bucket_view=True,
            bucket_cap_mb=bucket_cap_mb,
            **silent,
        )
        # A lambda, because torch compares a hook's annotations, if it has any, with the class itself.
        self._wrapped.register_comm_hook(None, lambda _, bucket: self._average(bucket))
        self._last_bucket: float | None = None
        """When the last sum of a backward pass was begun."""

    def forward(self, x: Tensor) -> Tensor:
        with self._group.failures("the gradient average"):
            z: Tensor = self._wrapped(x)
        return z

    def backward(self, loss: Tensor) -> None:
        with self._group.failures("the gradient average"):
            loss.backward()  # type: ignore[no-untyped-call]
        if self._last_bucket is not None:  # the backward pass ended with it, but for the sums
            self._group.waits.note("gradients", self._group.step, (), self._last_bucket, time.perf_counter())

    def _average(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        self._last_bucket = time.perf_counter()
        return _average(self._group, bucket)


def _average(group: Ranks, bucket: Bucket) -> torch.futures.Future[Tensor]:
    """DDP's default hook (divide, then add up without waiting), with the group's accounting and timeout."""
    buffer = bucket.buffer().div_(group.size)
    group.bytes_sent += buffer.numel() * buffer.element_size()
    group.rounds += 1
    options = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=group.timeout)
    future: torch.futures.Future[Tensor] = group.process_group.allreduce([buffer], options).get_future().then(_first)
    return future


def _first(future: torch.futures.Future[Any]) -> Tensor:
    tensor: Tensor = future.value()[0]
    return tensor
