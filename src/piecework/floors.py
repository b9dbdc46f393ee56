"""Floors of a comparison: what simple models reach on the same rows, so that a score can be read.

    majority class (mean)    always the most frequent class of the training rows; for real targets their mean
    logistic regression      scikit-learn's, on standardised features; for real targets ridge regression
    random features          the hidden layers as they start, and the output layer in closed form: what a network
                             scores before any of its hidden layers has learnt

The closed form, with A (h, n) the standardised features or the outputs of the last hidden layer, a row of ones below
them, and Y (k, n) the targets (0 and 1 for classes):

    W = Y A^T (A A^T + rho I)^-1,    rho = 1e-4 times the mean of the diagonal of A A^T

A A^T is added up tile by tile in float64, so a mapped file is never held."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import evaluation, losses
from .data import Dataset
from .layers import layers
from .losses import Loss
from .nn import Standardise
from .training import Batch

RIDGE = 1e-4
"""rho over the mean of the diagonal."""

MOST = 50_000_000
"""Numbers that scikit-learn is given at most; of more rows it gets every second, third, ..."""

ITERATIONS = 100
"""Of scikit-learn's solver at most; a floor must not cost more than what stands on it."""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A simple model and its scores (accuracy or R²) by part; seconds: to fit it; note: what a reader should know."""

    name: str
    scores: dict[str, float | None]
    seconds: float
    parameters: int
    note: str = ""

    def summary(self, data: Dataset) -> dict[str, Any]:
        """The floor with the keys of a run's summary; a floor has no steps and no loss that compares."""
        parts = {
            part: None if getattr(data, part) is None else {"loss": None, "score": self.scores[part]}
            for part in ("train", "validation", "test")
        }
        return {
            "method": f"floor: {self.name}",
            "data": data.name,
            "task": data.task,
            "rows": len(data.train),
            "ranks": 1,
            "steps": 0,
            "seconds": self.seconds,
            "stopped_by": None,
            "score_name": evaluation.score_name(data.task),
            **parts,
            "best_test_score": self.scores["test"],
            "bytes_sent": 0,
            "rounds": 0,
            "peak_memory_mb": None,
            "parameters": self.parameters,
            "note": self.note,
        }


def simple(data: Dataset) -> list[Floor]:
    """The floors that need no network: the constant and the linear one; none for sequences."""
    if data.sequences:
        return []
    return [constant(data), linear(data)]


def constant(data: Dataset) -> Floor:
    """The most frequent class, or the mean."""
    started = time.perf_counter()
    z = torch.zeros(data.num_outputs, dtype=data.mean.dtype)
    if data.task == "regression":
        z += data.train.y.double().mean(0).to(z.dtype)
        name = "mean"
    else:
        most = int(torch.bincount(data.train.y, minlength=2).argmax())
        name = "majority class"
        z[most if data.task == "multiclass" else 0] = 1.0 if data.task == "multiclass" or most == 1 else -1.0
    return _floor(name, _Constant(z), data, started, parameters=data.num_outputs)


def linear(data: Dataset) -> Floor:
    """Logistic regression (scikit-learn's, penalty 1/2 |w|^2), or ridge regression, on standardised features."""
    started = time.perf_counter()
    scaling = Standardise(data.mean, data.scale)
    if data.task == "regression":
        layer = refit(scaling, data, data.num_features)
        return _floor("ridge regression", nn.Sequential(scaling, layer), data, started)
    layer, note = _logistic(scaling, data)
    return _floor("logistic regression", nn.Sequential(scaling, layer), data, started, note=note)


def random_features(data: Dataset, model: nn.Module) -> Floor | None:
    """The output layer of a network refitted on its hidden layers as they are.

    model: scaling and network, as the command line builds them, with the weights of the start; it is not altered.
    None for a network that does not end in a linear layer behind another one."""
    started = time.perf_counter()
    *below, last = [layer for _, layer in layers(model) if not isinstance(layer, nn.Identity)]
    if not isinstance(last, nn.Linear) or not any(isinstance(layer, nn.Linear) for layer in below):
        return None
    hidden = nn.Sequential(*below)
    layer = refit(hidden, data, last.in_features)
    return _floor("random features", nn.Sequential(hidden, layer), data, started)


def refit(features: nn.Module, data: Dataset, width: int) -> nn.Linear:
    """The linear layer, with a bias, that fits the training targets best on these features: the closed form above."""
    train, k = data.train, data.num_outputs
    gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    cross = torch.zeros(k, width + 1, dtype=torch.float64)
    for a, rows in _tiles(features, train):
        a = functional.pad(a.double().cpu(), (0, 1), value=1.0)
        gram += a.T @ a
        cross += _targets(train.y[rows], k, data.task).T @ a
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
    solution = torch.linalg.solve(gram, cross.T).T
    return _layer(solution[:, :-1], solution[:, -1], data.mean.dtype)


def _targets(y: Tensor, k: int, task: str) -> Tensor:
    if task == "regression":
        return y.double().cpu()
    if task == "binary":
        return y.double().cpu().unsqueeze(1)
    return functional.one_hot(y.cpu(), k).double()


def _tiles(module: nn.Module, part: Batch) -> Any:
    device = evaluation.device_of(module)
    with evaluation.deployed(module):
        for start in range(0, len(part), evaluation.TILE):
            rows = slice(start, start + evaluation.TILE)
            yield module(part.x[rows].to(device)), rows


def _layer(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):  # the weights it draws at first are replaced
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _logistic(scaling: Standardise, data: Dataset) -> tuple[nn.Linear, str]:
    """scikit-learn's logistic regression as a layer whose outputs are log-odds."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    step = max(1, -(-len(data.train) * data.num_features // MOST))
    part = Batch(data.train.x[::step], data.train.y[::step])
    x = np.concatenate([a.numpy() for a, _ in _tiles(scaling, part)])
    note = f"fitted on every {step}th row" if step > 1 else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = LogisticRegression(max_iter=ITERATIONS).fit(x, part.y.numpy())
    weight, bias = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
    if data.task == "multiclass" and len(weight) < data.num_outputs:
        weight, bias = _for_all_classes(weight, bias, found.classes_, data.num_outputs)
    return _layer(weight, bias, data.mean.dtype), note


def _for_all_classes(weight: Tensor, bias: Tensor, seen: Any, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Outputs for the classes that a thinned-out training part has lost, too: they are never decided for."""
    if len(weight) == 1:  # two classes left, one row of log-odds
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    whole = torch.zeros(num_outputs, weight.shape[1], dtype=weight.dtype)
    shift = torch.full((num_outputs,), -1e9, dtype=bias.dtype)
    whole[torch.from_numpy(seen)], shift[torch.from_numpy(seen)] = weight, bias
    return whole, shift


def _floor(
    name: str, model: nn.Module, data: Dataset, started: float, *, parameters: int | None = None, note: str = ""
) -> Floor:
    seconds = time.perf_counter() - started
    count = sum(parameter.numel() for parameter in model.parameters()) if parameters is None else parameters
    loss = _loss(name, data)
    scores: dict[str, float | None] = {}
    for part in ("train", "validation", "test"):
        rows: Batch | None = getattr(data, part)
        if rows is None:
            scores[part] = None
            continue
        sums = evaluation.sums(model, rows, slice(0, len(rows)), loss, data.task)
        scores[part] = evaluation.merged([sums], data.task)["score"]
    return Floor(name=name, scores=scores, seconds=seconds, parameters=count, note=note)


def _loss(name: str, data: Dataset) -> Loss:
    """The loss that decides by the floor's outputs: log-odds, or fitted zeros and ones."""
    return losses.auto(data.task) if name in ("logistic regression", "majority class") else losses.named("squared")


class _Constant(nn.Module):
    z: Tensor

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.register_buffer("z", z)

    def forward(self, x: Tensor) -> Tensor:
        return self.z.expand(len(x), -1)
