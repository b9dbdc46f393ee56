"""Which rows a rank trains on, step by step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .training import BadInput, Batch, Training, stream

_EPOCHS = int.from_bytes(b"epoch", "big")


def share(num_rows: int, rank: int, size: int) -> slice:
    """The contiguous rows of a rank: every row is someone's, shares differ by at most one row, some may be empty."""
    return slice(num_rows * rank // size, num_rows * (rank + 1) // size)


class FullBatches:
    """The same Batch at each step: all rows, or this rank's contiguous share of them. A step counts as an epoch.

    The batch is a view of the rows it was given. It moves to another device at once if it lives in memory, and stays
    where it is if it is backed by a file, to be read in tiles by the method."""

    steps_per_epoch = 1

    def __init__(
        self, train: Batch, *, data: Literal["shard", "same"], rank: int, size: int, device: torch.device | None = None
    ) -> None:
        rows = share(len(train), rank, size) if data == "shard" else slice(0, len(train))
        x, y = train.x[rows], train.y[rows]
        if device is not None and device != x.device and not backed_by_file(x):
            x, y = x.to(device), y.to(device)
        self._batch = Batch(x, y, torch.arange(rows.start, rows.stop, device=y.device))
        self._num_rows = len(train)

    def batch(self, step: int) -> Batch:
        """What this rank trains on at step 0, 1, ..."""
        return self._batch

    def samples(self, step: int) -> int:
        """Rows that all ranks together have been given in the first `step` steps."""
        return step * self._num_rows


class MiniBatches:
    """Mini-batches of `batch_size` rows a rank, in an order that only (seed, epoch) decides.

    With data="shard" a step takes the next size * batch_size rows of the epoch's permutation and each rank its own
    batch_size of them; with data="same" every rank takes the same batch_size rows. Every rank takes the same number of
    steps an epoch. The rows that remain make a last, smaller batch, as many for each rank: so at most size - 1 rows
    sit out an epoch, other ones each time, and none do on one rank. Only the rows of a batch are read.

    Raises BadInput when there are fewer rows than ranks, and for a batch size below 1."""

    def __init__(
        self,
        train: Batch,
        *,
        data: Literal["shard", "same"],
        rank: int,
        size: int,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise BadInput(f"batch_size must be at least 1 row, got {batch_size}")
        self._train, self._seed, self._device = train, seed, device
        self._parts, self._part = (size, rank) if data == "shard" else (1, 0)
        self._batch_size = batch_size
        self._num_full, rest = divmod(len(train), self._parts * batch_size)
        self._last = rest // self._parts
        self.steps_per_epoch = self._num_full + (self._last > 0)
        if self.steps_per_epoch == 0:
            raise BadInput(f"{len(train)} training rows cannot be shared by {size} ranks; use fewer ranks or more rows")
        self._order: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> Batch:
        """What this rank trains on at step 0, 1, ..."""
        epoch, position = divmod(step, self.steps_per_epoch)
        rows = self._batch_size if position < self._num_full else self._last
        start = position * self._parts * self._batch_size + self._part * rows
        index = self._permutation(epoch)[start : start + rows]
        x = self._train.x.index_select(0, index.to(self._train.x.device))
        y = self._train.y.index_select(0, index.to(self._train.y.device))
        if self._device is not None:
            x, y, index = x.to(self._device), y.to(self._device), index.to(self._device)
        return Batch(x, y, index)

    def samples(self, step: int) -> int:
        """Rows that all ranks together have been given in the first `step` steps."""
        epochs, position = divmod(step, self.steps_per_epoch)
        in_an_epoch = self._parts * (self._num_full * self._batch_size + self._last)
        return epochs * in_an_epoch + position * self._parts * self._batch_size

    def _permutation(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = stream(self._seed, _EPOCHS, epoch)
            self._order = (epoch, torch.randperm(len(self._train), generator=generator))
        return self._order[1]


def deal(
    training: Training[Batch],
    train: Batch,
    *,
    rank: int,
    size: int,
    batch_size: int,
    seed: int,
    device: torch.device | None = None,
) -> FullBatches | MiniBatches:
    """The batches that this Training asks for, on this rank of so many."""
    if training.batches == "full":
        return FullBatches(train, data=training.data, rank=rank, size=size, device=device)
    return MiniBatches(train, data=training.data, rank=rank, size=size, batch_size=batch_size, seed=seed, device=device)


def backed_by_file(tensor: Tensor) -> bool:
    """Whether the tensor's memory is a mapped file, where the system says so (Linux)."""
    address = tensor.data_ptr()
    try:
        with open("/proc/self/maps") as regions:
            for region in regions:
                fields = region.split(maxsplit=5)
                start, stop = (int(end, 16) for end in fields[0].split("-"))
                if start <= address < stop:
                    return len(fields) > 5 and fields[5].startswith("/")
    except OSError:
        return False
    return False
