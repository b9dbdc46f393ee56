"""The threads of a pass: each works through its own tiles in its own buffers, and their sums are added at the end.

Operations that all threads share hand every tile from one core's cache to the other's, and cores that are far apart
wait for each other's memory. Threads that share nothing but the weights do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch
from torch import Tensor

from ...training import Batch
from .network import Network
from .tiles import Tiles

Share = Iterator[tuple[Tensor, Tensor, slice]]
"""Tiles of a batch: features, targets, rows."""

MOST_WORKERS = 8
"""Python dispatches the operations of all workers under one lock; more threads than this divide each operation."""
WIDEST = 1024
"""Units of a layer up to which threads work apart. Beyond, the products are large enough to be divided, and a float64
Gram matrix a thread would be the larger cost."""
TILES_APART = 4
"""Of each worker, at least; on fewer rows than that the operations are divided."""


class Crew:
    """Workers with the buffers of one network each. torch's number of threads at this moment is what they divide.

    tile: rows of a tile; None chooses. On other devices than the processor there is one worker."""

    def __init__(self, network: Network, *, gamma: float, beta: float, flips: bool, tile: int | None) -> None:
        threads, widest = torch.get_num_threads(), max(network.widths)
        apart = network.linears[0].weight.device.type == "cpu" and widest <= WIDEST
        workers = min(threads, MOST_WORKERS) if apart else 1
        self._threads = max(1, threads // workers)
        self.tiles = [
            Tiles(network, gamma=gamma, beta=beta, flips=flips, rows=tile, threads=self._threads)
            for _ in range(workers)
        ]
        self.device, self.widths = self.tiles[0].device, network.widths
        self.columns = [a.shape[1] for a in self.tiles[0].a]
        """Of each layer's inputs, the ones for the bias counted."""
        self.relax = self.tiles[0].relax
        for tiles in self.tiles[1:]:
            tiles.relax = self.relax
        self._pool: ThreadPoolExecutor | None = None
        """The other workers' threads; the first worker is the thread that asks."""

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
        the workers' way. Afterwards it, and threads yet to come, have the number it had."""
        threads = torch.get_num_threads()
        if not self._apart(batch):
            yield
            return
        _take_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def sum(self, batch: Batch, work: Callable[[Tiles, Share], list[Tensor]]) -> list[Tensor]:
        """work(buffers, tiles) on every worker, each on every n-th tile of the batch; the sums of what they return.

        The order of the sums depends on the number of workers alone, never on which is first to finish."""
        if not self._apart(batch):
            return work(self.tiles[0], self.tiles[0].of(batch))
        shares = [tiles.of(batch, first=i, every=len(self.tiles)) for i, tiles in enumerate(self.tiles)]
        pool = self._others()
        others = [pool.submit(_alone, work, *one) for one in zip(self.tiles[1:], shares[1:], strict=True)]
        try:
            total = work(self.tiles[0], shares[0])
            for other in others:
                for mine, theirs in zip(total, other.result(), strict=True):
                    mine += theirs
        finally:
            wait(others)  # an interrupted pass leaves nobody behind who writes
        return total

    def _others(self) -> ThreadPoolExecutor:
        if self._pool is None:
            others = len(self.tiles) - 1
            self._pool = ThreadPoolExecutor(others, "admm", initializer=_take_threads, initargs=(self._threads,))
        return self._pool


def _take_threads(number: int) -> None:
    """Let the operations of this thread be divided among so many, whatever others set for themselves afterwards."""
    torch.set_num_threads(number)
    torch.get_num_threads()  # the first look takes over the number that was set last, by any thread: take it now


@torch.no_grad()
def _alone(work: Callable[[Tiles, Share], list[Tensor]], tiles: Tiles, share: Share) -> list[Tensor]:
    return work(tiles, share)
