"""What blocks on different ranks tell each other: activations go up, targets come down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...group import Group, Pending
from ..blocks import one_row


class Neighbours:
    """The ranks that hold the blocks below and above this rank's. On one rank nothing is ever sent.

    A message is as long as the other rank expects, because every rank has the whole model and the same rows: `learn`
    finds the shapes of the two tensors that pass here."""

    def __init__(self, group: Group, blocks: Sequence[nn.Module], first: int, last: int) -> None:
        self._group, self._blocks, self._first, self._last = group, blocks, first, last
        self._known: tuple[torch.Size, torch.dtype] | None = None
        self._shapes: dict[int, tuple[torch.Size, torch.dtype]] = {}
        self._device = torch.device("cpu")
        self._pending: list[Pending] = []

    def learn(self, x: Tensor) -> None:
        """Look at the rows of a step: how large messages are."""
        if self._group.size == 1:
            return
        self._device = x.device
        if self._known == (x.shape[1:], x.dtype):
            return
        self._known = (x.shape[1:], x.dtype)
        rows = one_row(self._blocks[: self._last + 1], x)
        self._shapes = {number: (row.shape[1:], row.dtype) for number, row in enumerate(rows)}

    def up(self, given: Tensor) -> None:
        """Send what this rank's last block gave to the rank above."""
        self._send(self._group.rank + 1, given)

    def from_below(self, rows: int) -> Tensor:
        """What the rank below sent up, of so many rows."""
        return self._receive(self._group.rank - 1, self._first - 1, rows)

    def down(self, reach: Tensor | None, beta: float | Tensor) -> None:
        """Send the target of the rank below: how far its output is to move, and the penalty; None for no target."""
        weight = torch.as_tensor(0.0 if reach is None else beta, dtype=torch.float64).reshape(1)
        self._send(self._group.rank - 1, weight.cpu())
        if reach is not None:
            self._send(self._group.rank - 1, reach)

    def from_above(self, rows: int) -> tuple[Tensor | None, float]:
        """The target that the rank above sent, and its penalty."""
        weight = torch.zeros(1, dtype=torch.float64)
        self._group.exchange({}, {self._group.rank + 1: weight}).wait()
        beta = float(weight)
        return (self._receive(self._group.rank + 1, self._last, rows), beta) if beta > 0 else (None, 1.0)

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        pending, self._pending = self._pending, []
        for one in pending:
            one.wait()

    def _send(self, peer: int, tensor: Tensor) -> None:
        self._pending.append(self._group.exchange({peer: tensor.contiguous()}, {}))

    def _receive(self, peer: int, block: int, rows: int) -> Tensor:
        shape, dtype = self._shapes[block]
        buffer = torch.empty((rows, *shape), dtype=dtype, device=self._device)
        self._group.exchange({}, {peer: buffer}).wait()
        return buffer
