"""Networks of sign units by block-ADMM and by invented gradients: `python benchmarks/block_sign.py digits`.

Each hidden layer is Linear, BatchNorm1d, sign. All rows have the same starts, batches, Adam with a cosine schedule and
epochs, and are tuned alike (`trials.py`), anew for each depth: the learning rate from the same values, then what else
there is: the range of the straight-through estimator, the kind of hinge, penalty and dither of block-ADMM. With a large
penalty the dithered linear step is the straight-through estimator with the range [-dither, dither]; below that it
bounds how far a unit is asked to move by one sample, and reaches units outside that range.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import report
import trials
from estimators import HingeSign, StraightThroughSign
from piecework import Adam, Batch, BlockADMM, data, losses
from piecework.models import mlp
from piecework.nn import Sign, Standardise
from piecework.training import Training
from trials import Course, Entry

LOSS = losses.Softmax()
RATES, CLIPS = (3e-3, 1e-2, 3e-2), (0.5, 1.0, 2.0)
BETAS, HARD_BETAS = (0.3, 3.0, 30.0), (0.03, 0.3, 3.0)
COURSES = {
    "digits": (100, {"epochs": 30, "batch_size": 64, "seeds": 5, "tuning_seeds": 2}),
    "mnist": (200, {"epochs": 4, "batch_size": 128, "seeds": 3, "tuning_seeds": 1, "tuning_epochs": 1}),
}


def network(set_: data.Dataset, depth: int, width: int, sign: Callable[[], nn.Module], seed: int) -> nn.Sequential:
    """Scaling, then Linear, BatchNorm1d and sign a hidden layer, then Linear: the same weights for the same seed."""
    made = mlp(set_.num_features, [width] * depth, set_.num_outputs, seed=seed)
    linear = [one for one in made if isinstance(one, nn.Linear)]
    hidden = [one for layer in linear[:-1] for one in (layer, nn.BatchNorm1d(width), sign())]
    return nn.Sequential(Standardise(set_.mean, set_.scale), *hidden, linear[-1])


def entries(set_: data.Dataset, depth: int, width: int) -> list[Entry]:
    def make(sign: Callable[[], nn.Module], seed: int) -> nn.Sequential:
        return network(set_, depth, width, sign, seed)

    def adam(sign: Callable[[], nn.Module], seed: int, steps: int, lr: float) -> Training[Batch]:
        return Adam(lr=lr, schedule="cosine", schedule_steps=steps).bind(make(sign, seed), LOSS)

    def straight(seed: int, steps: int, *, lr: float, clip: float) -> Training[Batch]:
        return adam(partial(StraightThroughSign, clip), seed, steps, lr)

    def hinge(seed: int, steps: int, *, lr: float, hinge: str) -> Training[Batch]:
        return adam(partial(HingeSign, hinge), seed, steps, lr)

    def last(seed: int, steps: int, *, lr: float) -> Training[Batch]:
        model = make(Sign, seed)
        model.requires_grad_(False)
        model[-1].requires_grad_(True)
        return Adam(lr=lr, schedule="cosine", schedule_steps=steps).bind(model, LOSS)

    def ours(
        more: dict[str, Any], seed: int, steps: int, *, lr: float, beta: float, dither: float = 0.0
    ) -> Training[Batch]:
        recipe = BlockADMM(lr=lr, beta=beta, schedule="cosine", schedule_steps=steps, probe_every=0, **more)
        return recipe.bind(make(partial(Sign, dither=dither), seed), LOSS)

    rates, hard = {"lr": RATES}, {"lr": RATES, "beta": HARD_BETAS}
    both = {"lr": RATES, "beta": BETAS, "dither": CLIPS}
    return [
        Entry("last layer only", last, rates),
        Entry("Adam, straight-through estimator", straight, {"lr": RATES, "clip": CLIPS}),
        Entry("Adam, hinge targets", hinge, {"lr": RATES, "hinge": ("saturated", "soft")}),
        Entry("block-ADMM", partial(ours, {}), both),
        Entry("block-ADMM, 2 local steps", partial(ours, {"local_steps": 2}), both),
        Entry("block-ADMM, exact step of the hard sign", partial(ours, {"prox": "exact"}), hard),
        Entry("block-ADMM, linear step of the hard sign", partial(ours, {}), hard),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=sorted(COURSES))
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--leave-out", nargs="+", default=[], help="rows whose names have one of these words")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the file of results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    width, settings = COURSES[arguments.data]
    course = Course(data=data.load(arguments.data, validation=0.2 if arguments.data == "digits" else 0.1), **settings)
    sections, left_out = [], arguments.leave_out
    for depth in arguments.depths:
        print(f"depth {depth}", flush=True)
        listed = entries(course.data, depth, width)
        rows = trials.table([one for one in listed if not any(word in one.name for word in left_out)], course)
        layers = "layer" if depth == 1 else "layers"
        sections.append((f"{depth} hidden {layers} of {width} sign units.", trials.HEADER, rows))
    text = f"{trials.about(course)}."
    name = arguments.name or f"block-sign-{arguments.data}"
    report.write(name, f"Sign units on {arguments.data}", [(text, [], []), *sections])


if __name__ == "__main__":
    main()
