"""Runs of methods on ranks with emulated compute, over shaped links, with what they cost and how the loss falls.

    cell = Cell(entry=Gossip(overlap=1, lr=0.02), ranks=8, rate_mbit=100, seconds=0.2, steps=60, snapshot_every=2)
    outcome = run(cell)
    outcome.reached(0.3)           # {"steps": ..., "seconds": ...}

The loss is that of the mean of the ranks' parameters after each has done so many steps, on fixed rows. It is computed
when the clock has stopped, from copies, so that looking costs the ranks a copy in memory and no message; the exchange
that it would take to have this mean is in nobody's seconds. The seconds of a point are those of the last rank there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from emulated import Pace, network
from links import Links
from piecework import Batch, Group, data
from piecework.batches import MiniBatches
from piecework.clock import Noise
from piecework.losses import Loss, named
from piecework.testing import processes

WARM_UP = 4
"""Steps before the clock starts: connections are made, and DistributedDataParallel settles its buckets."""

EVALUATED = 512
"""Rows of the training part on which losses are computed, the same for all runs."""

LINKED, LOOPBACK = "B, namespaces", "B, loopback"


class Entry(Protocol):
    """A recipe of piecework, or one of `gossip_baselines`."""

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: what computes, on how many ranks, over which links."""

    entry: Entry
    ranks: int
    rate_mbit: float | None
    seconds: float
    """Of computation in a step."""
    steps: int
    noise: Noise = field(default_factory=Noise)
    batch_size: int = 8
    """Rows a rank."""
    snapshot_every: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a cell gave. Times count from a common start after the warm-up."""

    level: str
    step_s: float
    """Mean over ranks and steps."""
    computing_s: float
    """The part of it between the start of the forward pass and the end of the last kernel."""
    wall_s: float
    """Until the last rank was through."""
    wire_bytes: float | None
    """A rank and step, on its link, with all headers; warm-up and evaluation included in the count of bytes."""
    payload_bytes: float
    rounds: float
    cpu_s: float
    """Of the processor in a rank's step: the mean over ranks, all threads."""
    busy: float
    """Part of the machine's cores that was busy during the run, whoever used them."""
    late_s: float
    blocked_s: float | None
    """A step's part in which the method waited for messages, where it tells."""
    weights: tuple[float, float] | None
    """The least and largest push-sum weight of any rank after any step."""
    curve: list[dict[str, float]]
    """At each snapshot: step, seconds (of the last rank to get there), loss of the mean of the ranks' parameters, and
    the root mean square distance of a rank from this mean as a part of its length; at the last one also the ranks'
    mean and largest loss, the test accuracy of the mean, and with a slow rank the loss after `sync`."""

    def reached(self, loss: float) -> dict[str, float] | None:
        """Steps and seconds when the loss first was so low, on a line between two snapshots; None if it never was."""
        before = None
        for point in self.curve:
            if point["loss"] <= loss:
                if before is None:
                    return {"steps": point["step"], "seconds": point["seconds"]}
                part = (before["loss"] - loss) / (before["loss"] - point["loss"])
                return {
                    name + "s" * (name == "step"): before[name] + part * (point[name] - before[name])
                    for name in ("step", "seconds")
                }
            before = point
        return None


def run(cell: Cell, *, timeout: float = 550.0) -> Outcome:
    """Run the cell over shaped links; over 127.0.0.1 where the links cannot be had and none are asked for.

    Raises NoLinks for a rate that the system does not give."""
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        job = partial(train, cell=cell, folder=folder)
        if cell.rate_mbit is None and Links.available():
            ranks, sent, level = processes(cell.ranks, job, timeout=timeout), None, LOOPBACK
        else:
            with Links(cell.ranks, rate_mbit=cell.rate_mbit) as links:
                ranks = links.run(job, timeout=timeout)
                sent, level = links.num_bytes(), LINKED
    return _merged(cell, ranks, sent, level)


def _memory() -> str | None:
    """A folder whose files are not written to a disk, where the system has one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _merged(cell: Cell, ranks: list[dict[str, Any]], sent: list[int] | None, level: str) -> Outcome:
    points: list[dict[str, float]] = []
    for number in range(len(ranks[0]["times"])):
        point = {"step": number * (cell.snapshot_every or 0), "seconds": max(rank["times"][number] for rank in ranks)}
        points.append(point | ranks[number % len(ranks)]["points"][str(number)])

    def mean(name: str) -> float:
        return float(np.mean([rank[name] for rank in ranks]))

    weights = [weight for rank in ranks for weight in rank["weights"]]
    return Outcome(
        level=level,
        step_s=mean("step_s"),
        computing_s=mean("computing_s"),
        wall_s=max(rank["wall_s"] for rank in ranks),
        wire_bytes=None if sent is None else float(np.mean(sent)) / (cell.steps + WARM_UP),
        payload_bytes=mean("bytes") / cell.steps,
        rounds=mean("rounds") / cell.steps,
        cpu_s=mean("cpu_s"),
        busy=ranks[0]["busy"],
        late_s=max(rank["late_s"] for rank in ranks),
        blocked_s=None if ranks[0]["blocked_s"] is None else mean("blocked_s") / cell.steps,
        weights=(min(weights), max(weights)) if weights else None,
        curve=points,
    )


def train(group: Group, *, cell: Cell, folder: str) -> dict[str, Any]:
    """The run of one rank. What is evaluated are copies, after the clock has stopped, in memory."""
    set_ = data.load("digits")
    pace = Pace(cell.seconds, noise=cell.noise, rank=group.rank)
    model = network(pace, seed=cell.seed).train()
    loss = named("softmax")
    training = cell.entry.bind(model, loss, group=group)
    rows = scaled(set_, set_.train)
    batches = MiniBatches(
        rows, data="shard", rank=group.rank, size=group.size, batch_size=cell.batch_size, seed=cell.seed
    )
    copies = _Copies(model, cell)  # after `bind`, which may move the parameters
    for step in range(WARM_UP):
        training.step(batches.batch(step))
    group.any(False)
    figures = _timed(group, training, batches, copies, pace, cell)
    looked_at = Batch(rows.x[:EVALUATED], rows.y[:EVALUATED])
    synced = {}
    if cell.noise.slow_rank is not None:  # it ends its steps alone: the mean of the ranks counts that in full
        training.sync()
        synced["synced_loss"] = loss_of(model, loss, looked_at)
    getattr(training, "close", _nothing)()
    figures["points"] = copies.evaluated(group, Path(folder), loss, looked_at, scaled(set_, set_.test))
    figures["points"].get(str(len(copies.times) - 1), {}).update(synced)
    return figures


def _timed(group: Group, training: Any, batches: MiniBatches, copies: _Copies, pace: Pace, cell: Cell) -> dict:
    bytes_before, rounds_before, pace.late_s = group.bytes_sent, group.rounds, 0.0
    busy_before, cpu_before = _busy(), time.process_time()
    told: dict[str, list[float]] = {"push_weight": [], "blocked_seconds": []}
    began = time.monotonic()
    for step in range(cell.steps):
        copies.take(step, time.monotonic() - began)
        metrics = training.step(batches.batch(WARM_UP + step))
        for name, values in told.items():
            if name in metrics:
                values.append(float(metrics[name]))
    wall = time.monotonic() - began
    copies.take(cell.steps, wall)
    cpu, (busy, spent) = time.process_time() - cpu_before, np.subtract(_busy(), busy_before)
    weights = told["push_weight"]
    return {
        "step_s": wall / cell.steps,
        "computing_s": sum(pace.computing[WARM_UP:]) / cell.steps,
        "wall_s": wall,
        "bytes": group.bytes_sent - bytes_before,
        "rounds": group.rounds - rounds_before,
        "cpu_s": cpu / cell.steps,
        "busy": float(busy / max(1, spent)),
        "late_s": pace.late_s,
        "blocked_s": sum(told["blocked_seconds"]) if told["blocked_seconds"] else None,
        "weights": [min(weights), max(weights)] if weights else [],
        "times": copies.times,
    }


def _nothing() -> None:
    return None


@torch.no_grad()
def loss_of(model: nn.Module, loss: Loss, rows: Batch) -> float:
    model.eval()
    return float(loss(model(rows.x), rows.y))


def scaled(set_: data.Dataset, part: Batch) -> Batch:
    return Batch((part.x.float() - set_.mean.float()) / set_.scale.float(), part.y)


def _busy() -> tuple[float, float]:
    """Ticks that all cores have worked, and ticks in all."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


class _Copies:
    """The rank's parameters at every so many steps, in memory that was touched before the clock started."""

    def __init__(self, model: nn.Module, cell: Cell) -> None:
        self._parameters, self._model = list(model.parameters()), model
        self._every = cell.snapshot_every
        num = 0 if self._every is None else cell.steps // self._every + 1
        self._kept = torch.zeros(num, sum(parameter.numel() for parameter in self._parameters))
        self.times: list[float] = []

    def take(self, step: int, seconds: float) -> None:
        if self._every is not None and step % self._every == 0:
            torch.cat([p.detach().reshape(-1) for p in self._parameters], out=self._kept[len(self.times)])
            self.times.append(seconds)

    def evaluated(self, group: Group, folder: Path, loss: Loss, rows: Batch, test: Batch) -> dict[str, dict]:
        """Each rank evaluates some of the snapshots, of all ranks; the copies pass through files."""
        np.save(folder / f"{group.rank}.npy", self._kept.numpy())
        group.any(False)
        maps = [np.load(folder / f"{rank}.npy", mmap_mode="r") for rank in range(group.size)]
        found = {}
        for number in range(group.rank, len(self.times), group.size):
            own = [torch.from_numpy(np.array(each[number])) for each in maps]
            found[str(number)] = self._point(own, loss, rows)
            if number == len(self.times) - 1:
                found[str(number)] |= self._last_point(own, loss, rows, test)
        group.any(False)
        return found

    @torch.no_grad()
    def _point(self, own: list[Tensor], loss: Loss, rows: Batch) -> dict[str, float]:
        mean = torch.stack(own).mean(0)
        apart = float(torch.stack([(vector - mean).square().sum() for vector in own]).mean().sqrt())
        return {"loss": self._loss_of(mean, loss, rows), "distance": apart / float(mean.norm())}

    @torch.no_grad()
    def _last_point(self, own: list[Tensor], loss: Loss, rows: Batch, test: Batch) -> dict[str, float]:
        losses = [self._loss_of(vector, loss, rows) for vector in own]
        self._loss_of(torch.stack(own).mean(0), loss, rows)
        accuracy = float((self._model(test.x).argmax(1) == test.y).float().mean())
        return {"mean_loss": float(np.mean(losses)), "worst_loss": max(losses), "test_accuracy": accuracy}

    def _loss_of(self, vector: Tensor, loss: Loss, rows: Batch) -> float:
        """With the vector left in the model."""
        nn.utils.vector_to_parameters(vector, self._parameters)
        return loss_of(self._model, loss, rows)


def sgd(lr: float, momentum: float = 0.9) -> Callable[..., torch.optim.Optimizer]:
    """A factory that travels to another process."""
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, fused=True)
