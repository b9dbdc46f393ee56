"""A character transformer for so many seconds: two local blocks on two processes against backpropagation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import report
from local_counts import Products
from local_runs import LOSS, Section
from piecework import Adam, Batch, Group, Local, data
from piecework.batches import MiniBatches
from piecework.evaluation import merged, sums
from piecework.models import transformer
from piecework.testing import processes
from unfinished import Runs

RATES = (1e-3, 3e-3, 6e-3, 1.2e-2)
TUNING_SEED = 100
LOOKS = 15
TARGET = 2.1
"""Nats a character."""


@dataclass(frozen=True)
class Entry:
    """make: (settings of Adam and its schedule, steps) -> a method."""

    processes: int
    threads: int
    make: Callable[..., Any]


def _local(steps: int, *, coupling: Any = "greedy", late: int = 0, anneal: bool = False, **adam: Any) -> Local:
    span = (0, max(1, int(0.7 * steps))) if anneal else None
    return Local(blocks=2, coupling=coupling, staleness=late, anneal=span, probe_every=0, **adam)


def _adam(steps: int, **adam: Any) -> Adam:
    return Adam(**adam)


ENTRIES = {
    "backpropagation, 2 threads": Entry(1, 2, _adam),
    "local greedy, 2 processes": Entry(2, 1, _local),
    "backpropagation, 1 thread": Entry(1, 1, _adam),
    "deep supervision (overlap), 1 process, 2 threads": Entry(1, 2, partial(_local, coupling="overlap")),
    "local overlap, late by 1, 2 processes": Entry(2, 1, partial(_local, coupling="overlap", late=1)),
    "backpropagation, late by 1, 2 processes": Entry(2, 1, partial(_local, coupling="interlock", late=1)),
    "greedy, then backpropagation late by 1": Entry(2, 1, partial(_local, late=1, anneal=True)),
}


def _network(rows: data.Dataset, size: dict[str, int], seed: int) -> nn.Sequential:
    width = size["width"] // 2
    return transformer(rows.num_outputs, width=width, depth=size["depth"], heads=2, context=128, seed=seed)


def _validation(model: nn.Module, rows: data.Dataset, windows: int) -> float:
    part = rows.validation
    assert part is not None
    found = merged([sums(model, part, slice(0, min(windows, len(part))), LOSS, rows.task)], rows.task)["loss"]
    assert found is not None
    return found


def language_run(
    group: Group, *, make: Callable[..., Any], lr: float, size: dict[str, int], seed: int, threads: int
) -> dict[str, Any]:
    """Train for so many seconds on rank 0's clock, which ranks look at together every 10 steps, with a schedule that
    ends when they do, as a short trial of the speed says. Evaluation is not counted."""
    torch.set_num_threads(threads)
    seconds = float(size["seconds"])
    rows = data.load("shakespeare", validation=0.1, seed=0)
    feed = MiniBatches(rows.train, data="same", rank=0, size=1, batch_size=size["rows"] // 2, seed=seed)
    steps = _steps_in(group, make(1, lr=lr), _network(rows, size, seed), feed, seconds)
    settings = {"lr": lr, "weight_decay": 0.01, "schedule": "cosine", "schedule_steps": steps}
    model = _network(rows, size, seed)
    training = make(steps, **settings, warmup_steps=min(50, steps // 2)).bind(model, LOSS, group=group)
    done, spent, curve = 0, torch.zeros(1, dtype=torch.float64), []
    while float(spent) < seconds:
        began = time.perf_counter()
        for _ in range(10):
            training.step(feed.batch(done))
            done += 1
        spent += time.perf_counter() - began
        group.broadcast_(spent)
        if float(spent) >= seconds * (len(curve) + 1) / LOOKS:
            training.sync()
            curve.append([float(spent), _validation(model, rows, 160)])
    training.sync()
    return {"last": _validation(model, rows, len(rows.train)), "curve": curve, "steps": done, "planned": steps}


def _steps_in(group: Group, method: Any, model: nn.Sequential, feed: MiniBatches, seconds: float) -> int:
    training = method.bind(model, LOSS, group=group)
    for step in range(5):
        training.step(feed.batch(step))
    training.sync()
    began = time.perf_counter()
    for step in range(20):
        training.step(feed.batch(step))
    training.sync()
    each = torch.tensor([(time.perf_counter() - began) / 20], dtype=torch.float64)
    group.broadcast_(each)
    return max(10, int(seconds / float(each)))


def _flops(entry: Entry, size: dict[str, int]) -> float:
    """Gflop of the matrix products of a step, heads counted."""
    rows = data.load("shakespeare")
    training = entry.make(100, lr=1e-3).bind(_network(rows, size, 0), LOSS)
    batch = Batch(rows.train.x[: size["rows"] // 2], rows.train.y[: size["rows"] // 2])
    for _ in range(3):
        training.step(batch)
    with Products() as counter:
        training.step(batch)
    return counter.total / 1e9


def language(runs: Runs, size: dict[str, int], only: tuple[str, ...]) -> list[Section]:
    names = [name for name in ENTRIES if not only or any(word in name for word in only)]
    rates = RATES if size["repeats"] > 1 else RATES[1:2]
    found: dict[str, tuple[float, list[Any]]] = {}
    for name in names:
        entry = ENTRIES[name]

        def run(lr: float, seed: int, name: str = name, entry: Entry = entry) -> Any:
            work = partial(language_run, make=entry.make, lr=lr, size=size, seed=seed, threads=entry.threads)
            key = f"language/{name}/{lr}/{seed}"
            return runs.get(key, lambda: processes(entry.processes, work, timeout=200 + 4 * size["seconds"])[0])

        tried = {lr: run(lr, TUNING_SEED)["last"] for lr in rates}
        lr = min(tried, key=lambda one: tried[one])
        found[name] = lr, [run(lr, seed) for seed in range(size["repeats"])]
    return [_language_table(found, size, runs)]


def _language_table(found: dict[str, tuple[float, list[Any]]], size: dict[str, int], runs: Runs) -> Section:
    base = next(iter(found))
    rows: list[list[object]] = []
    for name, (lr, told) in found.items():
        last = [one["last"] for one in told]
        behind = [own - other["last"] for own, other in zip(last, found[base][1], strict=True)]
        reached = [next((at for at, loss in one["curve"] if loss <= TARGET), None) for one in told]
        each = runs.get(f"language/{name}/flops", partial(_flops, ENTRIES[name], size))
        steps = [float(one["steps"]) for one in told]
        total = each * (report.median(steps) or 0.0)
        cells = [report.spread(last), report.spread(behind), report.spread(reached, 1), report.spread(steps, 0)]
        rows.append([name, lr, *cells, round(each, 2), round(total)])
    note = (
        f"character transformer of width {size['width'] // 2} and depth {size['depth']} on shakespeare, windows of "
        f"128, {size['rows'] // 2} a step; {size['seconds']} training seconds each, evaluation not counted; seeds "
        f"0-{size['repeats'] - 1}, paired; Adam with decay 0.01, 50 steps of warm-up, then half a cosine that ends "
        f"with the run; the rate is the best of {', '.join(map(str, RATES))} on the validation windows after one run "
        f"(seed {TUNING_SEED}), for every row alike. All rows but that of one thread make use of two cores. Seconds "
        f"until {TARGET} nats on 160 validation windows, {LOOKS} looks a run."
    )
    header = [
        "what",
        "lr",
        "validation loss, nats a character",
        f"behind {base}",
        f"seconds to {TARGET}",
        "steps",
        "Gflop a step, heads counted",
        "Gflop in all",
    ]
    return note, header, rows
