"""What the benchmarks of local blocks run: models, rows, and steps of Local, of Adam and of torch's pipelines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

import report
from piecework import Adam, Batch, Group, Local, losses, split
from piecework.group import Pending
from piecework.models import mlp, resnet, transformer
from piecework.testing import processes
from unfinished import Runs

LOSS = losses.Softmax()
Section = tuple[str, list[str], list[list[object]]]
SIZES: dict[str, dict[str, int]] = {
    "full": {"width": 128, "depth": 4, "context": 128, "rows": 16, "steps": 24, "repeats": 5, "seconds": 45},
    "smoke": {"width": 32, "depth": 2, "context": 32, "rows": 4, "steps": 4, "repeats": 1, "seconds": 3},
}
KINDS = ("transformer", "mlp", "resnet")


def model_of(kind: str, size: Mapping[str, int]) -> nn.Sequential:
    width = size["width"]
    if kind == "mlp":
        return mlp(784, [8 * width] * 4, 10)
    if kind == "resnet":
        return resnet((1, 28, 28), 10, width=width // 4)
    heads = max(1, width // 32)
    return transformer(65, width=width, depth=size["depth"], heads=heads, context=size["context"])


def batch_of(kind: str, size: Mapping[str, int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("mlp", "resnet"):
        rows = size["rows"] * (16 if kind == "mlp" else 2)
        return Batch(torch.randn(rows, 784, generator=generator), torch.randint(10, (rows,), generator=generator))
    shape = (size["rows"], size["context"])
    return Batch(torch.randint(65, shape, generator=generator), torch.randint(65, shape, generator=generator))


def places(model: nn.Sequential, into: int, batch: Batch) -> tuple[int, ...]:
    """Where blocks begin that cost the same multiplications on these rows."""
    lengths = [len(one) for one in split(model, into=into, example=batch.x) if isinstance(one, nn.Sequential)]
    return tuple(accumulate(lengths))[:-1]


def cut(kind: str, size: Mapping[str, int], into: int = 2) -> tuple[int, ...]:
    return places(model_of(kind, size), into, batch_of(kind, size, 0))


class Watched:
    """A group, and the seconds that this rank has spent in messages: handing them over, and waiting for them."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.posting = self.waiting = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def exchange(self, send: Mapping[int, Tensor], recv: Mapping[int, Tensor]) -> Pending:
        began = time.perf_counter()
        pending = self._group.exchange(send, recv)
        self.posting += time.perf_counter() - began
        return _WatchedPending(self, pending)


class _WatchedPending:
    def __init__(self, group: Watched, pending: Pending) -> None:
        self._group, self._pending = group, pending

    def wait(self) -> None:
        began = time.perf_counter()
        self._pending.wait()
        self._group.waiting += time.perf_counter() - began


def timed(group: Group, step: Callable[[int], Any], steps: int) -> dict[str, float]:
    """Seconds a step of this rank, after a quarter as many to warm up; ranks begin and end together."""
    for number in range(max(2, steps // 4)):
        step(number)
    group.any(False)
    before = getattr(group, "posting", 0.0), getattr(group, "waiting", 0.0)
    own, began = time.thread_time(), time.perf_counter()
    for number in range(steps):
        step(number)
    told = {
        "working": (time.thread_time() - own) / steps,
        "posting": (getattr(group, "posting", 0.0) - before[0]) / steps,
        "waiting": (getattr(group, "waiting", 0.0) - before[1]) / steps,
    }
    group.any(False)
    return {"seconds": (time.perf_counter() - began) / steps, **told}


def by_training(group: Group, *, method: Any, kind: str, size: dict[str, int], threads: int = 1) -> dict[str, float]:
    torch.set_num_threads(threads)
    watched: Any = Watched(group)
    training = method.bind(model_of(kind, size), LOSS, group=watched)
    batches = [batch_of(kind, size, seed) for seed in range(4)]
    found = timed(watched, lambda number: training.step(batches[number % 4]), size["steps"])
    training.sync()
    return found


def by_hand(group: Group, *, kind: str, size: dict[str, int], at: tuple[int, ...]) -> dict[str, float]:
    """Greedy local blocks in a loop without any engine: what a step costs without it."""
    torch.set_num_threads(1)
    model = model_of(kind, size)
    twin = Local(at=at, probe_every=0).bind(model, LOSS)
    twin.step(batch_of(kind, size, 0))  # makes the heads
    pieces: list[tuple[nn.Module, list[torch.optim.Optimizer]]] = []
    for stage in twin.stages:
        modules = [stage.block.module, *([] if stage.head is None else [stage.head.module])]
        adams = [torch.optim.Adam(one.parameters(), fused=True) for one in modules]
        pieces.append((nn.Sequential(*modules), adams))
    batches = [batch_of(kind, size, seed) for seed in range(4)]

    def step(number: int) -> None:
        batch = batches[number % 4]
        h = batch.x
        for piece, adams in pieces:
            for adam in adams:
                adam.zero_grad(set_to_none=True)
            out = piece[0](h)
            h = out.detach()
            LOSS(piece[1](out) if len(adams) > 1 else out, batch.y).backward()  # type: ignore[operator]
            for adam in adams:
                adam.step()

    return timed(group, step, size["steps"])


def pipeline(
    group: Group, kind: str, size: dict[str, int], schedule: str, chunks: int
) -> tuple[nn.Module, Callable[[Batch], None]]:
    """The block of the model that `Local` would give this rank, and a step of torch's schedule with it."""
    from torch.distributed import pipelining

    own: Any = split(model_of(kind, size), at=cut(kind, size, group.size))[group.rank]
    stage = pipelining.PipelineStage(own, group.rank, group.size, torch.device("cpu"))
    made = getattr(pipelining, schedule)(stage, n_microbatches=chunks, loss_fn=LOSS)
    optimizer = torch.optim.Adam(own.parameters(), fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        if group.rank == 0:
            made.step(batch.x)
        else:
            made.step(target=batch.y, losses=[])
        optimizer.step()

    return own, step


def by_schedule(group: Group, *, kind: str, size: dict[str, int], schedule: str, chunks: int) -> dict[str, float]:
    torch.set_num_threads(1)
    _, step = pipeline(group, kind, size, schedule, chunks)
    batches = [batch_of(kind, size, seed) for seed in range(4)]
    return timed(group, lambda number: step(batches[number % 4]), size["steps"])


BASE, TWO, GREEDY, ALONE, PLAIN = (
    "backpropagation, 1 process, 1 thread",
    "backpropagation, 1 process, 2 threads",
    "local greedy, 2 processes",
    "local greedy, 1 process",
    "the same blocks in a loop written out, 1 process",
)


def _candidates(kind: str, size: dict[str, int]) -> dict[str, tuple[int, Any]]:
    at = cut(kind, size)
    plain = partial(by_training, method=Adam(), kind=kind, size=size)

    def local(**more: Any) -> Any:
        return partial(by_training, method=Local(at=at, probe_every=0, **more), kind=kind, size=size)

    found: dict[str, tuple[int, Any]] = {
        BASE: (1, plain),
        TWO: (1, partial(plain, threads=2)),
        GREEDY: (2, local()),
        ALONE: (1, local()),
        PLAIN: (1, partial(by_hand, kind=kind, size=size, at=at)),
        "local overlap, 2 processes": (2, local(coupling="overlap")),
        "local overlap, late by 1, 2 processes": (2, local(coupling="overlap", staleness=1)),
        "backpropagation, late by 1, 2 processes": (2, local(coupling="interlock", staleness=1)),
    }
    for chunks in (2, 4):
        for schedule in ("ScheduleGPipe", "Schedule1F1B"):
            run = partial(by_schedule, kind=kind, size=size, schedule=schedule, chunks=chunks)
            found[f"{schedule.removeprefix('Schedule')}, {chunks} micro-batches, 2 processes"] = (2, run)
    return found


def throughput(runs: Runs, size: dict[str, int], only: tuple[str, ...]) -> list[Section]:
    sections: list[Section] = []
    for kind in only or KINDS:
        candidates = _candidates(kind, size)
        told: dict[str, list[Any]] = {name: [] for name in candidates}
        for repeat in range(size["repeats"]):
            for name, (number, run) in candidates.items():
                key = f"throughput/{kind}/{name}/{repeat}"
                told[name].append(runs.get(key, lambda n=number, run=run: processes(n, run, timeout=240)))
        sections.append(_throughput_table(kind, size, told))
    return sections


def _throughput_table(kind: str, size: dict[str, int], told: dict[str, list[Any]]) -> Section:
    seconds = {name: [max(one["seconds"] for one in run) for run in found] for name, found in told.items()}
    rows: list[list[object]] = []
    for name, found in seconds.items():
        against = [[b / own for b, own in zip(seconds[base], found, strict=True)] for base in (BASE, TWO)]
        shares = [
            " / ".join(f"{100 * report.median([run[r][what] / run[r]['seconds'] for run in told[name]]):.0f} %"  # type: ignore[operator]
                       for r in range(len(told[name][0])))
            for what in ("waiting", "posting")
        ]  # fmt: skip
        shown = shares if "local" in name and "2 processes" in name else ["-", "-"]
        rows.append(
            [name, report.spread([1000 * one for one in found], 1), *(report.spread(a, 2) for a in against), *shown]
        )
    cost = [engine / plain - 1 for engine, plain in zip(seconds[ALONE], seconds[PLAIN], strict=True)]
    note = (
        f"{kind}, {size}, cut before layer {cut(kind, size)[0]}; real processes joined by gloo on one machine; the "
        "slower rank counts; pairs of runs one after another make the ratios. Waiting and handing over: shares of a "
        f"step, rank by rank. The engine costs {report.spread([100 * one for one in cost], 1)} % of a step beside a "
        "loop written out."
    )
    header = ["what", "milliseconds a step", "times 1 thread", "times 2 threads", "waits", "hands over"]
    return note, header, rows
