"""The threads of a pass: each works through its own tiles in its own buffers, and their sums are added at the end.

Operations that all threads share hand every tile from one core to the other; threads that share nothing but the weights
do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...training import Batch
from .network import Network
from .tiles import Tiles

T = TypeVar("T")
Share = Iterator[tuple[Tensor, Tensor, slice]]
"""Tiles of a batch: features, targets, rows."""

MOST_WORKERS = 8
"""Python dispatches the operations of all workers under one lock; more threads than this divide each operation."""
WIDEST = 1024
"""Features, or units of a layer, up to which threads work apart. Beyond, the products are large enough to be divided,
and a float64 Gram matrix a thread would be the larger cost."""
TILES_APART = 4
"""Of each worker, at least; on fewer rows than that the operations are divided."""
_TURN = threading.Lock()
"""Held while torch's number of threads for threads yet to come is not what their user set."""


class Crew:
    """Workers with the buffers of one network each. torch's number of threads at this moment is what they divide.

    tile: rows of a tile; None chooses. On other devices than the processor there is one worker."""

    def __init__(self, network: Network, *, gamma: float, beta: float, flips: bool, tile: int | None) -> None:
        with _TURN:
            threads = torch.get_num_threads()
        on_cpu = network.linears[0].weight.device.type == "cpu"
        apart = on_cpu and network.stateless and max(network.widths) <= WIDEST
        self._threads = -(-threads // MOST_WORKERS) if apart else threads
        self.tiles = [
            Tiles(network, gamma=gamma, beta=beta, flips=flips, rows=tile, threads=self._threads if on_cpu else 1)
            for _ in range(threads // self._threads)
        ]
        self.device, self.widths = self.tiles[0].device, network.widths
        self.columns = [a.shape[1] for a in self.tiles[0].a]
        """Of each layer's inputs, the ones for the bias counted."""
        self.relax = self.tiles[0].relax
        for tiles in self.tiles[1:]:
            tiles.relax = self.relax
        self._pool: ThreadPoolExecutor | None = None
        """The other workers' threads; the first worker is the thread that asks."""
        self._busy: list[Future[list[Tensor]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None, "_busy": []}

    def zeros(self, *shape: int) -> Tensor:
        """A float64 accumulator beside the weights."""
        return self.tiles[0].zeros(*shape)

    def _apart(self, batch: Batch) -> bool:
        workers = len(self.tiles)
        return workers > 1 and len(batch) >= TILES_APART * workers * self.tiles[0].rows

    @contextmanager
    def at_work(self, batch: Batch) -> Iterator[None]:
        """Every `sum` over this batch belongs within: there, if the workers are apart, this thread does not divide its
        operations. torch's helpers go on turning for milliseconds after each operation they shared in, and would be in
        the workers' way. Other threads keep the number they have."""
        if not self._apart(batch):
            yield
            return
        threads = _take_threads(self._threads)
        try:
            yield
        finally:
            _take_threads(threads)

    def sum(self, batch: Batch, work: Callable[[Tiles, Share], list[Tensor]]) -> list[Tensor]:
        """work(buffers, tiles) on every worker, each on every n-th tile of the batch; the sums of what they return.

        The order of the sums depends on the number of workers alone, never on which is first to finish."""
        if not self._apart(batch):
            return work(self.tiles[0], self.tiles[0].of(batch))
        shares = [tiles.of(batch, first=i, every=len(self.tiles)) for i, tiles in enumerate(self.tiles)]
        pool, alone = self._others(), partial(_alone, work, torch.is_inference_mode_enabled())
        self._settle()  # whom a pass that was interrupted twice left behind
        try:
            for tiles, share in zip(self.tiles[1:], shares[1:], strict=True):
                self._busy.append(pool.submit(alone, tiles, share))
            total = work(self.tiles[0], shares[0])
            for other in self._busy:
                for mine, theirs in zip(total, other.result(), strict=True):
                    mine += theirs
        finally:
            self._settle()
        return total

    def _settle(self) -> None:
        """Wait until nobody writes any more."""
        wait(self._busy)
        self._busy = []

    def _others(self) -> ThreadPoolExecutor:
        if self._pool is None:
            others = len(self.tiles) - 1
            self._pool = ThreadPoolExecutor(others, "admm", initializer=_take_threads, initargs=(self._threads,))
        return self._pool


def _take_threads(number: int) -> int:
    """Let the operations of this thread be divided among so many, and of no other; returns among how many they were.

    torch keeps a number for each thread and one that a thread takes over when it first looks. Setting either sets both,
    so the second is put back, by a thread that is nothing but that."""
    with _TURN:
        before = torch.get_num_threads()
        everybodys = _in_a_new_thread(torch.get_num_threads)
        torch.set_num_threads(number)
        _in_a_new_thread(partial(torch.set_num_threads, everybodys))
    return before


def _in_a_new_thread(call: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as new:
        return new.submit(call).result()


def _alone(work: Callable[[Tiles, Share], list[Tensor]], inference: bool, tiles: Tiles, share: Share) -> list[Tensor]:
    with torch.inference_mode(inference), torch.no_grad():
        return work(tiles, share)
