"""What ranks tell each other: activations go up at once, derivatives come down where a block below learns from them.

Both sides know how long each message is, because every rank has the whole model and is given the same rows."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ...group import Group, Pending
from ...training import BadInput

_WRAP = 1_000_003


class Links:
    """The ranks below and above this one; on one rank nothing is ever sent.

    buffers: activations that may be on their way up before this rank waits. staleness: steps by which a derivative may
    be late, a block."""

    def __init__(self, group: Group, *, buffers: int, staleness: int) -> None:
        self._group, self._buffers, self._staleness = group, buffers, staleness
        self._up: deque[Pending] = deque()
        self._down: deque[tuple[int, Pending]] = deque()
        self._labels: Tensor | None = None
        self._places: Tensor | None = None

    def up(self, h: Tensor) -> None:
        """Send what this rank's last block gives to the rank above."""
        while len(self._up) >= self._buffers:
            self._up.popleft().wait()
        self._up.append(self._group.exchange({self._group.rank + 1: h}, {}))

    def from_below(self, like: Tensor, rows: int, step: int) -> Tensor:
        """What the rank below gives for the rows of this step; `like` is one row of it."""
        buffer = torch.empty((rows, *like.shape[1:]), dtype=like.dtype, device=like.device)
        self._group.exchange({}, {self._group.rank - 1: buffer}).wait()
        # The rank below sent this in its step: so it has finished the one before, and taken what that needed.
        while self._down and self._down[0][0] < step - self._staleness:
            self._down.popleft()[1].wait()
        return buffer

    def down(self, derivative: Tensor, step: int) -> None:
        """Send the derivative of a loss at this rank's input to the rank below, in this step."""
        self._down.append((step, self._group.exchange({self._group.rank - 1: derivative}, {})))

    def from_above(self, like: Tensor) -> Tensor:
        """The next derivative that the rank above sends, of the shape of `like`."""
        buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        self._group.exchange({}, {self._group.rank + 1: buffer}).wait()
        return buffer

    def finish(self) -> None:
        """Wait until everything sent has arrived; whoever receives has to have asked for it."""
        for pending in (*self._up, *(pending for _, pending in self._down)):
            pending.wait()
        self._up.clear()
        self._down.clear()

    def note(self, y: Tensor) -> None:
        """Take the labels of a step into a running number, in which their order counts. Nothing is sent."""
        if self._group.size == 1:
            return
        if y.is_floating_point():
            y = y.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()])
        flat = y.flatten().to(torch.int64)
        if self._places is None or len(self._places) != len(flat):
            self._places = torch.arange(1, 2 * len(flat), 2, device=flat.device)
        number = (flat * self._places).sum() + len(flat)
        self._labels = number if self._labels is None else self._labels * _WRAP + number

    def compare(self) -> None:
        """Raise BadInput, on every rank, unless all have been given the same labels in the same order. Collective."""
        if self._group.size == 1:
            return
        own = torch.zeros((), dtype=torch.int64) if self._labels is None else self._labels.cpu()
        told = [int(one) for one in self._group.gather(own.reshape(1))]
        others = [rank for rank, number in enumerate(told) if number != told[0]]
        if others:
            raise BadInput(
                f"rank {others[0]} was given other labels than rank 0, or the same in another order; with local every "
                "rank must be given the same rows in the same order (data='same')"
            )
