"""Whether the loss still falls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...group import Group
from ...training import DidNotSolve


class Stall:
    """Compares the mean loss of so many sweeps with the lowest of as many before; the device is asked once for each."""

    def __init__(self, window: int | None, group: Group) -> None:
        self._window, self._group = window, group
        self._sum: Tensor | None = None
        self._told = self._sweeps = 0
        self._lowest: float | None = None

    def look(self, loss: Tensor | None, sweeps: int) -> None:
        """Take the loss of a step (None where another rank has it). Collective where a window ends; raises DidNotSolve
        where the loss has not fallen."""
        if self._window is None:
            return
        if loss is not None:
            self._sum = loss.double() if self._sum is None else self._sum + loss.double()
            self._told += 1
        self._sweeps += sweeps
        if self._sweeps < self._window:
            return
        mean = None if self._sum is None else float(self._sum) / self._told
        before = self._lowest
        stalled = mean is not None and before is not None and not mean < before
        self._sum, self._told, self._sweeps = None, 0, 0
        self._lowest = mean if mean is not None and (before is None or mean < before) else before
        if self._group.any(stalled):
            said = f" ({mean:.4g} after {before:.4g})" if stalled else ""
            raise DidNotSolve(
                f"block-admm: the loss has not fallen in {self._window} sweeps{said}; lower lr or beta, raise "
                "alpha_beta to 1 where many blocks lie below each other, or give stall_sweeps more time"
            )

    def state_dict(self) -> dict[str, Any]:
        total = None if self._sum is None else float(self._sum)
        return {"sum": total, "told": self._told, "sweeps": self._sweeps, "lowest": self._lowest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum = None if state["sum"] is None else torch.tensor(state["sum"], dtype=torch.float64)
        self._told, self._sweeps, self._lowest = int(state["told"]), int(state["sweeps"]), state["lowest"]
