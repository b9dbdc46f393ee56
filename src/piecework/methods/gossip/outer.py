"""Slow momentum: a second momentum on the movement of many steps.

Wang, Tantia, Ballas, Rabbat, "SlowMo", arXiv:1910.00643, algorithm 1. Every T steps, with a the exact average of all
ranks (or, without averaging, the rank's own estimate), o where the last outer step left off, and r the rate:

    m <- b m + (o - a) / r,      z <- o - s r m,       the optimiser's momentum <- 0,  weights <- 1

With b = 0 and s = 1 it is periodic averaging.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class SlowMomentum:
    """The outer step of one rank. momentum: b; lr: s. Starts from where the tensors are."""

    def __init__(self, tensors: Sequence[Tensor], *, momentum: float, lr: float) -> None:
        self._momentum, self._lr = momentum, lr
        self._last = [tensor.detach().clone() for tensor in tensors]
        self._slow = [torch.zeros_like(tensor) for tensor in self._last]

    @torch.no_grad()
    def moved(self, estimates: Sequence[Tensor], rate: float) -> list[Tensor]:
        """Where the outer step ends that starts from these estimates. rate: the inner learning rate."""
        torch._foreach_mul_(self._slow, self._momentum)
        movement = torch._foreach_sub(self._last, list(estimates))
        if rate > 0:
            torch._foreach_add_(self._slow, movement, alpha=1.0 / rate)
            torch._foreach_add_(self._last, self._slow, alpha=-self._lr * rate)
        else:  # the end of a schedule: the limit for small rates, with nothing to remember
            torch._foreach_add_(self._last, movement, alpha=-self._lr)
        return [tensor.clone() for tensor in self._last]

    @property
    def tensors(self) -> list[Tensor]:
        """All that it remembers."""
        return [*self._last, *self._slow]

    def state_dict(self) -> dict[str, Any]:
        return {"last": [one.clone() for one in self._last], "slow": [one.clone() for one in self._slow]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        torch._foreach_copy_([*self._last, *self._slow], [*state["last"], *state["slow"]])
