"""Rows for ranks: alike, or each with classes of its own (Dirichlet); and the batches that they make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from piecework import Batch


def alike(y: Tensor, ranks: int, seed: int) -> list[Tensor]:
    """Row numbers of each rank: a permutation in equal parts; at most ranks - 1 rows are left over."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    size = len(y) // ranks
    return [order[rank * size : (rank + 1) * size] for rank in range(ranks)]


def dirichlet(y: Tensor, ranks: int, alpha: float, seed: int) -> list[Tensor]:
    """Row numbers of each rank, equally many, each class's part in a rank drawn from Dirichlet(alpha), as in Hsu, Qi,
    Brown, arXiv:1909.06335. A class that is used up has probability 0 from then on; ranks draw one row in turn."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(y.max()) + 1
    left = [(y == one).nonzero()[:, 0] for one in range(classes)]
    left = [rows[torch.randperm(len(rows), generator=generator)] for rows in left]
    gammas = torch._standard_gamma(torch.full((ranks, classes), alpha, dtype=torch.float64), generator=generator)
    parts = gammas.clamp_min(1e-12)
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    used = [0] * classes
    for _ in range(len(y) // ranks):
        for rank in range(ranks):
            weights = parts[rank] * torch.tensor([float(used[one] < len(left[one])) for one in range(classes)])
            one = int(torch.multinomial(weights, 1, generator=generator))
            found[rank].append(left[one][used[one]])
            used[one] += 1
    return [torch.stack(rows) for rows in found]


class Shard:
    """Mini-batches of one rank's rows, shuffled anew in each pass over them."""

    def __init__(self, train: Batch, rows: Tensor, batch_size: int, seed: int) -> None:
        self._train, self._rows, self._batch_size = train, rows, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self) -> Batch:
        if len(self._order) < self._batch_size:
            shuffled = self._rows[torch.randperm(len(self._rows), generator=self._generator)]
            self._order = torch.cat([self._order, shuffled])
        rows, self._order = self._order[: self._batch_size], self._order[self._batch_size :]
        return Batch(self._train.x[rows], self._train.y[rows], rows)
