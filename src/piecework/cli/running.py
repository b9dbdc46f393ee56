"""One run from its plan: the ranks, the data, the network, the folder, and `fit`."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..checkpoint import RunFolder
from ..data import Dataset
from ..fit import fit
from ..group import Group, launched
from ..history import History, Row
from ..limits import limits as checked_limits
from ..losses import Loss
from ..meter import exchange_notes
from ..training import BadInput, Batch, CannotTrain, Training
from . import folders, network
from .options import TrainingOptions
from .plan import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A plan with its rows, its loss, and a Training of its method at work on its network."""

    plan: Plan
    data: Dataset
    loss: Loss
    training: Training[Batch]
    group: Group

    @property
    def limits(self) -> dict[str, Any]:
        return self.plan.limits(self.training.batches)

    def recipe(self) -> dict[str, Any]:
        words = shlex.join(["piecework", *sys.argv[1:]])
        return self.plan.recipe(
            self.data, self.loss, ranks=self.group.size, command=words, batches=self.training.batches
        )

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.training.model.parameters())


@contextmanager
def ranks(options: TrainingOptions) -> Iterator[Group]:
    """The ranks that torchrun started, or this process alone, with the threads and the device asked for."""
    if options.threads is not None:
        if options.threads < 1:
            raise BadInput(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    with launched(_device(options.device)) as group:
        yield group
        if group.size > 1:
            # What still holds the process group (DistributedDataParallel, in cycles) must go before it is destroyed:
            # left to the end of the interpreter, its threads can abort the process.
            gc.collect()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name[:40]} is no device; it is cpu, cuda, cuda:1, mps, ...") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, True):
        raise BadInput(f"--device {name[:40]}: torch finds no such device on this machine; leave it out to use the cpu")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise BadInput(f"--device {name[:40]}: this machine has {torch.cuda.device_count()} of them, counted from 0")
    return device


def _own_device(name: str) -> torch.device:
    """Under torchrun a rank's GPU is the one that `launched` made the current one."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def together(group: Group, work: Callable[[], T]) -> T:
    """Work that each rank does for itself, refused on all ranks if any of them refuses."""
    result: T | None = None
    error: BadInput | CannotTrain | None = None
    try:
        result = work()
    except (BadInput, CannotTrain) as caught:
        error = caught
    if group.size > 1:
        notes = [note["error"] for note in exchange_notes(group, {"error": None if error is None else str(error)})]
        first = next((rank for rank, note in enumerate(notes) if note is not None), None)
        if first is not None and (error is None or first > 0):
            error = BadInput(f"rank {first}: {notes[first]}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def load(plan: Plan, group: Group) -> Dataset:
    """The rows of a plan, on every rank."""
    return together(group, plan.load)


def prepare(plan: Plan, data: Dataset, group: Group, *, mixed: bool = False) -> Prepared:
    """Bind the method. Raises BadInput and CannotTrain for all that can be refused before the first step.

    mixed: whether --batch-size is meant for others, if this method takes all rows."""

    def build() -> tuple[Loss, nn.Module]:
        model = network.build(plan.network, data, plan.training.seed)
        return plan.loss(data), model.to(_own_device(plan.training.device))

    loss, model = together(group, build)
    training = plan.method.bind(model, loss, group=group)
    prepared = Prepared(plan, data, loss, training, group)
    if training.batches == "full" and plan.training.batch_size is not None and not mixed:
        instead = ", or give --sample-rows behind the method" if hasattr(plan.method, "sample_rows") else ""
        raise BadInput(f"--batch-size is of methods with mini-batches, and {plan.name} has none; leave it out{instead}")
    if plan.training.batch_size is not None and plan.training.batch_size < 1:
        raise BadInput(f"--batch-size must be at least 1 row, got {plan.training.batch_size}")
    try:
        checked_limits(data, **prepared.limits, steps_per_epoch=1, full=training.batches == "full", part=1.0)
    except BadInput as error:
        raise BadInput(_as_options(str(error), prepared.limits)) from None
    return prepared


def _as_options(text: str, names: dict[str, Any]) -> str:
    """A refusal of `fit`, with settings called what they are called on the command line."""
    for name in names:
        if text.startswith(f"{name} "):
            return f"--{name.replace('_', '-')}{text.removeprefix(name)}"
    return text


class Still:
    """Whether a method has come to rest: two rows in a row say that their step moved nothing (`stalled`). The first
    such step may have been a fresh start; after the second, steps cost next to no time, and a limit in seconds would
    be spent on evaluations."""

    def __init__(self) -> None:
        self._before = False

    def look(self, row: Row) -> bool:
        """Take the next row."""
        now = bool(row.get("stalled"))
        rest, self._before = now and self._before, now
        return rest


def train(
    prepared: Prepared, run: RunFolder, *, resume: bool = False, on_row: Callable[[Row], Any] | None = None
) -> History:
    """Run `fit` in a folder that was made for it. A run that fails before its first row leaves no folder behind."""
    plan = prepared.plan
    limits = dict(prepared.limits)
    if plan.training.batch_size is not None:
        limits["batch_size"] = plan.training.batch_size
    still = Still()

    def look(row: Row) -> bool:
        if on_row is not None:
            on_row(row)
        return still.look(row)

    try:
        return fit(
            prepared.training,
            prepared.data,
            loss=prepared.loss,
            group=prepared.group,
            seed=plan.training.seed,
            run=run,
            resume=resume,
            on_row=look,
            **limits,
        )
    except Exception:
        if not resume and prepared.group.rank == 0:
            folders.remove_if_empty(run.path)
        raise
