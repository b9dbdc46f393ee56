"""Regression on a table by a tanh network with two hidden layers of 64: `python benchmarks/tables.py kin40k`.

Every method starts from the same weights and is scored by the same plain module, at the same seconds of training.
gauss-newton (steps on samples: rows and damping, eight trials) and adam (learning rate and weight decay, nine) are
tuned on validation rows, each trial with a third of the seconds (at most --tuning-seconds); their rates fall to nothing
over the steps that the seconds allow at the pace measured here. L-BFGS has nothing to tune.

Two tables: the training loss at the end, and the test R2 of the row with the best validation score, for all alike.
Test rows choose nothing.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn

import piecework
import report
from fits import pace
from piecework import LBFGS, Adam, GaussNewton, History, data, floors, losses
from piecework.nn import Standardise

SETS = ("protein", "kin40k", "bike", "elevators", "pol")
HIDDEN = (64, 64)
BATCH_SIZE = 256
RATES, DECAYS = (1e-3, 3e-3, 1e-2), (0.0, 0.01, 0.1)
SAMPLE_ROWS, DAMPINGS = (512, 1024), (1e-3, 3e-3, 1e-2, 1e-1)
TUNING_SEED = 100
PACE_SECONDS = 2.0


@dataclass(frozen=True)
class Entry:
    """A method as it is run: with its settings, in words, and on rows of that dtype."""

    name: str
    method: piecework.Method
    dtype: torch.dtype = torch.float32


def model(set_: data.Dataset, seed: int) -> nn.Module:
    dtype = set_.mean.dtype
    network = piecework.models.mlp(set_.num_features, HIDDEN, 1, activation="tanh", seed=seed, dtype=dtype)
    return nn.Sequential(OrderedDict(scaling=Standardise(set_.mean, set_.scale), network=network))


def steps_of(method: piecework.Method) -> int | None:
    """The steps over which its rate falls, where it does."""
    if isinstance(method, GaussNewton):
        return method.sample_steps
    return method.schedule_steps if isinstance(method, Adam) and method.schedule == "cosine" else None


def scheduled(method: piecework.Method, set_: data.Dataset, seconds: float) -> piecework.Method:
    """With a rate that falls to nothing over the steps that fit into the seconds."""
    if isinstance(method, LBFGS):
        return method
    loss = losses.Squared()
    # Timed at a small rate: at a constant large one a network may diverge, and the pace is the same.
    timed = replace(method, lr=0.1) if isinstance(method, GaussNewton) else method
    rate = pace(timed, model(set_, TUNING_SEED), loss, set_, BATCH_SIZE, min(PACE_SECONDS, seconds / 5))
    steps = max(1, int(rate * seconds))
    if isinstance(method, GaussNewton):
        return replace(method, sample_steps=steps)
    assert isinstance(method, Adam)
    return replace(method, schedule="cosine", schedule_steps=steps)


def run(method: piecework.Method, set_: data.Dataset, seed: int, seconds: float) -> History:
    """Until the schedule ends, or the seconds where the pace was slower than measured."""
    loss = losses.Squared()
    training = method.bind(model(set_, seed), loss)
    limits: dict[str, Any] = {"seconds": seconds}
    if (steps := steps_of(method)) is not None:
        limits["steps"] = steps
    # Rows about every twentieth of the seconds, and more at first; an epoch of mini-batches may be longer than that.
    every = max(1, len(set_.train) // BATCH_SIZE // 4) if training.batches == "mini" else None
    if every is None and isinstance(method, GaussNewton):
        every = max(1, (method.sample_steps or 1) // 100)
    return piecework.fit(training, set_, loss=loss, batch_size=BATCH_SIZE, seed=seed, evaluate_every=every, **limits)


def tune(
    recipes: list[tuple[str, piecework.Method]], set_: data.Dataset, seconds: float
) -> tuple[str, piecework.Method]:
    """The recipe with the best validation score of any row; every trial has the same seconds and start."""
    scores = []
    for name, recipe in recipes:
        try:
            best = run(scheduled(recipe, set_, seconds), set_, TUNING_SEED, seconds).best
        except piecework.DidNotSolve as error:  # the loss was no longer finite
            print(f"  tune {name}: {error}", flush=True)
            best = None
        score = best["validation"]["score"] if best else None
        scores.append(-math.inf if score is None else score)
        print(f"  tune {name}: validation {scores[-1]:.4f}", flush=True)
    return recipes[scores.index(max(scores))]


def entries(set_: data.Dataset, seconds: float, trial: float) -> list[Callable[[], Entry]]:
    sampled: list[tuple[str, piecework.Method]] = [
        (f"gauss-newton (rows {rows}, damping {damping:g})", GaussNewton(sample_rows=rows, damping=damping))
        for rows, damping in product(SAMPLE_ROWS, DAMPINGS)
    ]
    adams: list[tuple[str, piecework.Method]] = [
        (f"adam (lr {lr:g}, weight decay {decay:g})", Adam(lr=lr, weight_decay=decay))
        for lr, decay in product(RATES, DECAYS)
    ]

    def tuned(recipes: list[tuple[str, piecework.Method]]) -> Entry:
        name, method = tune(recipes, set_, trial)
        return Entry(name, scheduled(method, set_, seconds))

    return [
        lambda: tuned(sampled),
        lambda: tuned(adams),
        lambda: Entry("gauss-newton, all rows", GaussNewton()),
        lambda: Entry("lbfgs", LBFGS()),
        lambda: Entry("lbfgs, float64", LBFGS(), torch.float64),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--seconds", type=float, nargs="+", default=[30.0, 120.0])
    parser.add_argument("--tuning-seconds", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sections: list[tuple[str, list[str], list[list[object]]]] = [
        (f"Network d-{'-'.join(map(str, HIDDEN))}-1, tanh, float32 where nothing else is said; 10 % of the training "
         f"rows are for validation; seeds 0..{arguments.seeds - 1}, medians [range]. gauss-newton: rows from "
         f"{SAMPLE_ROWS} by damping from {DAMPINGS}; adam: learning rate from {RATES} by weight decay from {DECAYS}, "
         f"batches of {BATCH_SIZE}, half a cosine; trials on validation from seed {TUNING_SEED}, each with a third of "
         f"the seconds or {arguments.tuning_seconds:g}. Targets are standardised: a loss of 1 is the mean's. seconds "
         "are training seconds.", [], []),
    ]  # fmt: skip
    name = arguments.set
    sets = {dtype: data.load(f"uci/{name}", validation=0.1, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    for seconds in arguments.seconds:
        sections += _tables(name, sets, seconds, min(seconds / 3, arguments.tuning_seconds), arguments.seeds)
    report.write(f"table-{name}", f"{name}: regression on a table, at equal seconds", sections)


def _tables(
    name: str, sets: dict[torch.dtype, data.Dataset], seconds: float, trial: float, seeds: int
) -> list[tuple[str, list[str], list[list[object]]]]:
    """The two tables of one set and one limit."""
    print(f"{name}, {seconds:g} s", flush=True)
    first = sets[torch.float32]
    ends, chosen = [], []
    for make in entries(first, seconds, trial):
        entry = make()
        histories = []
        for seed in range(seeds):
            began = time.perf_counter()
            try:
                histories.append(run(entry.method, sets[entry.dtype], seed, seconds))
            except piecework.DidNotSolve as error:
                print(f"  {entry.name} seed {seed}: {error}", flush=True)
                continue
            print(f"  {entry.name} seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        best = [history.best for history in histories]
        last = [history.rows[-1] for history in histories]
        ends.append([
            entry.name,
            report.spread([row["train"]["loss"] for row in last], 5),
            report.median([row["step"] for row in last]),
            report.median([row["seconds"] for row in last]),
            f"{len(histories)} of {seeds}",
        ])  # fmt: skip
        chosen.append([
            entry.name,
            report.spread([row["test"]["score"] if row else None for row in best]),
            report.median([row["seconds"] if row else None for row in best]),
            report.spread([row["test"]["score"] for row in last]),
        ])  # fmt: skip
    below = floors.simple(first)
    chosen += [[f"floor: {floor.name}", f"{floor.scores['test']:.4f}", None, None] for floor in below]
    about = f"{name}: {len(first.train)} training rows, {first.num_features} features, {seconds:g} s"
    return [
        (f"{about}: training loss, without early stopping",
         ["method", "training loss at the end", "steps", "seconds", "runs that ended"], ends),
        (f"{about}: test R2",
         ["method", "at the row that validation chose", "seconds until then", "at the end"], chosen),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
