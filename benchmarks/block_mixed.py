"""Four layers without a useful derivative in one network, trained by one call: `python benchmarks/block_mixed.py`.

Linear, BatchNorm1d, Sign - Linear, TopK (keeps 30 %) - Linear, Sort - Linear, BatchNorm1d, Quantiser (8 levels) -
Linear. The rows differ in nothing but how what lies below those layers learns; all are tuned alike (`trials.py`).
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
from estimators import StraightThroughQuantiser, StraightThroughSign
from piecework import Adam, Batch, BlockADMM, data, losses
from piecework.models import mlp
from piecework.nn import Quantiser, Sign, Sort, Standardise, TopK
from piecework.training import Training
from repeated import RepeatedAdam
from trials import Course, Entry

LOSS = losses.Softmax()
RATES = (3e-3, 1e-2, 3e-2)
BETAS = (0.3, 3.0, 30.0, 300.0)
LEVELS = 8
COURSES = {
    "digits": (100, {"epochs": 20, "batch_size": 64, "seeds": 5, "tuning_seeds": 4}),
    "mnist": (200, {"epochs": 2, "batch_size": 128, "seeds": 5, "tuning_seeds": 2}),
}


def network(
    set_: data.Dataset,
    width: int,
    seed: int,
    *,
    sign: Callable[[], nn.Module],
    quantiser: Callable[[int], nn.Module],
    exchange: bool = False,
) -> nn.Sequential:
    """The same weights for the same seed, whatever stands in the places of the sign and of the quantiser."""
    made = mlp(set_.num_features, [width] * 4, set_.num_outputs, seed=seed)
    one, two, three, four, last = (layer for layer in made if isinstance(layer, nn.Linear))
    return nn.Sequential(
        *(Standardise(set_.mean, set_.scale), one, nn.BatchNorm1d(width), sign()),
        *(two, TopK(3 * width // 10, exchange=exchange), three, Sort()),
        *(four, nn.BatchNorm1d(width), quantiser(LEVELS), last),
    )


def entries(set_: data.Dataset, width: int) -> list[Entry]:
    make = partial(network, set_, width)

    def last(seed: int, steps: int, *, lr: float) -> Training[Batch]:
        model = make(seed, sign=Sign, quantiser=Quantiser)
        model.requires_grad_(False)
        model[-1].requires_grad_(True)
        return Adam(lr=lr, schedule="cosine", schedule_steps=steps).bind(model, LOSS)

    def invented(times: int, seed: int, steps: int, *, lr: float) -> Training[Batch]:
        model = make(seed, sign=StraightThroughSign, quantiser=StraightThroughQuantiser)
        return RepeatedAdam(times, lr=lr, schedule="cosine", schedule_steps=steps).bind(model, LOSS)

    def ours(
        more: dict[str, Any], seed: int, steps: int, *, lr: float, beta: float, exchange: bool = False
    ) -> Training[Batch]:
        recipe = BlockADMM(lr=lr, beta=beta, schedule="cosine", schedule_steps=steps, probe_every=0, **more)
        return recipe.bind(make(seed, sign=Sign, quantiser=Quantiser, exchange=exchange), LOSS)

    rates, both = {"lr": RATES}, {"lr": RATES, "beta": BETAS}
    return [
        Entry("last layer only", last, rates),
        Entry("Adam; straight through sign and quantiser, masked top-k, permuted sort", partial(invented, 1), rates),
        Entry("the same, each batch twice", partial(invented, 2), rates),
        Entry("block-ADMM", partial(ours, {}), both),
        Entry("block-ADMM, top-k that exchanges", partial(ours, {}, exchange=True), both),
        Entry("block-ADMM, 2 local steps", partial(ours, {"local_steps": 2}), both),
        Entry("block-ADMM, exact steps", partial(ours, {"prox": "exact"}), both),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=sorted(COURSES), default=sorted(COURSES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="block-mixed", help="of the file of results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sections = []
    for name in arguments.data:
        width, settings = COURSES[name]
        course = Course(data=data.load(name, validation=0.2 if name == "digits" else 0.1), **settings)
        rows = trials.table(entries(course.data, width), course)
        text = f"{name}, width {width}: {trials.about(course)}."
        sections.append((text[:1].upper() + text[1:], trials.HEADER, rows))
    report.write(arguments.name, "Sign, top-k, sort and quantiser in one network", sections)


if __name__ == "__main__":
    main()
