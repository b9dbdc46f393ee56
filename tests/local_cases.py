"""Networks, rows and the slow, plain twin for the tests of Local."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kept import Kept
from piecework import Batch, losses
from piecework.methods.local.at_work import LocalAtWork
from piecework.models import mlp

LOSS = losses.Softmax()


def network(*, depth: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """depth linear layers of odd width with tanh between them, the same at each call."""
    return mlp(5, [7] * (depth - 1), 3, activation="tanh", seed=seed, dtype=dtype)


def noisy(*, depth: int = 4, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """With dropout and batch normalisation in each block but the last."""
    plain, found = network(depth=depth, dtype=dtype), []
    for layer in plain:
        found.append(layer)
        if isinstance(layer, nn.Tanh):
            found += [nn.BatchNorm1d(7, dtype=dtype), nn.Dropout(0.3)]
    return nn.Sequential(*found)


def rows(n: int = 24, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype)
    return Batch(x, torch.randint(3, (n,), generator=generator), torch.arange(n))


def heads(training: LocalAtWork) -> list[nn.Module | None]:
    return [None if stage.head is None else stage.head.module for stage in training.stages]


def given(training: LocalAtWork, number: int = -1) -> list[list[Tensor]]:
    """By block, what its optimiser was given in the step of this number."""
    found = []
    for stage in training.stages:
        assert isinstance(stage.block.optimizer, Kept)
        found.append(stage.block.optimizer.given[number])
    return found


def given_to_heads(training: LocalAtWork) -> list[list[Tensor]]:
    found = []
    for stage in training.stages:
        if stage.head is not None:
            assert isinstance(stage.head.optimizer, Kept)
            found.append(stage.head.optimizer.given[-1])
    return found


def all_losses(training: LocalAtWork, batch: Batch) -> list[Tensor]:
    """Every block's loss in one graph through the whole network."""
    found, h = [], batch.x
    for stage in training.stages:
        h = stage.block.module(h)
        found.append(LOSS(h if stage.head is None else stage.head.module(h), batch.y))
    return found


def brute_force(training: LocalAtWork, batch: Batch, matrix: Sequence[Sequence[float]]) -> list[list[Tensor]]:
    """sum_j C[k][j] d l_j / d theta_k, block by block, from one graph of everything."""
    judged, found = all_losses(training, batch), []
    for k, stage in enumerate(training.stages):
        total = [torch.zeros_like(one) for one in stage.block.parameters]
        for j in range(k, len(judged)):
            if matrix[k][j]:
                pieces = torch.autograd.grad(judged[j], stage.block.parameters, retain_graph=True)
                total = [one + matrix[k][j] * piece for one, piece in zip(total, pieces, strict=True)]
        found.append(total)
    return found


def worst(found: Iterable[Iterable[Tensor]], wanted: Iterable[Iterable[Tensor]]) -> float:
    """The largest error, relative to the largest gradient of its block."""
    errors = []
    for ours, theirs in zip(found, wanted, strict=True):
        pairs = list(zip(ours, theirs, strict=True))
        scale = max([float(other.detach().norm()) for _, other in pairs], default=0.0) or 1.0
        errors += [float((one.detach() - other.detach()).norm()) / scale for one, other in pairs]
    return max(errors)


def same(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def weights(model: nn.Module) -> list[Tensor]:
    return [one.detach().clone() for one in model.state_dict().values()]
