"""Seconds until a network makes no error on its training rows: `python benchmarks/interpolation.py`.

digits (64-64-10, all training rows) and 10,000 rows of MNIST (784-128-10), relu, softmax, float32. gauss-newton with
solver kfac on samples (rows and damping) and adam (learning rate and batch size) are tuned for these seconds with at
most nine trials each, from a start of their own (seed 100); gauss-newton on all rows and L-BFGS run with their
defaults. A run is scored after every quarter of an epoch (adam) or every step, or where that is less than 5 % of the
time passed, after that; seconds are training seconds without scoring. Test rows choose nothing.
"""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

import piecework
import report
from piecework import LBFGS, Adam, GaussNewton, data, losses
from piecework.nn import Standardise


@dataclass(frozen=True)
class Task:
    """hidden: of the network; rows: of the training part, all without; seconds: the limit of a run."""

    hidden: tuple[int, ...]
    rows: int | None
    seconds: float


@dataclass(frozen=True)
class Entry:
    name: str
    method: piecework.Method
    batch_size: int = 128


TASKS = {"digits": Task((64,), None, 60.0), "mnist": Task((128,), 10_000, 300.0)}
RATES, BATCHES = (1e-2, 3e-2, 1e-1), (64, 128, 256)
SAMPLE_ROWS, DAMPINGS = (256, 512, 1000), (0.01, 0.1, 1.0)
TUNING_SEED = 100


def model(set_: data.Dataset, task: Task, seed: int) -> nn.Module:
    network = piecework.models.mlp(set_.num_features, task.hidden, set_.num_outputs, seed=seed)
    return nn.Sequential(OrderedDict(scaling=Standardise(set_.mean, set_.scale), network=network))


def run(entry: Entry, set_: data.Dataset, task: Task, seed: int, seconds: float) -> dict[str, Any]:
    """The last row: the first without a training error, or where the seconds ended. `errors`: how many are left."""
    loss = losses.Softmax()
    training = entry.method.bind(model(set_, task, seed), loss)
    every = max(1, len(set_.train) // entry.batch_size // 4) if training.batches == "mini" else None
    history = piecework.fit(
        training,
        set_,
        loss=loss,
        batch_size=entry.batch_size,
        seed=seed,
        seconds=seconds,
        evaluate_every=every,
        on_row=lambda row: row["train"]["score"] == 1.0,
    )
    last = history.rows[-1]
    score = last["train"]["score"] or 0.0
    return {**last, "errors": round((1 - score) * len(set_.train)), "until": last["seconds"] if score == 1 else None}


def tune(entries: list[Entry], set_: data.Dataset, task: Task, seconds: float) -> Entry:
    """The fastest to no error; where none gets there, the one with fewest left. A trial ends at the fastest so far."""
    best, left, fastest, limit = entries[0], math.inf, math.inf, seconds
    for entry in entries:
        try:
            row = run(entry, set_, task, TUNING_SEED, limit)
        except piecework.DidNotSolve as error:
            print(f"  tune {entry.name}: {error}", flush=True)
            continue
        print(f"  tune {entry.name}: {row['seconds']:.2f} s, {row['errors']} errors left", flush=True)
        if (row["errors"], row["seconds"]) < (left, fastest):
            best, left, fastest = entry, row["errors"], row["seconds"]
            limit = fastest if left == 0 else limit
    return best


def entries_of(set_: data.Dataset, task: Task, seconds: float) -> list[Entry]:
    sampled = [
        Entry(
            f"gauss-newton (solver kfac, rows {rows}, damping {damping:g})",
            GaussNewton(solver="kfac", sample_rows=rows, damping=damping),
        )
        for rows, damping in product(SAMPLE_ROWS, DAMPINGS)
        if rows < len(set_.train)
    ]
    adams = [Entry(f"adam (lr {lr:g}, batches of {size})", Adam(lr=lr), size) for lr, size in product(RATES, BATCHES)]
    return [
        tune(adams, set_, task, seconds),
        tune(sampled, set_, task, seconds),
        Entry("gauss-newton, all rows", GaussNewton()),
        Entry("lbfgs", LBFGS()),
    ]


def table(name: str, task: Task, seeds: int) -> tuple[str, list[str], list[list[object]]]:
    set_ = data.load(name, rows=task.rows)
    print(f"{name}: {len(set_.train)} rows", flush=True)
    # What is measured or loaded once in a process is no cost of the method that comes first.
    for method in (Adam(), LBFGS(), GaussNewton(), GaussNewton(solver="kfac", sample_rows=100)):
        run(Entry("", method), set_, task, TUNING_SEED, 1e-3)
    rows: list[list[object]] = []
    adam: float | None = None
    for entry in entries_of(set_, task, task.seconds):
        found = []
        for seed in range(seeds):
            found.append(run(entry, set_, task, seed, task.seconds))
            print(f"  {entry.name} seed {seed}: {found[-1]['seconds']:.2f} s, {found[-1]['errors']} left", flush=True)
        until = report.median([row["until"] for row in found])
        adam = until if isinstance(entry.method, Adam) else adam
        rows.append([
            entry.name,
            report.spread([row["until"] for row in found], 2),
            until / adam if until and adam else None,
            report.median([row["step"] for row in found]),
            report.median([row["errors"] for row in found]),
            report.spread([row["test"]["score"] for row in found]),
            found[-1].get("solver"),
        ])  # fmt: skip
    shape = "-".join(map(str, [set_.num_features, *task.hidden, set_.num_outputs]))
    header = ["method", "seconds to no training error", "ratio to adam", "steps", "errors left",
              "test accuracy then", "solver"]  # fmt: skip
    return f"{name}, {shape}: {len(set_.train)} training rows, at most {task.seconds:g} s", header, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--seconds", type=float, help="in place of 60 and 300")
    parser.add_argument("--rows", type=int, help="training rows, in place of all and 10,000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = (
        f"seeds 0..{arguments.seeds - 1}, medians [range]; adam: learning rate from {RATES} by batches of {BATCHES}; "
        f"gauss-newton on samples: rows from {SAMPLE_ROWS} by damping from {DAMPINGS}, at a constant lr of 1; "
        f"at most {len(RATES) * len(BATCHES)} trials each for the seconds to no training error, seed {TUNING_SEED}"
    )
    sections: list[tuple[str, list[str], list[list[object]]]] = [(about, [], [])]
    for name in arguments.sets:
        task = TASKS[name]
        task = Task(task.hidden, arguments.rows or task.rows, arguments.seconds or task.seconds)
        sections.append(table(name, task, arguments.seeds))
    report.write("interpolation", "Seconds until no training error is left", sections)


if __name__ == "__main__":
    main()
