"""Emulated compute: ranks that sleep in place of the heavy kernels of their layers, and train a small network besides.

    pace = Pace(seconds=0.2, noise=Noise(stalls=1 / 8), rank=group.rank)
    model = network(pace)          # 5 MB of float32 parameters, a sleep after each layer and before its backward pass

A step's computation takes exactly `seconds` from the start of the forward pass, the real computation included: a third
forward and two thirds backward, shared out among the layers by their parameters, so that gradients become available
layer by layer as on a real device. Many ranks then compute at the same time on few cores, while every message is real.
What a method does besides (optimiser, mixing, waiting) comes on top, as it would.

`python benchmarks/emulated.py` measures DistributedDataParallel like this against its cost model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import report
from calibration import Calibration, calibrate
from gossip_baselines import AllReduce, LocalSGD, Overlapped
from links import Links
from piecework import Batch, Group, data
from piecework.batches import MiniBatches
from piecework.losses import Loss, named
from piecework.models import mlp
from piecework.testing import processes
from piecework.training import stream

FEATURES, CLASSES, HIDDEN = 64, 10, (416,) * 8
"""digits; 1 245 514 parameters, 5.0 MB in float32, in nine layers of which seven have 0.7 MB each."""

FORWARD = 1 / 3
WARM_UP = 4
"""Steps before the clock starts: connections are made, and DistributedDataParallel settles its buckets."""


@dataclass(frozen=True)
class Noise:
    """What delays a rank, drawn from (seed, rank, step)."""

    stalls: float = 0.0
    """Probability that a rank's step takes twice its time: it stalls for one step's time before the forward pass."""
    slow_rank: int | None = None
    slowness: float = 2.0
    """The slow rank's steps take so many times as long, for good."""
    seed: int = 0


class Pace:
    """The clock of a rank's emulated kernels."""

    def __init__(self, seconds: float, *, noise: Noise | None = None, rank: int = 0) -> None:
        self._noise = noise or Noise()
        self._seconds = seconds * (self._noise.slowness if self._noise.slow_rank == rank else 1.0)
        self._rank, self._step, self._due, self._began = rank, 0, 0.0, 0.0
        self.computing: list[float] = []
        """Seconds of each step from the start of the forward pass to the last sleep's end; with stalls."""
        self.late_s = 0.0
        """Most seconds that the real computation was behind its kernel at the end of a step."""

    def begin(self) -> None:
        generator = stream(self._noise.seed, self._rank, self._step)
        stalled = float(torch.rand((), generator=generator)) < self._noise.stalls
        self._step += 1
        self._began = self._due = time.monotonic()
        self.computing.append(0.0)
        if stalled:
            self.run(1.0)

    def run(self, part: float) -> None:
        """Sleep until this part of the step's computation would have ended; what was late is made up for later."""
        self._due += part * self._seconds
        now = time.monotonic()
        if now < self._due:
            time.sleep(self._due - now)
        self.computing[-1] = time.monotonic() - self._began

    def end(self) -> None:
        self.late_s = max(self.late_s, time.monotonic() - self._due)


class Kernel(nn.Module):
    """Sleeps after its layer's forward pass and before its layer's backward pass, in training mode."""

    def __init__(self, pace: Pace, share: float, *, is_last: bool) -> None:
        super().__init__()
        self._pace, self._share, self._is_last = pace, share, is_last

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        self._pace.run(self._share * FORWARD)
        return _SleepBackward.apply(x, self)

    def backward_sleep(self) -> None:
        self._pace.run(self._share * (1 - FORWARD))
        if self._is_last:
            self._pace.end()


class _SleepBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel) -> Tensor:
        ctx.kernel = kernel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.kernel.backward_sleep()
        return gradient, None


class _Start(nn.Module):
    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._pace.begin()
        return x


def network(pace: Pace, *, seed: int = 0, hidden: Sequence[int] = HIDDEN) -> nn.Sequential:
    """An MLP for digits (features already scaled) with a kernel at each of its layers."""
    plain = mlp(FEATURES, hidden, CLASSES, seed=seed)
    total = sum(parameter.numel() for parameter in plain.parameters())
    layers: list[nn.Module] = [_Start(pace)]
    for layer in plain:
        layers.append(layer)
        if isinstance(layer, nn.Linear):
            share = sum(parameter.numel() for parameter in layer.parameters()) / total
            layers.append(Kernel(pace, share, is_last=layer is plain[0]))
    return nn.Sequential(*layers)


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
    """What a cell gave. Times count from a common start after the warm-up; the loss is that of the training rows."""

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
    curve: list[dict[str, float]]
    """At each snapshot: step, seconds (of the last rank to get there), loss and test accuracy of the mean of the
    ranks' parameters, the ranks' mean and largest loss, and the root mean square distance of a rank from the mean."""

    def seconds_to(self, loss: float) -> float | None:
        """Seconds at the first snapshot whose mean parameters have this loss or less."""
        return next((point["seconds"] for point in self.curve if point["loss"] <= loss), None)


def run(cell: Cell, *, timeout: float = 550.0) -> Outcome:
    """Run the cell over shaped links; over 127.0.0.1 where the links cannot be had and none are asked for.

    Raises NoLinks for a rate that the system does not give."""
    with tempfile.TemporaryDirectory() as folder:
        job = partial(train, cell=cell, folder=folder)
        if cell.rate_mbit is None and Links.available():
            ranks, sent, level = processes(cell.ranks, job, timeout=timeout), None, "B, loopback"
        else:
            with Links(cell.ranks, rate_mbit=cell.rate_mbit) as links:
                ranks = links.run(job, timeout=timeout)
                sent, level = links.num_bytes(), "B, namespaces"
    return _merged(cell, ranks, sent, level)


def _merged(cell: Cell, ranks: list[dict[str, Any]], sent: list[int] | None, level: str) -> Outcome:
    points: list[dict[str, float]] = []
    for number in range(len(ranks[0]["times"])):
        point = {"step": number * (cell.snapshot_every or 0), "seconds": max(rank["times"][number] for rank in ranks)}
        points.append(point | ranks[number % len(ranks)]["points"][str(number)])

    def mean(name: str) -> float:
        return float(np.mean([rank[name] for rank in ranks]))

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
        curve=points,
    )


def train(group: Group, *, cell: Cell, folder: str) -> dict[str, Any]:
    """The run of one rank. What is evaluated are copies, after the clock has stopped, on the local disk."""
    set_ = data.load("digits")
    pace = Pace(cell.seconds, noise=cell.noise, rank=group.rank)
    model = network(pace, seed=cell.seed).train()
    loss = named("softmax")
    training = cell.entry.bind(model, loss, group=group)
    rows = _scaled(set_, set_.train)
    batches = MiniBatches(
        rows, data="shard", rank=group.rank, size=group.size, batch_size=cell.batch_size, seed=cell.seed
    )
    copies = _Copies(model, cell)  # after `bind`, which may move the parameters
    for step in range(WARM_UP):
        training.step(batches.batch(step))
    group.any(False)
    figures = _timed(group, training, batches, copies, pace, cell)
    getattr(training, "close", _nothing)()
    figures["points"] = copies.evaluated(group, Path(folder), loss, rows, _scaled(set_, set_.test))
    return figures


def _timed(group: Group, training: Any, batches: MiniBatches, copies: _Copies, pace: Pace, cell: Cell) -> dict:
    bytes_before, rounds_before, pace.late_s = group.bytes_sent, group.rounds, 0.0
    busy_before, cpu_before = _busy(), time.process_time()
    began = time.monotonic()
    for step in range(cell.steps):
        copies.take(step, time.monotonic() - began)
        training.step(batches.batch(WARM_UP + step))
    wall = time.monotonic() - began
    copies.take(cell.steps, wall)
    cpu, (busy, spent) = time.process_time() - cpu_before, np.subtract(_busy(), busy_before)
    return {
        "step_s": wall / cell.steps,
        "computing_s": sum(pace.computing[WARM_UP:]) / cell.steps,
        "wall_s": wall,
        "bytes": group.bytes_sent - bytes_before,
        "rounds": group.rounds - rounds_before,
        "cpu_s": cpu / cell.steps,
        "busy": float(busy / max(1, spent)),
        "late_s": pace.late_s,
        "times": copies.times,
    }


def _nothing() -> None:
    return None


def _scaled(set_: data.Dataset, part: Batch) -> Batch:
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

    def evaluated(self, group: Group, folder: Path, loss: Loss, train: Batch, test: Batch) -> dict[str, dict]:
        """Each rank evaluates some of the snapshots, of all ranks; the copies pass through files."""
        np.save(folder / f"{group.rank}.npy", self._kept.numpy())
        group.any(False)
        maps = [np.load(folder / f"{rank}.npy", mmap_mode="r") for rank in range(group.size)]
        found = {}
        for number in range(group.rank, len(self.times), group.size):
            own = [torch.from_numpy(np.array(each[number])) for each in maps]
            found[str(number)] = self._point(own, loss, train, test)
        group.any(False)
        return found

    @torch.no_grad()
    def _point(self, own: list[Tensor], loss: Loss, train: Batch, test: Batch) -> dict[str, float]:
        self._model.eval()
        mean = torch.stack(own).mean(0)
        losses = [self._loss_of(vector, loss, train) for vector in own]
        at_mean = self._loss_of(mean, loss, train)
        accuracy = float((self._model(test.x).argmax(1) == test.y).float().mean())
        distance = float(torch.stack([(vector - mean).square().sum() for vector in own]).mean().sqrt())
        return {
            "loss": at_mean,
            "mean_loss": float(np.mean(losses)),
            "worst_loss": max(losses),
            "test_accuracy": accuracy,
            "distance": distance,
        }

    def _loss_of(self, vector: Tensor, loss: Loss, rows: Batch) -> float:
        nn.utils.vector_to_parameters(vector, self._parameters)
        return float(loss(self._model(rows.x), rows.y))


def sgd(lr: float, momentum: float = 0.9) -> Callable[..., torch.optim.Optimizer]:
    """A factory that travels to another process."""
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, fused=True)


def ideal_ddp(seconds: float, buckets: int, all_reduce: Callable[[float], float], num_bytes: float) -> float:
    """A step of DistributedDataParallel by the cost model: buckets of equal size are ready evenly over the backward
    pass, and each is summed at full rate when the one before it is through."""
    free = 0.0
    for number in range(1, buckets + 1):
        ready = seconds * (FORWARD + (1 - FORWARD) * number / buckets)
        free = max(free, ready) + all_reduce(num_bytes / buckets)
    return free


HEADER = (
    "Mbit/s", "seconds", "entry", "step", "by the cost model", "computing", "exposed", "cpu a rank", "cores busy",
    "late", "payload bytes", "wire bytes", "rounds",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 1000, 100], help="Mbit/s; 0 for no shaping")
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--caps", type=float, nargs="+", default=[0.5, 1, 2, 25], help="MiB of a bucket")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if reason := Links.available():
        raise SystemExit(f"no shaped links here: {reason}")
    optimizer = sgd(0.02)
    entries: list[tuple[str, Entry]] = [("no communication", LocalSGD(optimizer=optimizer, every=None))]
    entries += [("all-reduce after backward", AllReduce(optimizer=optimizer))]
    entries += [(f"ddp, {cap:g} MiB", Overlapped(optimizer=optimizer, bucket_cap_mb=cap)) for cap in arguments.caps]
    print(" | ".join(HEADER))
    for rate in arguments.rates:
        with Links(arguments.ranks, rate_mbit=rate or None) as links:
            constants = calibrate(links)
        for seconds in arguments.seconds:
            for name, entry in entries:
                cell = Cell(
                    entry=entry, ranks=arguments.ranks, rate_mbit=rate or None, seconds=seconds, steps=arguments.steps
                )
                print(" | ".join(map(report.show, [rate, seconds, name, *_row(cell, constants)])), flush=True)


def _row(cell: Cell, constants: Calibration) -> list[float | None]:
    found = run(cell)
    buckets = round(found.rounds)
    ideal = ideal_ddp(cell.seconds, buckets, constants.ring_s, found.payload_bytes) if buckets else cell.seconds
    return [
        found.step_s, ideal, found.computing_s, found.step_s - found.computing_s, found.cpu_s, found.busy,
        found.late_s, found.payload_bytes, found.wire_bytes, found.rounds,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
