"""Algorithm 1 as published beside the default sweep: `python benchmarks/taylor2016.py`. Curves and a table."""

from __future__ import annotations

import argparse

import torch

import piecework
import report
from piecework import ADMM, History, data, losses
from piecework.history import figure
from race import Race, model

SHOWN = (1, 5, 10, 12, 14, 16, 20, 30, 40, 60)


def run(set_: data.Dataset, hidden: tuple[int, ...], method: ADMM, loss: str, seed: int, steps: int) -> History:
    race = Race(hidden, 0, 0, 0, 0, ())
    bound = losses.named(loss)
    return piecework.fit(method.bind(model(set_, race, seed), bound), set_, loss=bound, steps=steps, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    sections = []
    for name, hidden, steps in (("higgs", (300,), 60), ("digits", (100, 50), 60)):
        set_ = data.load(name)
        curves: dict[str, list[History]] = {}
        for title, make, loss in (
            ("Algorithm 1, hinge", lambda seed: ADMM(mode="taylor2016", seed=seed), "hinge"),
            ("default, hinge", lambda seed: ADMM(), "hinge"),
            ("default, squared", lambda seed: ADMM(), "squared"),
        ):
            curves[title] = [run(set_, hidden, make(s), loss, s, steps) for s in range(arguments.seeds)]
            print(name, title, curves[title][0].rows[-1]["test"], flush=True)
        rows = [
            [step, *(report.spread([h.rows[step - 1]["test"]["score"] for h in runs], 3) for runs in curves.values())]
            for step in SHOWN
        ]
        figure(curves, report.RESULTS / f"taylor2016-{name}.png")
        relaxed = curves["Algorithm 1, hinge"][0].rows[-1]
        note = (
            f"{name}, {'-'.join(map(str, [set_.num_features, *hidden, set_.num_outputs]))}, test accuracy of the "
            f"deployed network by sweep, seeds 0..{arguments.seeds - 1}, medians [range]. At the end of Algorithm 1 "
            f"(seed 0) the loss of the stored z_L is {relaxed['relaxed_loss']:.3f} a sample, that of the network "
            f"{relaxed['train']['loss']:.3f}."
        )
        sections.append((note, ["sweep", *curves], rows))
    report.write("taylor2016", "Algorithm 1 of Taylor et al. 2016, re-drawn", sections)


if __name__ == "__main__":
    main()
