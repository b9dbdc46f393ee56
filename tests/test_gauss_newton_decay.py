"""Weight decay in Gauss-Newton: an L2 penalty beside the loss, against dense least squares and ridge regression."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from jacobian_cases import randn, relative
from piecework.batches import MiniBatches
from piecework.group import Group, Solo
from piecework.methods.gauss_newton.choice import SOLVERS
from piecework.testing import threads
from piecework.training import BadInput, Batch
from plain_gauss_newton import OUTPUTS, Quadratic, bind, direction, flat, metrics, named, network, plain, rows

DECAY, DAMPING = 3e-3, 1e-2
TIGHT = {"weight_decay": DECAY, "damping": DAMPING, "inner_tolerance": 1e-12}


def _expected(model: nn.Module, case: str, batch: Batch, momentum: Tensor | None = None) -> Tensor:
    """(J^T J + (damping + decay) I) d = J^T s + decay theta + damping momentum, dense."""
    here = Quadratic.of(model, case, batch)
    damping, decay = DAMPING * here.unit, DECAY * len(batch)
    right = here.slope + decay * flat(model)
    right = right if momentum is None else right + damping * momentum
    return here.solve(right, damping + decay)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", ["squared", "squared-3", "softmax"])
def test_a_step_is_that_of_loss_and_penalty(solver: str, case: str) -> None:
    model, batch = network(OUTPUTS[case]), rows(53, case)
    found, _ = direction(model, named(case), batch, **plain(solver=solver, **TIGHT))
    assert relative(found, _expected(model, case.removesuffix("-3"), batch)) < 1e-8


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_so_is_a_step_on_a_sample_with_momentum_or_without(solver: str, momentum: float) -> None:
    batch, model, lr = rows(53), network(), 0.05
    training = bind(model, solver=solver, sample_rows=24, adapt=False, momentum=momentum, lr=lr, **TIGHT)
    samples = MiniBatches(batch, data="same", rank=0, size=1, batch_size=24, seed=0)
    phi = torch.zeros_like(flat(model))
    for step in range(4):
        before = flat(model)
        phi = _expected(model, "squared", samples.batch(step), momentum * phi)
        length = lr * (1 - momentum ** (2 * (step + 1))) ** -0.5 if momentum else lr
        training.step(batch)
        assert relative(before - flat(model), length * phi) < 1e-8


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_linear_network_becomes_ridge_regression(solver: str) -> None:
    """n (mean loss + decay/2 |w|^2) is scikit-learn's |z - y|^2 + alpha |w|^2 with alpha = n decay / 2."""
    x, y = randn(40, 6, seed=3), randn(40, 2, seed=4)
    model = nn.Linear(6, 2, bias=False).double()
    training = bind(model, solver=solver, **TIGHT)
    told = [metrics(training, Batch(x, y)) for _ in range(12)]
    ridge = Ridge(alpha=40 * DECAY / 2, fit_intercept=False, solver="svd").fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(model.weight.detach().numpy(), ridge.coef_, rtol=1e-7, atol=1e-9)
    assert told[0]["gain_ratio"] == pytest.approx(1, abs=1e-9)  # nothing bends here
    assert told[-1]["loss"] == pytest.approx(float((model(x) - y).square().sum().detach()) / 40, rel=1e-12)


@pytest.mark.parametrize("settings", [{}, {"solver": "qr"}, {"solver": "cg"}, {"geodesic": False}])
def test_loss_and_penalty_together_never_rise_and_end_where_their_gradient_is_nothing(settings: dict[str, Any]) -> None:
    batch, model = rows(53), network(hidden=(9,))
    with torch.no_grad():
        model[0].weight.mul_(5)

    def objective() -> Tensor:
        data = (model(batch.x) - batch.y).square().sum() / 53
        return data + DECAY / 2 * torch.cat([p.reshape(-1) for p in model.parameters()]).square().sum()

    training = bind(model, weight_decay=DECAY, inner_tolerance=1e-10, **settings)
    at = [float(objective().detach())]
    for _ in range(150):
        training.step(batch)
        at.append(float(objective().detach()))
    assert all(after <= before * (1 + 1e-14) for before, after in itertools.pairwise(at))
    gradient = torch.autograd.grad(objective(), list(model.parameters()))
    assert float(torch.cat([one.reshape(-1) for one in gradient]).norm()) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_the_eliminated_layer_is_its_ridge_regression(bias: bool) -> None:
    batch, model = rows(53, "squared-3"), network(3)
    if not bias:
        model[-1] = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    training = bind(model, eliminate_output=True, weight_decay=DECAY, geodesic=False)
    told = metrics(training, batch)
    a = model[:-1](batch.x).detach()
    a = torch.cat([a, torch.ones(53, 1, dtype=a.dtype)], 1) if bias else a
    best = torch.linalg.solve(a.t() @ a + 53 * DECAY / 2 * torch.eye(a.shape[1], dtype=a.dtype), a.t() @ batch.y)
    found = torch.cat([model[-1].weight, model[-1].bias[:, None]], 1) if bias else model[-1].weight
    torch.testing.assert_close(found.detach().t(), best, rtol=1e-9, atol=1e-10)
    assert told["stalled"] == 0


def _train(group: Group, **settings: Any) -> Tensor:
    sizes = {1: (53,), 3: (20, 0, 33)}[group.size]
    start = sum(sizes[: group.rank])
    part, batch, model = slice(start, start + sizes[group.rank]), rows(53, "squared-3"), network(3)
    training = bind(model, named("squared"), group=group, **TIGHT, **settings)
    for _ in range(3):
        training.step(Batch(batch.x[part], batch.y[part]))
    return flat(model)


@pytest.mark.parametrize("settings", [{"solver": one} for one in SOLVERS] + [{"eliminate_output": True}])
def test_ranks_decay_alike(settings: dict[str, Any]) -> None:
    work = partial(_train, **settings)
    alone = work(Solo())
    for one in threads(3, work):
        torch.testing.assert_close(one, alone, rtol=0, atol=1e-8)


def test_float32_follows_float64() -> None:
    batch, model = rows(53), network()
    single = bind(copy.deepcopy(model).float(), weight_decay=DECAY)
    double = bind(model, weight_decay=DECAY)
    for _ in range(4):
        single.step(Batch(batch.x.float(), batch.y.float()))
        double.step(batch)
    assert relative(flat(single.model).double(), flat(model)) < 1e-3


def test_a_parameter_that_nothing_depends_on_decays() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.spare = network(), nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.net(x)
            return z

    model = Spare()
    training = bind(model, weight_decay=DECAY)
    with pytest.warns(UserWarning, match="only lets it decay"):
        training.step(rows(53))
    assert float(model.spare.detach().max()) < 1


@pytest.mark.parametrize("value", [-1e-3, math.inf, math.nan])
def test_a_decay_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(BadInput, match="weight_decay must be at least 0"):
        bind(network(), weight_decay=value)


@pytest.mark.parametrize("setting", [{"weight_decay": 1e-3}, {"damping": 0.1}, {"solver": "qr"}, {"sample_rows": 8}])
def test_the_published_algorithm_has_no_such_setting(setting: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"the published algorithm has no {next(iter(setting))}"):
        bind(network(), faithful=True, **setting)
