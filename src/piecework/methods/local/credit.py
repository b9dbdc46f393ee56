"""Which block learns from which loss: the credit matrix C, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Coupling = Literal["greedy", "overlap", "chunk", "interlock"]
Credit = Sequence[Sequence[float]]
"""(K, K), upper triangular: row k says how much of d l_j / d theta_k block k steps along."""


def credit(coupling: Coupling, num_blocks: int, reach: int, *, use_own_loss: bool = True) -> Credit:
    """The matrix of a coupling of K blocks.

    reach: blocks of a chunk, or N of N-wise interlocking, where 1 is greedy and K end to end; not used by the others.
    use_own_loss: overlap has the own loss beside the next block's."""
    last = num_blocks - 1
    matrix = [[0.0] * num_blocks for _ in range(num_blocks)]
    for k, row in enumerate(matrix):
        if coupling == "greedy":
            row[k] = 1.0
        elif coupling == "chunk":
            row[min((k // reach + 1) * reach - 1, last)] = 1.0
        elif coupling == "interlock":
            row[min(k + reach - 1, last)] = 1.0
        else:
            row[min(k + 1, last)] = 1.0
            if use_own_loss:
                row[k] = 1.0
    return matrix


def first_reach(coupling: Coupling, reach: int) -> int:
    """The reach from which annealing starts to grow."""
    return reach if coupling in ("chunk", "interlock") else 1


def grown(first: int, num_blocks: int, span: tuple[int, int], step: int) -> int:
    """The reach at a step of an annealing that begins with step span[0] and has reached all blocks by span[1]."""
    begin, end = span
    if step < begin or first >= num_blocks:
        return min(first, num_blocks)
    part = (step - begin) / (end - begin)
    return min(num_blocks, first + int(part * (num_blocks - first)))


@dataclass(frozen=True)
class Routes:
    """What a credit matrix asks of each block; only blocks that learn count.

    rows: the losses that a block learns from, with their weights; down: the losses, rising, whose derivative it hands
    to the block below; used: whether any block learns from a loss."""

    rows: tuple[dict[int, float], ...]
    down: tuple[tuple[int, ...], ...]
    used: tuple[bool, ...]


def routes(matrix: Credit, learning: Sequence[bool]) -> Routes:
    """A derivative travels no further than to the lowest block that learns from it.

    learning: whether each block has parameters to train."""
    blocks = range(len(matrix))
    rows = tuple(
        {j: weight for j, weight in enumerate(row) if weight and j >= k and learns}
        for k, (row, learns) in enumerate(zip(matrix, learning, strict=True))
    )
    down = tuple(tuple(j for j in blocks if j >= k and any(j in rows[i] for i in range(k))) for k in blocks)
    return Routes(rows, down, tuple(any(j in row for row in rows) for j in blocks))
