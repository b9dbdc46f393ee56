"""Local blocks against backpropagation and pipelines of it: `python benchmarks/local.py [PART ...]`.

throughput: rows a second of two local blocks on two processes of one thread, of backpropagation on one process with one
    and with two threads, and of torch's GPipe and 1F1B schedules on the same two processes.
language: validation loss of a character transformer after equal seconds.
memory: the most that autograd keeps at once, a stage, and the bytes that each link carries in a step.
flops: matrix products, heads counted, until a training loss is reached, on one process.

With --smoke everything is tiny and nothing is written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import report
from piecework import Adam, Batch, Group, Local, data, losses, split
from piecework.batches import MiniBatches
from piecework.evaluation import merged, sums
from piecework.models import mlp, transformer
from piecework.testing import processes

LOSS = losses.Softmax()
SIZES: dict[str, dict[str, int]] = {
    "full": {"width": 128, "depth": 4, "context": 128, "rows": 16, "steps": 40, "repeats": 5, "seconds": 240},
    "smoke": {"width": 32, "depth": 2, "context": 32, "rows": 4, "steps": 4, "repeats": 1, "seconds": 3},
}


def model_of(kind: str, size: dict[str, int]) -> nn.Sequential:
    if kind == "mlp":
        return mlp(784, [8 * size["width"]] * 4, 10)
    return transformer(65, width=size["width"], depth=size["depth"], heads=size["width"] // 32, context=size["context"])


def batch_of(kind: str, size: dict[str, int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    if kind == "mlp":
        rows = 16 * size["rows"]
        return Batch(torch.randn(rows, 784, generator=generator), torch.randint(10, (rows,), generator=generator))
    shape = (size["rows"], size["context"])
    return Batch(torch.randint(65, shape, generator=generator), torch.randint(65, shape, generator=generator))


# -- throughput ------------------------------------------------------------------------------------------------------


def timed(group: Group, step: Callable[[int], Any], steps: int) -> dict[str, float]:
    """Seconds a step of this rank, after a quarter as many to warm up; ranks begin and end together."""
    for number in range(max(2, steps // 4)):
        step(number)
    group.any(False)
    began = time.perf_counter()
    for number in range(steps):
        step(number)
    group.any(False)
    return {"seconds": (time.perf_counter() - began) / steps}


def by_training(group: Group, *, method: Any, kind: str, size: dict[str, int], threads: int = 1) -> dict[str, float]:
    torch.set_num_threads(threads)
    training = method.bind(model_of(kind, size), LOSS, group=group)
    batches = [batch_of(kind, size, seed) for seed in range(4)]
    found = timed(group, lambda number: training.step(batches[number % 4]), size["steps"])
    training.sync()
    return {**found, "bytes": float(group.bytes_sent)}


def pipeline(group: Group, kind: str, size: dict[str, int], schedule: str, chunks: int) -> Callable[[Batch], None]:
    """A step of torch's schedule on two processes: each holds the half of the model that `Local` would give it."""
    from torch.distributed import pipelining

    stage_module = split(model_of(kind, size), into=group.size)[group.rank]
    stage = pipelining.PipelineStage(stage_module, group.rank, group.size, torch.device("cpu"))
    made = getattr(pipelining, schedule)(stage, n_microbatches=chunks, loss_fn=LOSS)
    optimizer = torch.optim.Adam(stage_module.parameters(), fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        if group.rank == 0:
            made.step(batch.x)
        else:
            made.step(target=batch.y, losses=[])
        optimizer.step()

    return step


def by_schedule(group: Group, *, kind: str, size: dict[str, int], schedule: str, chunks: int) -> dict[str, float]:
    torch.set_num_threads(1)
    step = pipeline(group, kind, size, schedule, chunks)
    batches = [batch_of(kind, size, seed) for seed in range(4)]
    return timed(group, lambda number: step(batches[number % 4]), size["steps"])


def throughput(size: dict[str, int]) -> list[tuple[str, list[str], list[list[object]]]]:
    sections = []
    for kind in ("transformer", "mlp"):
        plain = partial(by_training, method=Adam(), kind=kind, size=size)
        local = partial(by_training, kind=kind, size=size)
        runs: dict[str, tuple[int, Any]] = {
            "backpropagation, 1 process, 1 thread": (1, plain),
            "backpropagation, 1 process, 2 threads": (1, partial(plain, threads=2)),
            "local greedy, 2 processes": (2, partial(local, method=Local(blocks=2, probe_every=0))),
            "local greedy, 1 process": (1, partial(local, method=Local(blocks=2, probe_every=0))),
            "local overlap, late by 1, 2 processes": (
                2,
                partial(local, method=Local(blocks=2, coupling="overlap", staleness=1, probe_every=0)),
            ),
        }
        for chunks in (2, 4):
            for schedule in ("ScheduleGPipe", "Schedule1F1B"):
                run = partial(by_schedule, kind=kind, size=size, schedule=schedule, chunks=chunks)
                runs[f"{schedule.removeprefix('Schedule')}, {chunks} micro-batches, 2 processes"] = (2, run)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(size["repeats"]):
            for name, (number, run) in runs.items():
                seconds[name].append(max(one["seconds"] for one in processes(number, run, timeout=900)))
        one_thread = seconds["backpropagation, 1 process, 1 thread"]
        rows: list[list[object]] = []
        for name, found in seconds.items():
            ratios = [base / own for base, own in zip(one_thread, found, strict=True)]
            rows.append([name, report.spread([1000 * one for one in found], 1), report.spread(ratios, 2)])
        note = f"{kind}, {size}; real processes joined by gloo on one machine; the slower rank counts"
        sections.append((note, ["what", "milliseconds a step", "times backpropagation with one thread"], rows))
    return sections


# -- language --------------------------------------------------------------------------------------------------------


def language_run(
    group: Group, *, method: Any, size: dict[str, int], seed: int, seconds: float, threads: int
) -> dict[str, Any]:
    """Train for so many seconds on rank 0's clock, which ranks look at together every 20 steps; validation windows are
    passed through the network eight times on the way, and that is not counted."""
    torch.set_num_threads(threads)
    rows = data.load("shakespeare", validation=0.1, seed=seed)
    assert rows.validation is not None
    heads = size["width"] // 32
    model = transformer(rows.num_outputs, width=size["width"], depth=size["depth"], heads=heads, context=128, seed=seed)
    training = method.bind(model, LOSS, group=group)
    feed = MiniBatches(rows.train, data="same", rank=0, size=1, batch_size=size["rows"], seed=seed)
    steps, spent, found = 0, torch.zeros(1, dtype=torch.float64), []
    while float(spent) < seconds:
        began = time.perf_counter()
        for _ in range(20):
            training.step(feed.batch(steps))
            steps += 1
        spent += time.perf_counter() - began
        group.broadcast_(spent)
        if float(spent) >= seconds * (len(found) + 1) / 8:
            training.sync()
            part = slice(0, len(rows.validation))
            found.append(merged([sums(model, rows.validation, part, LOSS, rows.task)], rows.task)["loss"])
    return {"last": found[-1], "best": min(found), "steps": steps}


def language(size: dict[str, int]) -> list[tuple[str, list[str], list[list[object]]]]:
    rates = (1e-3, 3e-3)
    methods: dict[str, tuple[int, int, Callable[[float], Any]]] = {
        "backpropagation, 1 process, 1 thread": (1, 1, lambda lr: Adam(lr=lr, weight_decay=0.01)),
        "backpropagation, 1 process, 2 threads": (1, 2, lambda lr: Adam(lr=lr, weight_decay=0.01)),
    }
    for coupling in ("greedy", "overlap"):
        late = int(coupling == "overlap")

        def made(lr: float, coupling: Any = coupling, late: int = late) -> Local:
            return Local(blocks=2, coupling=coupling, staleness=late, lr=lr, weight_decay=0.01)

        methods[f"local {coupling}{', late by 1' if late else ''}, 2 processes"] = (2, 1, made)
    rows: list[list[object]] = []
    for name, (number, threads, make) in methods.items():
        for lr in rates:
            found = []
            for seed in range(size["repeats"]):
                settings = {"size": size, "seed": seed, "seconds": float(size["seconds"]), "threads": threads}
                run = partial(language_run, method=make(lr), **settings)
                found.append(processes(number, run, timeout=4 * size["seconds"] + 600)[0])
            told = [report.spread([one[key] for one in found]) for key in ("last", "best")]
            rows.append([name, lr, *told, report.spread([float(one["steps"]) for one in found], 0)])
    note = f"character transformer on shakespeare, {size}; {size['seconds']} training seconds each, without evaluation"
    return [(note, ["what", "lr", "validation loss, nats a character", "best", "steps"], rows)]


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
    step = pipeline(group, kind, size, schedule, chunks)
    step(batch_of(kind, size, 0))
    peak = Peak(list(split(model_of(kind, size), into=group.size)[group.rank].parameters()))
    with peak.hooks:
        for seed in (1, 2, 3):
            step(batch_of(kind, size, seed))
    return {"peak": float(peak.most)}


def memory(size: dict[str, int]) -> list[tuple[str, list[str], list[list[object]]]]:
    deep = {**size, "depth": 2 * size["depth"]}
    rows: list[list[object]] = []
    found = processes(1, partial(kept, method=Adam(), kind="transformer", size=deep), timeout=300)
    rows.append(["backpropagation", 1, [one["peak"] / 2**20 for one in found], "-"])
    for number in (1, 2, 4):
        for name, settings in (
            ("local greedy, 4 blocks", {}),
            ("local overlap, 4 blocks", {"coupling": "overlap"}),
            ("backpropagation by the same engine, 4 blocks", {"coupling": "chunk", "reach": 4}),
        ):
            method = Local(blocks=4, probe_every=0, **settings)  # type: ignore[arg-type]
            found = processes(number, partial(kept, method=method, kind="transformer", size=deep), timeout=300)
            peaks = [round(one["peak"] / 2**20, 3) for one in found]
            rows.append([name, number, peaks, [one["sent"] for one in found] if number > 1 else "-"])
    for schedule in ("ScheduleGPipe", "Schedule1F1B"):
        for chunks in (2, 4):
            run = partial(kept_by_schedule, kind="transformer", size=deep, schedule=schedule, chunks=chunks)
            found = processes(2, run, timeout=300)
            activations = size["rows"] * size["context"] * size["width"] * 4
            name = f"{schedule.removeprefix('Schedule')}, {chunks} micro-batches"
            rows.append([name, 2, [round(one["peak"] / 2**20, 3) for one in found], [activations, activations]])
    note = (
        f"transformer, {deep}; what autograd keeps at once on each rank; bytes are those of the group's own count, in "
        "torch's schedules those of the activations up and their derivatives down"
    )
    return [(note, ["what", "ranks", "most kept, MiB, rank by rank", "bytes sent a step, rank by rank"], rows)]


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


def flops(size: dict[str, int]) -> list[tuple[str, list[str], list[list[object]]]]:
    digits = data.load("digits")
    mean, scale = digits.mean, digits.scale
    target, most, rows = (0.05, 4000, []) if size["steps"] > 4 else (1.5, 60, [])
    for blocks in (2, 4, 8):
        methods: dict[str, Any] = {"backpropagation": Adam(lr=3e-3)}
        for name, settings in (
            ("greedy", {}),
            ("overlap", {"coupling": "overlap"}),
            ("interlock of 2", {"coupling": "interlock"}),
            ("chunk of 2", {"coupling": "chunk"}),
            ("infopro", {"heads": "infopro"}),
        ):
            methods[name] = Local(blocks=blocks, lr=3e-3, probe_every=0, **settings)  # type: ignore[arg-type]
        for name, method in methods.items():
            reached, scores, each = [], [], 0
            for seed in range(size["repeats"]):
                network = mlp(64, [128] * 8, 10, seed=seed)
                training = method.bind(network, LOSS)
                feed = MiniBatches(digits.train, data="same", rank=0, size=1, batch_size=128, seed=seed)
                steps, smooth = 0, 3.0
                while smooth > target and steps < most:
                    batch = feed.batch(steps)
                    batch = Batch((batch.x - mean) / scale, batch.y)
                    if steps == 1 and seed == 0:
                        with Products() as counter:
                            loss = training.step(batch)["loss"]
                        each = counter.total
                    else:
                        loss = training.step(batch)["loss"]
                    steps, smooth = steps + 1, 0.9 * smooth + 0.1 * float(loss)
                reached.append(None if smooth > target else float(steps))
                test = digits.test
                assert test is not None
                decided = LOSS.decide(network.eval()((test.x - mean) / scale))
                scores.append(float((decided == test.y).double().mean()))
            steps_ = report.median(reached)
            total = None if steps_ is None else steps_ * each / 1e9
            rows.append([blocks, name, each / 1e6, report.spread(reached, 0), total, report.spread(scores, 3)])
    note = f"digits, 64-8x128-10, batches of 128, lr 3e-3, until a running mean of the training loss is below {target}"
    header = ["blocks", "what", "Mflop a step", "steps", "Gflop in all", "test accuracy there"]
    return [(note, header, rows)]


PARTS = {"throughput": throughput, "language": language, "memory": memory, "flops": flops}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("parts", nargs="*", help="what to measure; all of it if left out")
    words.add_argument("--smoke", action="store_true")
    chosen = words.parse_args()
    for name in chosen.parts or PARTS:
        sections = PARTS[name](SIZES["smoke" if chosen.smoke else "full"])
        if chosen.smoke:
            for text, header, rows in sections:
                print(text, header, *rows, sep="\n")
        else:
            report.write(f"local-{name}", f"Local blocks: {name}", [*sections])


if __name__ == "__main__":
    main()
