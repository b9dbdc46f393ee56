"""Deep sigmoid networks from torch's own initialisation: `python benchmarks/block_sigmoid.py`.

Digits, 10 and 20 hidden layers of 50 sigmoid units, nn.Linear's default initialisation (seeded). From there what the
input makes of the activations, and the gradient on its way down, shrink by about a factor 7 a layer: below the rounding
of float32 beside the activations' mean from about the eighth layer on. The control is a good initialisation (Xavier,
gain 4: the slope of a sigmoid at 0 is 1/4). All rows are tuned alike (`trials.py`), anew for each depth; the row with
duals has the settings of the one without. A run of block-ADMM takes as long as tens of runs of Adam: `--baselines
--epochs 200` gives Adam more of the time.

Falling penalties: that of a cut is `ratio` times that of the cut above it, beta at the last cut. A target is moved by
the gradient over the penalty; as the gradient falls on its way down so may the penalty, and the move stays in sight.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import torch
from torch import nn

import report
import trials
from piecework import Adam, Batch, BlockADMM, data, losses
from piecework.nn import Standardise
from piecework.training import Training
from trials import Course, Entry

LOSS = losses.Softmax()
WIDTH = 50
OURS = (3e-3, 1e-2)
PENALTY = "block-ADMM, penalties: "


class _Adam(torch.optim.Adam):
    """With eps 1e-20, because the loss of a low block has a scale far below that of the others, and half a cosine."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, steps: int) -> None:
        super().__init__(parameters, lr=lr, eps=1e-20, fused=True)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self, steps, lr / 100)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)
        self._schedule.step()


def network(set_: data.Dataset, depth: int, seed: int, gain: float | None = None) -> nn.Sequential:
    """nn.Linear as torch initialises it; with a gain, Xavier normal weights and zero biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [set_.num_features, *[WIDTH] * depth, set_.num_outputs]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            linear = nn.Linear(fan_in, fan_out)
            if gain is not None:
                nn.init.xavier_normal_(linear.weight, gain)
                nn.init.zeros_(linear.bias)
            layers += [linear, nn.Sigmoid()]
    return nn.Sequential(Standardise(set_.mean, set_.scale), *layers[:-1])


def entries(set_: data.Dataset, depth: int) -> list[Entry]:
    def adam(gain: float | None, eps: float, seed: int, steps: int, *, lr: float) -> Training[Batch]:
        recipe = Adam(lr=lr, eps=eps, schedule="cosine", schedule_steps=steps)
        return recipe.bind(network(set_, depth, seed, gain), LOSS)

    def twin(seed: int, steps: int, *, lr: float) -> Training[Batch]:
        recipe = BlockADMM(lr=lr, schedule="cosine", schedule_steps=steps, probe_every=0)
        return recipe.bind(network(set_, depth, seed), LOSS)

    def ours(
        seed: int, steps: int, *, lr: float, beta: float, ratio: float, sweeps: int, dual_step: float = 0.0
    ) -> Training[Batch]:
        recipe = BlockADMM(
            optimizer=partial(_Adam, lr=lr, steps=steps * sweeps),
            beta=tuple(beta * ratio**above for above in reversed(range(depth))),
            alpha_beta=0.5,
            sweeps=sweeps,
            dual_step=dual_step,
            probe_every=0,
        )
        return recipe.bind(network(set_, depth, seed), LOSS)

    rates = {"lr": (3e-4, 1e-3, 3e-3, 1e-2)}
    one = {"lr": OURS, "beta": (0.003, 0.01, 0.03), "ratio": (1.0,), "sweeps": (5, 10)}
    falling = {"lr": OURS, "ratio": (0.35, 0.5, 0.7), "beta": (0.1, 0.3, 1.0), "sweeps": (5, 10)}
    return [
        Entry("Adam", partial(adam, None, 1e-8), rates),
        Entry("block-ADMM, alpha beta = 1, one sweep of one step: backpropagation", twin, rates),
        Entry("Adam, eps 1e-20", partial(adam, None, 1e-20), rates),
        Entry("Adam from Xavier with gain 4: the control", partial(adam, 4.0, 1e-8), rates),
        Entry(PENALTY + "one for all cuts, no duals", ours, one),
        Entry(PENALTY + "falling, no duals", ours, falling),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--baselines", action="store_true", help="only the rows of backpropagation, which are cheap")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="block-sigmoid", help="of the file of results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    set_ = data.load("digits", validation=0.2)
    course = Course(
        set_,
        epochs=arguments.epochs,
        batch_size=64,
        seeds=arguments.seeds,
        tuning_seeds=1,
        tuning_epochs=arguments.epochs * 0.5,
    )
    sections = []
    for depth in arguments.depths:
        listed = [one for one in entries(set_, depth) if not (arguments.baselines and one.name.startswith(PENALTY))]
        known: dict[str, dict[str, object]] = {}
        rows = trials.table(listed, course, known)
        if not arguments.baselines:
            twin = Entry("the same with duals, step 0.5", partial(listed[-1].start, dual_step=0.5))
            rows += trials.table([twin], course, {twin.name: known[listed[-1].name]})
        sections.append((f"{depth} hidden layers.", trials.HEADER, rows))
    text = f"{WIDTH} sigmoid units a hidden layer; {trials.about(course)}."
    text += "" if arguments.baselines else " Block-ADMM: alpha beta 0.5."
    report.write(arguments.name, "Deep sigmoid networks on digits", [(text, [], []), *sections])


if __name__ == "__main__":
    main()
