"""Short runs of the reference method, for the tests of the loop and of its folder."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from piecework import losses
from piecework.data import Dataset
from piecework.fit import fit
from piecework.group import Solo
from piecework.history import History
from piecework.models import mlp
from piecework.nn import Standardise
from piecework.testing.check import classes
from piecework.training import Batch, Metrics
from plain_sgd import PlainSGD, PlainTraining

SOFTMAX = losses.named("softmax")
FILES = ("recipe.json", "model.safetensors", "training.pt", "history.jsonl", "summary.json")
MLP = {"kind": "mlp", "num_features": 5, "hidden": [7], "num_outputs": 3, "activation": "tanh", "dtype": "float64"}


def network() -> nn.Sequential:
    """5-7-3 with tanh, float64, the same weights each time."""
    return mlp(5, [7], 3, activation="tanh", seed=1, dtype=torch.float64)


def scaled_network() -> nn.Sequential:
    """The network as it is deployed: scaling first. MLP describes it."""
    mean = torch.linspace(-1, 1, 5, dtype=torch.float64)
    return nn.Sequential(OrderedDict(scaling=Standardise(mean, mean + 3), network=network()))


def train(
    recipe: PlainSGD | None = None, data: Dataset | None = None, **settings: Any
) -> tuple[History, PlainTraining]:
    """A run of the network on `classes()`, of the recipe (or of a `training`), with any setting of `fit`."""
    group = settings.pop("group", Solo())
    training = settings.pop("training", None) or (recipe or PlainSGD(lr=0.3)).bind(network(), SOFTMAX, group=group)
    settings = {"batch_size": 24, "seed": 3, "loss": SOFTMAX, **settings}
    return fit(training, data or classes(), group=group, **settings), training


def scaled_training() -> PlainTraining:
    """The reference method at work on the scaled network."""
    return PlainSGD(lr=0.3).bind(scaled_network(), SOFTMAX)


def train_scaled(run: Any, steps: int = 4, **settings: Any) -> tuple[History, PlainTraining]:
    """A run of the scaled network, with a folder."""
    return train(training=scaled_training(), steps=steps, run=run, **settings)


class Wandering(PlainTraining):
    """Moves its weights by plan: the best ones come at step 2."""

    plan = (0.5, 1.0, 0.5, 0.25, 0.125, 2.0)

    def step(self, batch: Batch) -> Metrics:
        factor = self.plan[min(self.steps, 5)]
        metrics = super().step(batch)
        self._copy(self.weights, [factor * good for good in self.good])
        return metrics

    @property
    def good(self) -> list[Tensor]:
        model = network()
        train(training=PlainSGD(lr=0.5, full=True).bind(model, SOFTMAX), steps=40)
        return [one.detach() for one in model.parameters()]
