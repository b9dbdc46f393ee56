"""The figures of a row: what a rank has of them, and all ranks' together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import evaluation
from .batches import share
from .group import Group
from .losses import Loss
from .training import Metrics, Task

if TYPE_CHECKING:
    from .data import Dataset

PARTS = ("train", "validation", "test")


class Meter:
    """A rank's step figures between two rows. Nothing is read from the device before `read`.

    mean: average over the steps (`loss` weighted by rows); otherwise the last step's figures."""

    def __init__(self, *, mean: bool) -> None:
        self._mean = mean
        self._sums: dict[str, tuple[Tensor, float]] = {}

    def add(self, metrics: Metrics, rows: int) -> None:
        """Take the metrics of a step on so many rows."""
        for name, value in metrics.items():
            weight = float(rows) if name == "loss" else 1.0
            term = value.detach() * weight
            if self._mean and name in self._sums:
                total, before = self._sums[name]
                self._sums[name] = (total + term, before + weight)
            else:
                self._sums[name] = (term, weight)

    def read(self) -> dict[str, list[float]]:
        """[sum, weight] by name, and start again."""
        found = {name: [float(total), weight] for name, (total, weight) in self._sums.items()}
        self._sums = {}
        return found


def merged_metrics(ranks: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float | None]:
    """One figure a name: the weighted mean of the ranks that report it, None where it is not finite."""
    names = dict.fromkeys(name for told in ranks for name in told)
    found: dict[str, float | None] = {}
    for name in names:
        told = [rank[name] for rank in ranks if name in rank]
        weight = math.fsum(one[1] for one in told)
        total = sum(one[0] for one in told)
        found[name] = evaluation.finite(total / weight) if weight else None
    return found


def own_sums(model: nn.Module, data: Dataset, loss: Loss, group: Group) -> dict[str, evaluation.Sums | None]:
    """What this rank's share of each part adds to the evaluation of the deployed network; None without such a part."""
    found: dict[str, evaluation.Sums | None] = {}
    for name in PARTS:
        part = getattr(data, name)
        found[name] = (
            None
            if part is None
            else evaluation.sums(model, part, share(len(part), group.rank, group.size), loss, data.task)
        )
    return found


def merged_parts(
    ranks: Sequence[Mapping[str, evaluation.Sums | None]], task: Task
) -> dict[str, dict[str, float | None] | None]:
    """{"loss", "score"} of each part over all ranks, or None without such a part."""
    found: dict[str, dict[str, float | None] | None] = {}
    for name in PARTS:
        told = [sums for rank in ranks if (sums := rank[name]) is not None]
        found[name] = evaluation.merged(told, task) if told else None
    return found


def exchange_notes(group: Group, note: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's small note, in rank order, on every rank; numbers arrive with all their digits."""
    if group.size == 1:
        return [note]
    own = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    return [json.loads(one.cpu().numpy().tobytes()) for one in group.gather(own)]
