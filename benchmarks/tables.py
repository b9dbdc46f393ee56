"""Regression on a table by a tanh network with two hidden layers of 64: `python benchmarks/tables.py kin40k`.

Every method starts from the same weights and is scored by the same plain module, at the same seconds of training.
gauss-newton (steps on samples: solver, damping, schedule and weight decay) and adam (learning rate and weight decay)
are tuned, twelve trials each with a third of the seconds (at most --tuning-seconds); their rates fall to nothing over
the steps that the seconds allow at the pace measured here. L-BFGS has nothing to tune.

Two tables. The training loss at the end, of the trial with the least; and the test R2 of the row with the best
validation score, of the trial with the best one. Test rows choose nothing.
"""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
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
RATES, DECAYS = (3e-3, 1e-2, 3e-2, 6e-2), (0.0, 0.01, 0.1)
"""Of adam, whose decay is for each unit of its rate."""
SAMPLE_ROWS = 512
HOLD = 0.6
DAMPINGS = (1e-3, 1e-2, 1e-1)
"""Of gauss-newton with exact steps on samples: each as it is, and with the rate held at first."""
KFAC = ({"damping": 1e-4}, {"damping": 1e-4, "hold": HOLD}, {"damping": 1e-3, "hold": HOLD})
"""Of gauss-newton with solver kfac, without tests of its steps."""
PENALISED, PENALTIES = 1e-3, (3e-5, 1e-4, 3e-4)
"""Damping and weight decays of the same."""
TUNING_SEED = 100
PACE_SECONDS = 2.0
LOOKS = 200
"""Evaluations of a run, about; validation chooses among these."""
REMARKS = {"bike": "The target is the logarithm of the sum of two of the features: there is no noise in it."}


@dataclass(frozen=True)
class Recipe:
    """A method with its settings, in words, and the dtype of its rows."""

    name: str
    method: piecework.Method
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Trial:
    """What a recipe came to: the best validation score of any row, and the training loss of the last."""

    recipe: Recipe
    score: float
    loss: float


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
    timed = replace(method, lr=0.1, sample_steps=None, hold=0.0) if isinstance(method, GaussNewton) else method
    rate = pace(timed, model(set_, TUNING_SEED), loss, set_, BATCH_SIZE, min(PACE_SECONDS, seconds / 5))
    steps = max(1, int(rate * seconds))
    if isinstance(method, GaussNewton):
        return replace(method, sample_steps=steps)
    assert isinstance(method, Adam)
    return replace(method, schedule="cosine", schedule_steps=steps)


def run(method: piecework.Method, set_: data.Dataset, seed: int, seconds: float) -> History | None:
    """Until the schedule ends, or the seconds where the pace was slower than measured; None where it diverged."""
    loss = losses.Squared()
    method = replace(method, seed=seed) if isinstance(method, GaussNewton) else method  # the order of its samples
    training = method.bind(model(set_, seed), loss)
    limits: dict[str, Any] = {"seconds": seconds}
    if (steps := steps_of(method)) is not None:
        limits |= {"steps": steps, "evaluate_every": max(1, steps // LOOKS)}
    try:
        return piecework.fit(training, set_, loss=loss, batch_size=BATCH_SIZE, seed=seed, **limits)
    except piecework.DidNotSolve as error:
        print(f"  {error}", flush=True)
        return None


def trials(recipes: list[Recipe], set_: data.Dataset, seconds: float) -> list[Trial]:
    """Every one with the same seconds and start."""
    found = []
    for recipe in recipes:
        history = run(scheduled(recipe.method, set_, seconds), set_, TUNING_SEED, seconds)
        best = history.best if history else None
        score = best["validation"]["score"] if best else None
        loss = history.rows[-1]["train"]["loss"] if history else None
        found.append(Trial(recipe, -math.inf if score is None else score, math.inf if loss is None else loss))
        print(
            f"  trial {recipe.name}: validation {found[-1].score:.4f}, training loss {found[-1].loss:.5f}", flush=True
        )
    return found


def sampled(**settings: Any) -> Recipe:
    """Steps on samples, of as many as will fit into the seconds."""
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if name != "adapt")
    method = GaussNewton(sample_rows=SAMPLE_ROWS, sample_steps=1, **settings)
    return Recipe(f"gauss-newton ({words})", method)


SAMPLED = [
    *(sampled(damping=damping, **more) for damping, more in product(DAMPINGS, ({}, {"hold": HOLD}))),
    *(sampled(solver="kfac", adapt=False, **settings) for settings in KFAC),
    *(sampled(solver="kfac", adapt=False, damping=PENALISED, weight_decay=penalty) for penalty in PENALTIES),
]
ADAMS = [
    Recipe(f"adam (lr {lr:g}, weight decay {decay:g})", Adam(lr=lr, weight_decay=decay))
    for lr, decay in product(RATES, DECAYS)
]
UNTUNED = [
    Recipe("gauss-newton, all rows", GaussNewton()),
    Recipe("lbfgs", LBFGS()),
    Recipe("lbfgs, float64", LBFGS(), torch.float64),
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
         f"rows are for validation; seeds 0..{arguments.seeds - 1}, medians [range]. gauss-newton: {SAMPLE_ROWS} rows "
         f"a step; exact steps with damping from {DAMPINGS}, each with hold 0 and {HOLD}, and solver kfac, its steps "
         f"not tested, with {len(KFAC)} settings and, at damping {PENALISED}, weight decay from {PENALTIES}; adam: "
         f"learning rate from {RATES} by weight decay from {DECAYS}, batches of {BATCH_SIZE}, half a cosine; trials "
         f"from seed {TUNING_SEED}, each with a third of the seconds or {arguments.tuning_seconds:g}. About {LOOKS} "
         "evaluations of a run; of methods without a schedule one after each step. Targets are standardised: a "
         f"loss of 1 is the mean's. seconds are training seconds. {REMARKS.get(arguments.set, '')}".strip(), [], []),
    ]  # fmt: skip
    name, seeds = arguments.set, range(arguments.seeds)
    sets = {dtype: data.load(f"uci/{name}", validation=0.1, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    longest = {  # without a schedule a shorter run is the beginning of the longest one
        recipe.name: [run(recipe.method, sets[recipe.dtype], seed, max(arguments.seconds)) for seed in seeds]
        for recipe in UNTUNED
    }
    for seconds in arguments.seconds:
        print(f"{name}, {seconds:g} s", flush=True)
        untuned = {one: [until(history, seconds) for history in found] for one, found in longest.items()}
        trial = min(seconds / 3, arguments.tuning_seconds)
        sections += _tables(sets[torch.float32], seconds, trial, seeds, untuned)
    report.write(f"table-{name}", f"{name}: regression on a table, at equal seconds", sections)


def until(history: History | None, seconds: float) -> History | None:
    """The rows of the first so many seconds."""
    return replace(history, rows=[row for row in history.rows if row["seconds"] <= seconds]) if history else None


Runs = list[History | None]


def _tables(
    set_: data.Dataset, seconds: float, trial: float, seeds: range, untuned: dict[str, Runs]
) -> list[tuple[str, list[str], list[list[object]]]]:
    """The two tables of one limit."""
    closest: dict[str, Runs] = {}
    best: dict[str, Runs] = {}
    for recipes in (SAMPLED, ADAMS):
        found = trials(recipes, set_, trial)
        done: dict[str, Runs] = {}
        for chosen, table in (
            (min(found, key=lambda one: one.loss).recipe, closest),
            (max(found, key=lambda one: one.score).recipe, best),
        ):
            if chosen.name not in done:
                # The pace is measured before each run: machines do not keep theirs for minutes.
                done[chosen.name] = [
                    run(scheduled(chosen.method, set_, seconds), set_, seed, seconds) for seed in seeds
                ]
                print(f"  {chosen.name}", flush=True)
            table[chosen.name] = done[chosen.name]
    about = f"{set_.name}: {len(set_.train)} training rows, {set_.num_features} features, {seconds:g} s"
    ends = [_end_row(name, runs) for name, runs in {**closest, **untuned}.items()]
    scores = [_score_row(name, runs) for name, runs in {**best, **untuned}.items()]
    scores += [[f"floor: {floor.name}", f"{floor.scores['test']:.4f}", None, None] for floor in floors.simple(set_)]
    return [
        (f"{about}: training loss; settings by the training loss of trials",
         ["method", "training loss at the end", "steps", "seconds", "runs that ended"], ends),
        (f"{about}: test R2; settings by the validation score of trials",
         ["method", "at the row that validation chose", "seconds until then", "at the end"], scores),
    ]  # fmt: skip


def _end_row(name: str, runs: Runs) -> list[object]:
    last = [history.rows[-1] if history else None for history in runs]
    return [
        name,
        ends_of([row["train"]["loss"] if row else None for row in last]),
        report.median([row["step"] if row else None for row in last]),
        report.median([row["seconds"] if row else None for row in last]),
        f"{len(last) - last.count(None)} of {len(runs)}",
    ]


def _score_row(name: str, runs: Runs) -> list[object]:
    last = [history.rows[-1] if history else None for history in runs]
    best = [history.best if history else None for history in runs]
    return [
        name,
        report.spread([row["test"]["score"] if row else None for row in best]),
        report.median([row["seconds"] if row else None for row in best]),
        report.spread([row["test"]["score"] if row else None for row in last]),
    ]


def ends_of(values: list[float | None]) -> str:
    """Median and range, with three digits however small."""
    middle, known = report.median(values), [value for value in values if value is not None]
    if middle is None:
        return "not finite"
    return f"{middle:.3g} [{min(known):.3g}, {max(known):.3g}]" if len(known) > 1 else f"{middle:.3g}"


if __name__ == "__main__":
    main()
