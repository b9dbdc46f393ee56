"""The steady state of a pipeline of local blocks: a recurrence over its stages, beside what was measured.

Stage k starts a mini-batch when it has finished the one before and the stage below has sent it, sends its activations
after its forward pass, unless the stage above has not yet taken those of `buffers` mini-batches before, and then works
on its head and its backward pass. Pipelines of backpropagation are given their best case, (M + K - 1) / M of the
slowest stage's work on a mini-batch in M parts, with no cost for smaller parts or for messages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import report
from local_runs import LOSS, Section, batch_of, model_of, timed
from piecework import Adam, Batch, Group, Local
from piecework.testing import processes
from unfinished import Runs

Stage = tuple[float, float]
"""Seconds before a stage sends (forward pass), and after (head, backward pass, optimiser)."""


def period(stages: Sequence[Stage], link: float, *, buffers: int = 3, steps: int = 400) -> float:
    """Seconds a step in the steady state; link: seconds that activations are on their way."""
    num = len(stages)
    taken = [[0.0] * steps for _ in range(num)]
    ended = [0.0] * num
    half = 0.0
    for step in range(steps):
        arrived = 0.0
        for k, (before, after) in enumerate(stages):
            begin = max(ended[k], arrived)
            taken[k][step] = begin
            sent = begin + before
            if k + 1 < num and step >= buffers:
                sent = max(sent, taken[k + 1][step - buffers])
            arrived, ended[k] = sent + link, sent + after
        if step == steps // 2:
            half = ended[-1]
    return (ended[-1] - half) / (steps - 1 - steps // 2)


class Slow(nn.Module):
    """Takes so many seconds for its forward pass and twice as many for its backward pass, without computing."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Sleep.apply(x, self.seconds)
        return found


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return cotangents[0], None


def slow_model(seconds: Sequence[float]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for one in seconds:
        layers += [nn.Linear(16, 16), Slow(one)]
    return nn.Sequential(*layers)


def emulated(group: Group, *, seconds: tuple[float, ...], steps: int) -> dict[str, float]:
    """Real processes and messages, blocks that sleep."""
    torch.set_num_threads(1)
    at = tuple(range(2, 2 * len(seconds), 2))
    training = Local(at=at, probe_every=0).bind(slow_model(seconds), LOSS, group=group)
    batch = Batch(torch.randn(8, 16), torch.zeros(8, dtype=torch.int64))
    found = timed(group, lambda _: training.step(batch), steps)
    training.sync()
    return {"seconds": found["seconds"]}


def deep(size: dict[str, int]) -> dict[str, int]:
    return {**size, "width": size["width"] // 2, "depth": 16 if size["steps"] > 4 else 4}


def real(group: Group, *, blocks: int, size: dict[str, int]) -> dict[str, Any]:
    """Seconds a step of greedy blocks, and on one process those of each stage before and after it sends."""
    torch.set_num_threads(1)
    method: Any = Local(blocks=blocks, probe_every=0) if blocks > 1 else Adam()
    training = method.bind(model_of("transformer", deep(size)), LOSS, group=group)
    batches = [batch_of("transformer", deep(size), seed) for seed in range(4)]
    found = timed(group, lambda number: training.step(batches[number % 4]), size["steps"])
    if group.size > 1 or blocks == 1:
        training.sync()
        return found
    return {**found, "stages": _stages(training, batches, size["steps"])}


def _stages(training: Any, batches: Sequence[Batch], steps: int) -> list[list[float]]:
    """The median seconds of each stage, from the clock at its forward pass and at the next one's."""
    marks: list[float] = []
    for stage in training.stages:
        forward = stage.forward

        def marked(step: int, x: Tensor, forward: Any = forward) -> Tensor:
            marks.append(time.perf_counter())
            out: Tensor = forward(step, x)
            marks.append(time.perf_counter())
            return out

        stage.forward = marked
    each: list[list[list[float]]] = [[] for _ in training.stages]
    for number in range(steps):
        marks.clear()
        training.step(batches[number % 4])
        marks.append(time.perf_counter())
        for k in range(len(training.stages)):
            start, sent, end = marks[2 * k : 2 * k + 3]
            each[k].append([sent - start, end - sent])
    return [[report.median([one[part] for one in found]) or 0.0 for part in (0, 1)] for found in each]


def link_seconds(group: Group, *, num: int) -> float:
    """Half of the time of a message of so many numbers there and back: the median of thirty."""
    tensor, times = torch.zeros(num), []
    for number in range(35):
        began = time.perf_counter()
        for giver in (0, 1):
            mine = group.rank == giver
            group.exchange({1 - giver: tensor} if mine else {}, {} if mine else {giver: tensor}).wait()
        if number >= 5:
            times.append((time.perf_counter() - began) / 2)
    return report.median(times) or 0.0


def steady(runs: Runs, size: dict[str, int], only: tuple[str, ...]) -> list[Section]:
    return [_emulated_table(runs, size), _real_table(runs, size)]


def _emulated_table(runs: Runs, size: dict[str, int]) -> Section:
    rows: list[list[object]] = []
    unit = 0.02
    for blocks in (2, 4, 8) if size["steps"] > 4 else (2,):
        for name, factor in (("alike", 1.0), ("one of them half as slow again", 1.5)):
            seconds = tuple(unit * (factor if k == blocks // 2 else 1.0) for k in range(blocks))
            work = partial(emulated, seconds=seconds, steps=size["steps"])
            run = partial(processes, blocks, work, timeout=200)
            measured = max(one["seconds"] for one in runs.get(f"period/emulated/{blocks}/{name}", run))
            wanted = period([(one, 2 * one) for one in seconds], 0.0)
            rows.append([blocks, name, 1000 * measured, 1000 * wanted, f"{100 * (wanted / measured - 1):+.1f} %"])
    note = f"blocks that sleep ({1000 * unit:.0f} ms forward, twice that backward) on real processes with real messages"
    return note, ["blocks", "which are", "measured, ms a step", "recurrence", "error"], rows


def _real_table(runs: Runs, size: dict[str, int]) -> Section:
    """What is compared is timed by turns, so that all of it sees the machine at its fast and at its slow times."""
    many = [one for one in (2, 4, 8, 16) if one <= deep(size)["depth"]]
    numbers = deep(size)["rows"] * deep(size)["context"] * deep(size)["width"]
    way = partial(processes, 2, partial(link_seconds, num=numbers), timeout=60)
    link = max(runs.get("period/link", way))

    def timed_on(ranks: int, blocks: int, repeat: int) -> list[dict[str, Any]]:
        run = partial(processes, ranks, partial(real, blocks=blocks, size=size), timeout=230)
        found: list[dict[str, Any]] = runs.get(f"period/{ranks} ranks/{blocks} blocks/{repeat}", run)
        return found

    alone, pairs = [], []
    stages: dict[int, list[Any]] = {blocks: [] for blocks in many}
    for repeat in range(size["repeats"]):
        alone.append(timed_on(1, 1, repeat)[0]["seconds"])
        for blocks in many:
            stages[blocks].append(timed_on(1, blocks, repeat)[0]["stages"])
        pairs.append(max(one["seconds"] for one in timed_on(2, 2, repeat)))
    work, pair = report.median(alone) or 0.0, report.median(pairs) or 0.0
    rows: list[list[object]] = []
    for blocks in many:
        wanted = period(
            [(before, after) for before, after in torch.tensor(stages[blocks]).median(0).values.tolist()], link
        )
        measured = [report.spread([1000 * one for one in pairs], 1), f"{100 * (wanted / pair - 1):+.1f} %"]
        pipes = [work / (work / blocks * (parts + blocks - 1) / parts) for parts in (4, 16)]
        ratios = [round(work / wanted, 2), *(round(one, 2) for one in pipes)]
        rows.append([blocks, round(1000 * wanted, 1), *(measured if blocks == 2 else ("-", "-")), *ratios])
    note = (
        f"transformer, {deep(size)}, greedy; stages timed one by one on one process of one thread, a message takes "
        f"{1000 * link:.2f} ms; backpropagation on one processor takes {1000 * work:.0f} ms a step; medians. Two "
        "blocks are also measured on two processes; more would share two cores, so they are the recurrence's. The "
        "pipelines are the best case of the formula, with blocks of equal work and free messages. This is a prediction "
        "of time alone: accuracy falls with the number of blocks"
    )
    header = [
        "blocks, one processor each",
        "recurrence, ms a step",
        "measured",
        "error",
        "times backpropagation on one",
        "a pipeline of 4 micro-batches",
        "of 16",
    ]
    return note, header, rows
