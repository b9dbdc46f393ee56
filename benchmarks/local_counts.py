"""What local blocks keep, send and compute, in counts: no clock is read, and other work on the machine does no harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import report
from local_runs import LOSS, Section, batch_of, model_of, pipeline
from piecework import Adam, Batch, Group, Local, data
from piecework.batches import MiniBatches
from piecework.models import mlp
from piecework.testing import processes
from unfinished import Runs

# -- memory and links ------------------------------------------------------------------------------------------------


class Peak:
    """The most bytes that autograd kept at once, each storage once, parameters left out."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._out = {one.untyped_storage().data_ptr() for one in parameters}
        self._alive: dict[int, list[int]] = {}
        self._now = self.most = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        where, size, alive = storage.data_ptr(), storage.nbytes(), self._alive
        if where in self._out:
            return _Kept(tensor, lambda: None)
        count = alive.setdefault(where, [0, size])
        if count[0] == 0:
            self._now += size
        count[0] += 1
        self.most = max(self.most, self._now)
        return _Kept(tensor, partial(self._gone, where))

    def _gone(self, where: int) -> None:
        count = self._alive[where]
        count[0] -= 1
        if count[0] == 0:
            self._now -= count[1]
            del self._alive[where]


class _Kept:
    def __init__(self, tensor: Tensor, gone: Callable[[], None]) -> None:
        self.tensor, self._gone = tensor, gone

    def __del__(self) -> None:
        self._gone()


def kept(group: Group, *, method: Any, kind: str, size: dict[str, int]) -> dict[str, float]:
    """The peak of this rank, and what it sends in a step."""
    torch.set_num_threads(1)
    training = method.bind(model_of(kind, size), LOSS, group=group)
    training.step(batch_of(kind, size, 0))
    peak, before = Peak(list(training.model.parameters())), group.bytes_sent
    with peak.hooks:
        for seed in (1, 2, 3):
            training.step(batch_of(kind, size, seed))
    sent = (group.bytes_sent - before) / 3
    training.sync()
    return {"peak": float(peak.most), "sent": sent}


def kept_by_schedule(group: Group, *, kind: str, size: dict[str, int], schedule: str, chunks: int) -> dict[str, float]:
    torch.set_num_threads(1)
    own, step = pipeline(group, kind, size, schedule, chunks)
    step(batch_of(kind, size, 0))
    peak = Peak(list(own.parameters()))
    with peak.hooks:
        for seed in (1, 2, 3):
            step(batch_of(kind, size, seed))
    return {"peak": float(peak.most)}


def memory(runs: Runs, size: dict[str, int], only: tuple[str, ...]) -> list[Section]:
    deep = {**size, "depth": 2 * size["depth"]}
    rows: list[list[object]] = []

    def told(name: str, ranks: int, run: Any) -> list[dict[str, float]]:
        found: list[dict[str, float]] = runs.get(f"memory/{name}/{ranks}", lambda: processes(ranks, run, timeout=300))
        return found

    what = "backpropagation"
    alone = told(what, 1, partial(kept, method=Adam(), kind="transformer", size=deep))
    rows.append([what, 1, _mebibytes(alone), "-"])
    for ranks in (1, 2, 4):
        for name, settings in (
            ("local greedy, 4 blocks", {}),
            ("local overlap, 4 blocks", {"coupling": "overlap"}),
            ("local overlap, late by 1, 4 blocks", {"coupling": "overlap", "staleness": 1}),
            ("backpropagation by the same engine, 4 blocks", {"coupling": "chunk", "reach": 4}),
        ):
            method = Local(blocks=4, probe_every=0, **settings)  # type: ignore[arg-type]
            found = told(name, ranks, partial(kept, method=method, kind="transformer", size=deep))
            rows.append([name, ranks, _mebibytes(found), [int(one["sent"]) for one in found] if ranks > 1 else "-"])
    for schedule in ("ScheduleGPipe", "Schedule1F1B"):
        for chunks in (2, 4):
            run = partial(kept_by_schedule, kind="transformer", size=deep, schedule=schedule, chunks=chunks)
            activations = deep["rows"] * deep["context"] * deep["width"] * 4
            name = f"{schedule.removeprefix('Schedule')}, {chunks} micro-batches"
            rows.append([name, 2, _mebibytes(told(name, 2, run)), [activations, activations]])
    note = (
        f"transformer, {deep}; what autograd keeps at once on each rank, weights left out (but not the copies of them "
        "that late derivatives need); bytes are those of the group's own count, in torch's schedules those of the "
        "activations up and their derivatives down"
    )
    return [(note, ["what", "ranks", "most kept, MiB, rank by rank", "bytes sent a step, rank by rank"], rows)]


def _mebibytes(found: Sequence[dict[str, float]]) -> list[float]:
    return [round(one["peak"] / 2**20, 3) for one in found]


# -- flops -----------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Flops of matrix products. torch's FlopCounterMode has hooks that torch.autograd.grad does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


COUPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "overlap": {"coupling": "overlap"},
    "interlock of 2": {"coupling": "interlock"},
    "chunk of 2": {"coupling": "chunk"},
    "infopro": {"heads": "infopro"},
}


def until(method: Any, seed: int, target: float, most: int) -> dict[str, Any]:
    """Steps until a running mean of the training loss is below the target, flops of a step, and the test accuracy."""
    torch.set_num_threads(1)
    digits = data.load("digits")
    mean, scale = digits.mean, digits.scale
    network = mlp(64, [128] * 8, 10, seed=seed)
    training = method.bind(network, LOSS)
    feed = MiniBatches(digits.train, data="same", rank=0, size=1, batch_size=128, seed=seed)
    steps, smooth, each = 0, 3.0, 0
    while smooth > target and steps < most:
        batch = feed.batch(steps)
        batch = Batch((batch.x - mean) / scale, batch.y)
        if steps == 1:
            with Products() as counter:
                loss = training.step(batch)["loss"]
            each = counter.total
        else:
            loss = training.step(batch)["loss"]
        steps, smooth = steps + 1, 0.9 * smooth + 0.1 * float(loss)
    test = digits.test
    assert test is not None
    decided = LOSS.decide(network.eval()((test.x - mean) / scale))
    accuracy = float((decided == test.y).double().mean())
    return {"steps": None if smooth > target else float(steps), "each": each, "accuracy": accuracy}


def flops(runs: Runs, size: dict[str, int], only: tuple[str, ...]) -> list[Section]:
    target, most = (0.05, 4000) if size["steps"] > 4 else (1.5, 60)
    rows: list[list[object]] = []
    for blocks in (1, 2, 4, 8):
        methods: dict[str, Any] = {"backpropagation": Adam(lr=3e-3)}
        if blocks > 1:
            methods = {
                name: Local(blocks=blocks, lr=3e-3, probe_every=0, **settings) for name, settings in COUPLINGS.items()
            }
        for name, method in methods.items():
            told = [
                runs.get(f"flops/{blocks}/{name}/{seed}", partial(until, method, seed, target, most))
                for seed in range(size["repeats"])
            ]
            reached, each = [one["steps"] for one in told], told[0]["each"]
            middle = report.median(reached)
            total = None if middle is None else middle * each / 1e9
            accuracies = report.spread([one["accuracy"] for one in told], 3)
            if blocks == 2 and name in ("interlock of 2", "chunk of 2"):
                name += " (this is backpropagation)"
            rows.append([blocks, name, each / 1e6, report.spread(reached, 0), total, accuracies])
    note = f"digits, 64-8x128-10, batches of 128, lr 3e-3, until a running mean of the training loss is below {target}"
    header = ["blocks", "what", "Mflop a step, heads counted", "steps", "Gflop in all", "test accuracy there"]
    return [(note, header, rows)]
