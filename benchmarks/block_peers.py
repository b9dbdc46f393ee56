"""Published methods that train block by block, beside ours, in one network: `python benchmarks/block_peers.py mnist`.

AM-Adam and block coordinate descent are written anew from their papers, with the settings that these give; the rate of
the one and the start of the other are tuned as the rates of the other rows are; see `peers_by_blocks.py`. Methods that
see all rows at once take 50 sweeps. Seconds are those of the processor, so that the column says what a row costs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import report
import trials
from peers_by_blocks import AlternatingAdam, CoordinateDescent
from piecework import ADMM, Adam, Batch, BlockADMM, data, losses
from piecework.models import mlp
from piecework.nn import Standardise
from piecework.training import Training
from repeated import RepeatedAdam
from trials import Course, Entry

LOSS = losses.Softmax()
RATES = (1e-3, 3e-3, 1e-2)
SWEEPS = 50
COURSES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "digits": ((100, 100), {"epochs": 20, "batch_size": 64, "seeds": 5, "tuning_seeds": 2}),
    "mnist": ((300, 300), {"epochs": 8, "batch_size": 128, "seeds": 3, "tuning_seeds": 1}),
}


def entries(set_: data.Dataset, hidden: tuple[int, ...]) -> tuple[list[Entry], list[Entry]]:
    """Rows on mini-batches, and rows on all samples at once."""

    def made(seed: int) -> nn.Sequential:
        network = mlp(set_.num_features, hidden, set_.num_outputs, seed=seed)
        return nn.Sequential(Standardise(set_.mean, set_.scale), *network)

    def online(recipe: Any, seed: int, steps: int, **settings: Any) -> Training[Batch]:
        return recipe(schedule="cosine", schedule_steps=steps, **settings).bind(made(seed), LOSS)

    def whole(recipe: Any, seed: int, steps: int, **settings: Any) -> Training[Batch]:
        return recipe(**settings).bind(made(seed), LOSS)

    rates = {"lr": RATES}
    block = partial(BlockADMM, probe_every=0)
    return [
        Entry("Adam", partial(online, Adam), rates),
        Entry("Adam, each batch twice", partial(online, partial(RepeatedAdam, 2)), rates),
        Entry("block-ADMM, 2 local steps", partial(online, partial(block, local_steps=2)), rates),
        Entry("AM-Adam, Choromanska et al. 2019", partial(online, AlternatingAdam), rates),
    ], [
        Entry("ADMM of this library, without gradients", partial(whole, ADMM)),
        Entry("block coordinate descent, Zeng et al. 2019", partial(whole, CoordinateDescent), {"spread": (0.0, 0.01)}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=sorted(COURSES))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    hidden, settings = COURSES[arguments.data]
    course = Course(data=data.load(arguments.data, validation=0.2 if arguments.data == "digits" else 0.1), **settings)
    online, whole = entries(course.data, hidden)
    rows = trials.table(online, course)
    rows += trials.table(whole, replace(course, epochs=SWEEPS, batch_size=len(course.data.train)))
    what = f"{arguments.data.capitalize()}, hidden layers of {' and '.join(map(str, hidden))}"
    text = f"{what}: {trials.about(course)}. The last two rows: {SWEEPS} sweeps over all training rows."
    report.write(f"block-peers-{arguments.data}", "Networks trained block by block", [(text, trials.HEADER, rows)])


if __name__ == "__main__":
    main()
