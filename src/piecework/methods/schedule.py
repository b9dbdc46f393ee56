"""The learning rate of a step: a warm-up, then constant, or down along a line or half a cosine.

Source: Loshchilov, Hutter: SGDR, arXiv:1608.03983, equation 5 (cosine)."""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch

from ..training import BadInput

Schedule = Literal["constant", "linear", "cosine"]

_LAST = 0.01


class Scheduled(Protocol):
    """The settings of a recipe that decide the rate."""

    @property
    def lr(self) -> float: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def schedule_steps(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...


def rate(recipe: Scheduled, step: int) -> float:
    """The learning rate of step 0, 1, ... `lr` is the highest; a hundredth of it remains at the end."""
    lr, warmup = recipe.lr, recipe.warmup_steps
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if recipe.schedule == "constant":
        return lr
    part = min(1.0, (step - warmup) / max(1, recipe.schedule_steps - 1 - warmup))
    falling = 1 - part if recipe.schedule == "linear" else (1 + math.cos(math.pi * part)) / 2
    return lr * (_LAST + (1 - _LAST) * falling)


def set_rate(recipe: Scheduled, step: int, *optimizers: torch.optim.Optimizer) -> float:
    """Give optimisers the rate that a recipe has in step 0, 1, ...; which is returned."""
    lr = rate(recipe, step)
    for optimizer in optimizers:
        for settings in optimizer.param_groups:
            settings["lr"] = lr
    return lr


def check_schedule(schedule: str, schedule_steps: int, warmup_steps: int, name: str) -> None:
    """Raise BadInput, naming the method, for settings that do not make a schedule."""
    if warmup_steps < 0:
        raise BadInput(f"{name}: warmup_steps must be at least 0, got {warmup_steps}")
    if schedule not in ("constant", "linear", "cosine"):
        raise BadInput(f"{name}: schedule must be constant, linear or cosine, got {schedule!r}")
    if schedule == "constant" and schedule_steps != 0:
        raise BadInput(f"{name}: schedule_steps does nothing with a constant schedule; choose cosine or linear")
    if schedule != "constant" and schedule_steps <= warmup_steps:
        raise BadInput(
            f"{name}: a {schedule} schedule needs schedule_steps, the steps in all, above warmup_steps "
            f"({warmup_steps}); got {schedule_steps}"
        )
