"""ADMM against tuned first-order and full-batch baselines on one data set: `python benchmarks/race.py higgs`.

Every method starts from the same weights, steps on the same rows and is scored by the same plain module. Learning rates
are chosen on a validation part of the training rows; then every method runs on all training rows but that part, stops
by validation, and its test score is reported at the step that validation chose. Test rows choose nothing. The times to
a target are those of the first row whose test score reaches it: a measurement, not a choice.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

import piecework
import report
from piecework import ADMM, CG, LBFGS, SGD, Adam, History, data, floors, losses
from piecework.nn import Standardise

Recipe = TypeVar("Recipe", bound=piecework.Method)


@dataclass(frozen=True)
class Race:
    """What is run on one data set. target: a test accuracy to be timed."""

    hidden: tuple[int, ...]
    target: float
    sweeps: int
    seconds: float
    batch_size: int
    checkpoints: tuple[int, ...]


RACES = {
    "higgs": Race((300,), 0.675, 40, 30.0, 256, (1, 40)),
    "mnist": Race((300, 300), 0.95, 12, 60.0, 128, (1, 12)),
    "fashion-mnist": Race((300, 300), 0.87, 12, 60.0, 128, (1, 12)),
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DECAYS = (0.0, 0.01, 0.1, 1.0)
SGD_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def model(set_: data.Dataset, race: Race, seed: int, activation: str = "relu") -> nn.Module:
    network = piecework.models.mlp(set_.num_features, race.hidden, set_.num_outputs, activation=activation, seed=seed)
    return nn.Sequential(OrderedDict(scaling=Standardise(set_.mean, set_.scale), network=network))


def run(
    method: piecework.Method, loss: losses.Loss, set_: data.Dataset, race: Race, seed: int, **limits: object
) -> History:
    training = method.bind(model(set_, race, seed), loss)
    every = max(1, len(set_.train) // race.batch_size // 4) if training.batches == "mini" else 1
    return piecework.fit(
        training, set_, loss=loss, batch_size=race.batch_size, seed=seed, evaluate_every=every, **limits
    )


def tune(recipes: list[Recipe], loss: losses.Loss, set_: data.Dataset, race: Race) -> Recipe:
    """The recipe with the best validation score of any row, each given a third of the seconds; seed 100."""
    scores = []
    for recipe in recipes:
        best = run(recipe, loss, set_, race, 100, seconds=race.seconds / 3).best
        scores.append(best["validation"]["score"] if best else 0.0)
        print(f"  tune {recipe}: validation {scores[-1]:.4f}", flush=True)
    return recipes[scores.index(max(scores))]


def first(history: History, target: float) -> float | None:
    """Training seconds at the first row whose test score is at least the target."""
    return next((row["seconds"] for row in history.rows if row["test"]["score"] >= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=sorted(RACES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    race = RACES[arguments.data]
    if arguments.seconds:
        race = replace(race, seconds=arguments.seconds)
    set_ = data.load(arguments.data, validation=0.1)
    squared, usual = losses.named("squared"), losses.auto(set_.task)
    print(f"{arguments.data}: tuning", flush=True)
    adam = tune([Adam(lr=lr) for lr in RATES], usual, set_, race)
    adam = tune([replace(adam, weight_decay=decay) for decay in DECAYS], usual, set_, race)
    sgd = tune([SGD(lr=lr) for lr in SGD_RATES], usual, set_, race)
    entries: list[tuple[str, piecework.Method, losses.Loss]] = [
        ("admm", ADMM(), squared),
        ("adam", adam, usual),
        ("sgd", sgd, usual),
        ("lbfgs", LBFGS(), usual),
        ("lbfgs, squared loss", LBFGS(), squared),
        ("cg", CG(), usual),
    ]
    if arguments.only:
        entries = [entry for entry in entries if entry[0] in arguments.only]
    rows, curves = [], []
    times: dict[str, float | None] = {}
    for name, method, loss in entries:
        histories = []
        for seed in range(arguments.seeds):
            limits = {"steps": race.sweeps} if name == "admm" else {"seconds": race.seconds}
            began = time.perf_counter()
            histories.append(run(method, loss, set_, race, seed, **limits))
            print(f"  {name} seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        chosen = [h.best for h in histories]
        times[name] = report.median([first(h, race.target) for h in histories])
        rate, decay = getattr(method, "lr", None), getattr(method, "weight_decay", 0.0)
        rows.append(
            [
                f"{name} (lr {rate:g}" + (f", weight decay {decay:g})" if decay else ")") if rate else name,
                loss.name,
                report.spread([row["test"]["score"] if row else None for row in chosen]),
                report.spread([h.rows[-1]["test"]["score"] for h in histories]),
                report.spread([h.rows[-1]["train"]["score"] for h in histories]),
                report.median([h.rows[-1]["step"] for h in histories]),
                report.median([h.rows[-1]["seconds"] for h in histories]),
                report.spread([first(h, race.target) for h in histories], 2),
            ]
        )
        if name == "admm":
            for step in race.checkpoints:
                at = [next(r for r in h.rows if r["step"] == step) for h in histories]
                scores = report.spread([r["test"]["score"] for r in at])
                curves.append([f"after {step} sweeps" if step > 1 else "after one sweep: random features, the floor",
                               scores, report.median([r["seconds"] for r in at])])  # fmt: skip
            passes = [sum(h["passes"]) / len(h) for h in histories]
            curves.append(["passes over the data a sweep, trials included", report.spread(passes, 2), None])
    floor_rows = [[name, f"{score:.4f}"] for name, score in floor_scores(set_, race).items()]
    ratios = [[name, seconds, seconds / times["admm"] if seconds and times.get("admm") else None]
              for name, seconds in times.items()]  # fmt: skip
    shape = "-".join(map(str, [set_.num_features, *race.hidden, set_.num_outputs]))
    report.write(
        f"race-{arguments.data}",
        f"{arguments.data}, {shape}: ADMM and its baselines",
        [
            (f"{len(set_.train)} training rows, {len(set_.validation or [])} validation rows, "
             f"{len(set_.test or [])} test rows; seeds 0..{arguments.seeds - 1}, medians [range]; learning rates "
             f"chosen on validation from {RATES} (adam, then its weight decay from {DECAYS}) and "
             f"{SGD_RATES} (sgd), batch size {race.batch_size}; scored "
             "every quarter of an epoch (adam, sgd) or every step, or where that is less than 5 % of the time passed, "
             "after that; seconds are training seconds.", [], []),
            ("", ["method", "loss", "test accuracy at the step chosen on validation", "test accuracy at the end",
                  "train accuracy at the end", "steps", "seconds", f"seconds to test {race.target}"], rows),
            ("ADMM by sweeps", ["", "test accuracy", "seconds"], curves),
            ("Floors", ["", "test accuracy"], floor_rows),
            (f"Seconds to a test accuracy of {race.target}, and their ratio to ADMM's",
             ["method", "seconds", "ratio"], ratios),
        ],
    )  # fmt: skip


def floor_scores(set_: data.Dataset, race: Race) -> dict[str, float]:
    """Test scores of the floors, by the library's own floors of `compare`."""
    found = [*floors.simple(set_), floors.random_features(set_, model(set_, race, 0))]
    return {floor.name: floor.scores["test"] or 0.0 for floor in found if floor}


if __name__ == "__main__":
    main()
