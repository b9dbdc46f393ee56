"""Adam with each mini-batch several times over: the control for methods that take several steps on it."""

from __future__ import annotations

from typing import Any

from torch import nn

from piecework import Adam, Batch, losses
from piecework.group import Group
from piecework.training import Metrics, Training


class RepeatedAdam:
    """Adam, so many steps on each mini-batch in a row: what several local steps have to be better than."""

    def __init__(self, times: int, *, schedule_steps: int = 0, **settings: Any) -> None:
        self._times, self._recipe = times, Adam(schedule_steps=schedule_steps * times, **settings)

    def bind(self, model: nn.Module, loss: losses.Loss, *, group: Group | None = None) -> Training[Batch]:
        return _Repeated(self._recipe.bind(model, loss, group=group), self._times)


class _Repeated:
    def __init__(self, training: Training[Batch], times: int) -> None:
        self._training, self._times = training, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._training, name)

    def step(self, batch: Batch) -> Metrics:
        """The figures of the first step: later ones have seen these rows."""
        metrics = self._training.step(batch)
        for _ in range(self._times - 1):
            self._training.step(batch)
        return metrics
