"""Accuracy of gossip against averaged gradients at equal steps: `python benchmarks/gossip_accuracy.py digits`.

Ranks are threads in memory (level 2): accuracy depends on steps and not on seconds. Messages that may be late are used
exactly that late (`on_time`), so every number comes again. All rows take SGD with momentum 0.9, the same mini-batches
in the same order and a cosine schedule over the run; the learning rate of each row is chosen by the validation accuracy
of the average model, on a seed of its own (100) and with as many trials. Seeds are paired: seed s has one start, one
split and one order for all rows. With the split `dirichlet` the classes of a rank are drawn from Dirichlet(0.1).

`difference` is to averaged gradients, of the same seed: median and range. `own` is the mean test accuracy of the ranks'
own models; `apart` how far these are from their average, in lengths of it.

Finished runs are kept in --cache, so that the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import piecework
import report
import shards
from piecework import SGD, Gossip, Group, data, losses
from piecework.evaluation import merged, sums
from piecework.nn import Standardise
from piecework.testing import threads


@dataclass(frozen=True)
class Setting:
    hidden: tuple[int, ...]
    batch_size: int
    steps: int


SETTINGS = {"digits": Setting((100,), 16, 600), "mnist": Setting((100,), 32, 1500)}
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ALPHA = 0.1
DDP = "averaged gradients"
SLOW: dict[str, Any] = {"slow_every": 24, "slow_momentum": 0.5}


def uneven(rank: int, round: int, size: int) -> dict[int, float]:
    """A graph for which the weight is there: a rank sends 0.3 to the next one, and all but the last 0.4 to the last."""
    return {(rank + 1) % size: 0.3, **({size - 1: 0.4} if rank < size - 2 else {})}


def on_time(**settings: Any) -> Callable[..., Gossip]:
    return partial(Gossip, on_time=True, **settings)


ROWS: dict[str, Callable[..., piecework.Method]] = {
    DDP: SGD,
    "overlap 0": on_time(overlap=0),
    "overlap 1": on_time(overlap=1),
    "overlap 2, every 2": on_time(overlap=2, every=2),
    "overlap 1, slow momentum": on_time(overlap=1, **SLOW),
    "overlap 1, mixed-radix": on_time(overlap=1, graph="mixed-radix"),
    "overlap 1, ring": on_time(overlap=1, graph="ring"),
    "overlap 1, tracking": on_time(overlap=1, tracking=True),
    "overlap 1, bfloat16": on_time(overlap=1, wire="bfloat16"),
    "overlap 1, no weight (biased)": on_time(overlap=1, push_weight=False),
    "overlap 1, uneven graph": on_time(overlap=1, graph=uneven),
    "overlap 1, uneven graph, no weight (biased)": on_time(overlap=1, graph=uneven, push_weight=False),
    "periodic averaging, 24 steps": on_time(overlap=0, every=10**9, slow_every=24),
    "no messages, averaged at the end": on_time(overlap=0, every=10**9),
}


@dataclass(frozen=True)
class Task:
    name: str
    split: str
    row: str
    lr: float
    seed: int
    ranks: int

    @property
    def key(self) -> str:
        return json.dumps([self.name, self.split, self.row, self.lr, self.seed, self.ranks])


def model(set_: data.Dataset, setting: Setting, seed: int) -> nn.Module:
    network = piecework.models.mlp(set_.num_features, setting.hidden, set_.num_outputs, seed=seed)
    return nn.Sequential(OrderedDict(scaling=Standardise(set_.mean, set_.scale), network=network))


def on_a_rank(task: Task, set_: data.Dataset, split: list[torch.Tensor], group: Group) -> dict[str, Any]:
    setting, loss = SETTINGS[task.name], losses.Softmax()
    steps = setting.steps
    recipe = ROWS[task.row](lr=task.lr, schedule="cosine", schedule_steps=steps)
    training = recipe.bind(model(set_, setting, task.seed), loss, group=group)
    rows = shards.Shard(set_.train, split[group.rank], setting.batch_size, seed=1000 * task.seed + group.rank)
    for _ in range(steps):
        training.step(rows.batch())
    own = score(training.model, set_.test, set_)
    training.sync()
    found = {"own": own["score"]}
    if group.rank == 0:
        found |= {"validation": score(training.model, set_.validation, set_)["score"]}
        found |= {"validation loss": score(training.model, set_.validation, set_)["loss"]}
        found |= {"test": score(training.model, set_.test, set_)["score"]}
        found |= {"train loss": score(training.model, set_.train, set_)["loss"]}
        found |= {"apart": getattr(training, "words", {}).get("consensus_distance")}
    return found


def score(network: nn.Module, part: piecework.Batch | None, set_: data.Dataset) -> dict[str, float]:
    assert part is not None
    network.eval()
    found = merged([sums(network, part, slice(0, len(part)), losses.Softmax(), set_.task)], set_.task)
    network.train()
    return {name: float("nan") if value is None else float(value) for name, value in found.items()}


def run(task: Task, set_: data.Dataset) -> dict[str, Any]:
    y = set_.train.y
    if task.split == "dirichlet":
        split = shards.dirichlet(y, task.ranks, ALPHA, task.seed)
    else:
        split = shards.alike(y, task.ranks, task.seed)
    ranks = threads(task.ranks, partial(on_a_rank, task, set_, split), timeout=3600)
    return ranks[0] | {"own": statistics.mean(rank["own"] for rank in ranks)}


class Cache:
    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._known: dict[str, dict[str, Any]] = dict(json.loads(line) for line in lines)

    def run(self, task: Task, set_: data.Dataset) -> dict[str, Any]:
        if task.key not in self._known:
            self._known[task.key] = run(task, set_)
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps([task.key, self._known[task.key]]) + "\n")
            print(
                task.key, {name: round(value, 4) for name, value in self._known[task.key].items() if value}, flush=True
            )
        return self._known[task.key]


def table(name: str, split: str, ranks: int, seeds: int, cache: Cache, wanted: list[str]) -> list[list[object]]:
    set_ = data.load(name, validation=0.1)
    rows: list[list[object]] = []
    base: list[dict[str, Any]] = []
    for row in wanted:
        trials = {lr: cache.run(Task(name, split, row, lr, 100, ranks), set_) for lr in RATES}

        def merit(lr: float, trials: dict[float, dict[str, Any]] = trials) -> tuple[float, float]:
            loss = trials[lr]["validation loss"]
            return trials[lr]["validation"], -loss if math.isfinite(loss) else -math.inf

        lr = max(trials, key=merit)
        runs = [cache.run(Task(name, split, row, lr, seed, ranks), set_) for seed in range(seeds)]
        base = base or runs
        differences = [one["test"] - other["test"] for one, other in zip(runs, base, strict=True)]
        rows.append(
            [
                row,
                f"{lr:g}",
                report.spread([one["validation"] for one in runs]),
                report.spread([one["test"] for one in runs]),
                "-" if row == DDP else report.spread(differences),
                report.spread([one["own"] for one in runs]),
                report.spread([one["train loss"] for one in runs]),
                report.median([one["apart"] for one in runs]),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=sorted(SETTINGS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--splits", nargs="+", default=["alike", "dirichlet"], choices=["alike", "dirichlet"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--name", help="of the file of results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    setting, cache = SETTINGS[chosen.data], Cache(chosen.cache)
    header = ["row", "lr", "validation", "test accuracy", "difference", "own", "training loss", "apart"]
    sections = []
    for ranks in chosen.ranks:
        for split in chosen.splits:
            rows = table(chosen.data, split, ranks, chosen.seeds, cache, chosen.rows)
            how = "rows dealt at random" if split == "alike" else f"classes of a rank drawn from Dirichlet({ALPHA})"
            text = (
                f"{ranks} ranks in memory, {how}; {setting.steps} steps of {setting.batch_size} rows a rank; hidden "
                f"{setting.hidden}; {chosen.seeds} seeds (median and range)."
            )
            sections.append((text, header, rows))
    report.write(chosen.name or f"gossip-accuracy-{chosen.data}", f"Gossip's accuracy on {chosen.data}", sections)


if __name__ == "__main__":
    main()
