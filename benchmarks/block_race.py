"""Block-ADMM against tuned Adam at equal seconds: `python benchmarks/block_race.py mnist`.

Every row is tuned alike, on a validation part of the training rows: the learning rate, then the smoothing of labels,
each trial with a third of the seconds, from a start of its own (seed 100). A run takes as many steps as fit into the
seconds, by the pace of the run before it, with a cosine schedule over them. Its score is that of the evaluation with
the best validation score; test rows choose nothing. `cosine` is the median, over looks at a mini-batch, of the cosine
between what the optimisers were given in a step and the gradient of the loss: at 1 the row is backpropagation under
another name. `fall` is the most that the test accuracy fell below the best before, in the second half of a run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import piecework
import report
from piecework import Adam, Batch, BlockADMM, History, data, losses
from piecework.nn import Standardise
from repeated import RepeatedAdam

Make = Callable[..., piecework.Method]


@dataclass(frozen=True)
class Race:
    hidden: tuple[int, ...]
    seconds: float
    batch_size: int = 128


RACES = {
    "digits": Race((100, 100, 100), 5.0, 64),
    "mnist": Race((300, 300), 45.0),
    "fashion-mnist": Race((300, 300), 45.0),
    "higgs": Race((300,), 20.0, 256),
    "mnist-wide": Race((1500, 1500, 1500), 120.0),
    "mnist-deep": Race((600,) * 10, 120.0),
}
RATES, SMOOTHINGS = (1e-3, 3e-3, 3e-4), (0.1, 0.0)
EVALUATIONS, OF_TRIALS = 10, 2
TWIN = "block-admm, alpha beta = 1, one sweep of one step: backpropagation"
LOOKS = {"probe_every": 200}
"""Each look at the true gradient takes about two steps' time."""
ENTRIES: dict[str, Make] = {
    "adam": Adam,
    TWIN: partial(BlockADMM, **LOOKS),
    "block-admm, 2 local steps": partial(BlockADMM, local_steps=2, **LOOKS),
    "adam, each batch twice": partial(RepeatedAdam, 2),
    "block-admm, 3 local steps": partial(BlockADMM, local_steps=3, **LOOKS),
    "block-admm, 2 sweeps, alpha beta 0.5, beta 0.1": partial(BlockADMM, sweeps=2, alpha_beta=0.5, beta=0.1, **LOOKS),
    "the same with duals, step 0.5": partial(BlockADMM, sweeps=2, alpha_beta=0.5, beta=0.1, dual_step=0.5, **LOOKS),
}
SHORT = tuple(ENTRIES)[:3]


@dataclass
class Run:
    history: History
    steps: int

    @property
    def validation(self) -> float:
        best = self.history.best
        return best["validation"]["score"] if best else 0.0

    @property
    def test(self) -> float:
        best = self.history.best
        return best["test"]["score"] if best else 0.0

    @property
    def seconds(self) -> float:
        return float(self.history.rows[-1]["seconds"])

    @property
    def cosine(self) -> float | None:
        found = [row["cosine"] for row in self.history.rows if row.get("cosine") is not None]
        return statistics.median(found) if found else None

    @property
    def fall(self) -> float:
        scores = [row["test"]["score"] for row in self.history.rows]
        second = range(len(scores) // 2, len(scores))
        return max((max(scores[:place]) - scores[place] for place in second if place > 0), default=0.0)


def model(set_: data.Dataset, race: Race, seed: int) -> nn.Module:
    network = piecework.models.mlp(set_.num_features, race.hidden, set_.num_outputs, seed=seed)
    return nn.Sequential(OrderedDict(scaling=Standardise(set_.mean, set_.scale), network=network))


def seconds_a_step(make: Make, set_: data.Dataset, race: Race, loss: losses.Loss) -> float:
    training = make(lr=1e-4).bind(model(set_, race, 0), loss)
    generator = torch.Generator().manual_seed(0)
    taken = []
    for _ in range(60):
        began = time.perf_counter()
        rows = torch.randint(len(set_.train), (race.batch_size,), generator=generator)
        training.step(Batch(set_.train.x[rows], set_.train.y[rows], rows))
        taken.append(time.perf_counter() - began)
    return statistics.mean(sorted(taken[5:])[:-5])


def run(
    make: Make, set_: data.Dataset, race: Race, seed: int, seconds: float, pace: float, looks: int, **more: Any
) -> Run:
    loss = losses.auto(set_.task)
    steps = max(20, int(seconds / pace))
    training = make(schedule="cosine", schedule_steps=steps, **more).bind(model(set_, race, seed), loss)
    history = piecework.fit(
        training,
        set_,
        loss=loss,
        batch_size=race.batch_size,
        seed=seed,
        steps=steps,
        evaluate_every=max(1, steps // looks),
    )
    return Run(history, steps)


class Pace:
    """Seconds a step, kept up to date: other work on the machine changes it."""

    def __init__(self, make: Make, set_: data.Dataset, race: Race) -> None:
        self._make, self._set, self._race = make, set_, race
        self._seconds = seconds_a_step(make, set_, race, losses.auto(set_.task))

    def run(self, seed: int, seconds: float, looks: int = EVALUATIONS, **more: Any) -> Run:
        found = run(self._make, self._set, self._race, seed, seconds, self._seconds, looks, **more)
        self._seconds = found.seconds / found.steps
        return found


def tuned(pace: Pace, race: Race) -> dict[str, float]:
    """The learning rate and the smoothing with the best validation score."""
    scores: dict[tuple[float, float], float] = {}

    def score(lr: float, smoothing: float) -> float:
        if (lr, smoothing) not in scores:
            found = pace.run(100, race.seconds / 3, OF_TRIALS, lr=lr, label_smoothing=smoothing)
            scores[lr, smoothing] = found.validation
            print(f"    lr {lr:g}, smoothing {smoothing:g}: validation {found.validation:.4f}", flush=True)
        return scores[lr, smoothing]

    lr = max(RATES, key=lambda one: score(one, SMOOTHINGS[0]))
    return {"lr": lr, "label_smoothing": max(SMOOTHINGS, key=lambda one: score(lr, one))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("race", choices=sorted(RACES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="only the first three rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    race = RACES[arguments.race]
    race = replace(race, seconds=arguments.seconds or race.seconds)
    set_ = data.load(arguments.race.removesuffix("-wide").removesuffix("-deep"), validation=0.1)
    rows = []
    kept: dict[str, float] = {}
    for name in SHORT if arguments.short else ENTRIES:
        make = ENTRIES[name]
        print(f"  {name}", flush=True)
        pace = Pace(make, set_, race)
        if name != TWIN:  # it takes Adam's settings
            kept = tuned(pace, race)
        runs = [pace.run(seed, race.seconds, **kept) for seed in range(arguments.seeds)]
        for one in runs:
            print(f"    test {one.test:.4f} in {one.seconds:.1f} s", flush=True)
        cosines = [one.cosine for one in runs if one.cosine is not None]
        rows.append(
            [
                name,
                f"{kept['lr']:g}",
                f"{kept['label_smoothing']:g}",
                report.spread([one.validation for one in runs]),
                report.spread([one.test for one in runs]),
                report.spread([one.history.rows[-1]["train"]["loss"] for one in runs]),
                round(statistics.median(cosines), 4) if cosines else None,
                report.spread([one.fall for one in runs]),
                report.median([one.steps for one in runs]),
                report.median([one.seconds for one in runs]),
            ]
        )
    shape = "-".join(map(str, [set_.num_features, *race.hidden, set_.num_outputs]))
    text = (
        f"{shape}, relu, batches of {race.batch_size}, {race.seconds:g} s a run, {arguments.seeds} seeds "
        f"(median and range), {len(set_.train):,} training, {len(set_.validation or ()):,} validation and "
        f"{len(set_.test or ()):,} test rows."
    )
    header = [
        "method",
        "lr",
        "smoothing",
        "validation",
        "test accuracy",
        "training loss",
        "cosine",
        "fall",
        "steps",
        "s",
    ]
    report.write(f"block-race-{arguments.race}", f"Block-ADMM on {arguments.race}", [(text, header, rows)])


if __name__ == "__main__":
    main()
