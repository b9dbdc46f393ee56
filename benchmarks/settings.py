"""What each setting of ADMM does, by validation rows alone: `python benchmarks/settings.py`. The defaults rest on this
table; test rows are not looked at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import piecework
import report
from piecework import ADMM, Adam, data, losses
from race import RACES, model

RIDGES = [
    {"ridge": ridge, "output_ridge": output}
    for ridge, output in ((1e-4, 1e-4), (1e-4, 0.1), (0.1, 0.1), (10.0, 0.1), (1.0, 1e-4), (1.0, 0.01), (1.0, 1.0))
]
SWITCHES: list[dict[str, Any]] = [
    {"acceleration": False},
    {"flips": False},
    {"multiplier": True},
    {"gamma": 10.0},
    {"beta": 10.0},
    {"loss": "logistic"},
    {"loss": "hinge"},
    {"activation": "leaky-relu"},
    {"activation": "hard-sigmoid"},
    {"activation": "tanh"},
    {"activation": "sigmoid"},
    {"activation": "sign"},
]
ADAM_RATES = {"higgs": 0.03, "mnist": 0.001}
"""Those which validation chose in race-higgs.md and race-mnist.md; without weight decay here."""


def measure(name: str, settings: dict[str, Any], seeds: int, adam_seconds: float | None) -> list[object]:
    race, set_ = RACES[name], data.load(name, validation=0.1)
    set_ = replace(set_, test=None)
    rest = dict(settings)
    loss = losses.auto(set_.task) if adam_seconds else losses.named(rest.pop("loss", "squared"))
    activation = rest.pop("activation", "relu")
    method: piecework.Method = Adam(lr=ADAM_RATES[name]) if adam_seconds else ADMM(**rest)
    limits: dict[str, Any] = {"seconds": adam_seconds} if adam_seconds else {"steps": race.sweeps}
    histories = []
    for seed in range(seeds):
        training = method.bind(model(set_, race, seed, activation), loss)
        histories.append(piecework.fit(training, set_, loss=loss, batch_size=race.batch_size, seed=seed, **limits))
    last = [h.rows[-1] for h in histories]
    counts: Sequence[object] = ["-", "-"]
    if not adam_seconds:
        counts = [
            report.spread([sum(h["passes"]) / len(h) for h in histories], 2),
            report.spread([sum(h["accepted"]) / len(h) for h in histories], 2),
        ]
    title = f"adam, lr {ADAM_RATES[name]:g}" if adam_seconds else ", ".join(f"{k} {v}" for k, v in settings.items())
    row = [
        title or "defaults (ridge 1, output_ridge 0.1)",
        report.spread([h.best["validation"]["score"] if h.best else None for h in histories]),
        report.spread([r["validation"]["score"] for r in last]),
        report.spread([r["train"]["score"] for r in last]),
        report.spread([r["train"]["loss"] for r in last]),
        report.median([r["seconds"] for r in last]),
        *counts,
    ]
    print(name, row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    columns = ["", "validation accuracy, best sweep", "at the end", "train accuracy", "train loss", "seconds",
               "passes a sweep", "sweeps that lowered the loss"]  # fmt: skip
    sections = []
    for name, entries, seconds in (
        ("higgs", [{}, *RIDGES, *SWITCHES], 12.0),
        ("mnist", [{}, RIDGES[0], RIDGES[2], RIDGES[3], RIDGES[5]], 24.0),
    ):
        rows = [measure(name, entry, arguments.seeds, None) for entry in entries]
        rows.append(measure(name, {}, arguments.seeds, seconds))
        note = (
            f"{name}: {RACES[name].sweeps} sweeps of the race's network, one setting at a time away from the defaults, "
            f"seeds 0..{arguments.seeds - 1}, medians [range]; losses of different names are not comparable."
        )
        sections.append((note, columns, rows))
    report.write("settings", "The settings of ADMM on validation rows", sections)


if __name__ == "__main__":
    main()
