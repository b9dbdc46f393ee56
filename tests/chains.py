"""Small chains, their data and their sweeps, for the tests of ADMM."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from piecework import data, losses
from piecework.data import Dataset
from piecework.group import Group, Solo
from piecework.losses import Loss
from piecework.methods import ADMM
from piecework.models import mlp
from piecework.nn import Standardise
from piecework.training import Batch

SQUARED = losses.named("squared")


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curved(rows: int = 211, *, outputs: int = 2, features: int = 5, seed: int = 0) -> Batch:
    """Real targets that no linear map of the features fits, float64."""
    x = randn(rows, features, seed=seed)
    return Batch(x, torch.sin(1.5 * x @ randn(features, outputs, seed=seed + 1)) + 0.3)


def quarters(rows: int = 211, *, classes: int = 4, seed: int = 0) -> Batch:
    """Classes by the angle of the first two of five features, float64."""
    x = randn(rows, 5, seed=seed)
    return Batch(x, ((torch.atan2(x[:, 1], x[:, 0]) / torch.pi + 1) / 2 * classes).long().clamp(0, classes - 1))


def chain(*widths: int, activation: str = "relu", seed: int = 1, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """num_features, hidden widths..., num_outputs; the same weights at each call."""
    return mlp(widths[0], widths[1:-1], widths[-1], activation=activation, seed=seed, dtype=dtype)


def bind(model: nn.Module, loss: Loss = SQUARED, *, group: Group | None = None, **settings: Any) -> Any:
    """ADMM(**settings) at work on the model."""
    return ADMM(**settings).bind(model, loss, group=group or Solo())


def sweeps(training: Any, batch: Batch, number: int) -> list[dict[str, float]]:
    """The metrics of so many sweeps."""
    return [{name: float(value) for name, value in training.step(batch).items()} for _ in range(number)]


def flat(model: nn.Module) -> Tensor:
    """All weights as one vector, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


@torch.no_grad()
def deployed_loss(model: nn.Module, loss: Loss, batch: Batch) -> float:
    """The mean loss of the module as it stands."""
    return float(loss(model(batch.x), batch.y))


@torch.no_grad()
def accuracy(model: nn.Module, loss: Loss, batch: Batch) -> float:
    return float((loss.decide(model(batch.x)) == batch.y).double().mean())


@cache
def bundled(name: str = "digits", dtype: torch.dtype = torch.float32) -> Dataset:
    """A data set that scikit-learn brings, with its test part."""
    return data.load(name, dtype=dtype)


def held_out(found: Dataset) -> Batch:
    assert found.test is not None
    return found.test


def scaled(
    found: Dataset, hidden: Sequence[int], *, activation: str = "relu", seed: int = 1, dtype: torch.dtype | None = None
) -> nn.Sequential:
    """The network as it is deployed: scaling first."""
    dtype = dtype or found.mean.dtype
    network = mlp(found.num_features, hidden, found.num_outputs, activation=activation, seed=seed, dtype=dtype)
    return nn.Sequential(Standardise(found.mean.to(dtype), found.scale.to(dtype)), network)
