"""Networks of one layer, and the output layer: ridge regression, and the minima of convex losses."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chains import SQUARED, bind, bundled, chain, curved, flat, quarters, sweeps
from piecework import losses
from piecework.training import Batch

close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def test_one_layer_and_one_step_are_ridge_regression() -> None:
    from sklearn.linear_model import Ridge

    batch = curved()
    batch.x[:] = batch.x * torch.tensor([1.0, 7.0, 0.2, 3.0, 1.0], dtype=torch.float64) + 0.5
    model = chain(5, 2)
    bind(model, output_ridge=0.1).step(batch)
    # The penalty of each weight is in units of its input's own mean square; the bias is free.
    size = batch.x.square().sum(0).sqrt()
    floor = 1e-12 * (torch.cat([size, size.new_tensor([len(batch) ** 0.5])]).square().mean())
    theirs = Ridge(alpha=1.0, fit_intercept=True, solver="cholesky")
    weights = (0.1 * size.square() + floor).sqrt()
    theirs.fit((batch.x / weights).numpy(), batch.y.numpy())
    close(model[0].weight.detach(), torch.from_numpy(theirs.coef_) / weights)
    close(model[0].bias.detach(), torch.from_numpy(theirs.intercept_))


def test_one_layer_without_bias_is_the_dense_ridge_formula() -> None:
    batch = curved()
    model = nn.Sequential(nn.Linear(5, 2, bias=False, dtype=torch.float64))
    training = bind(model, output_ridge=0.3)
    training.step(batch)
    gram = batch.x.t() @ batch.x
    expected = batch.y.t() @ batch.x @ torch.linalg.inv(gram + 0.3 * torch.diag(gram.diagonal()))
    close(model[0].weight.detach(), expected)


def test_more_sweeps_of_one_layer_change_nothing() -> None:
    batch = curved()
    training = bind(chain(5, 2))
    training.step(batch)
    once = flat(training.model)
    last = sweeps(training, batch, 3)[-1]
    assert torch.equal(flat(training.model), once)
    assert last["passes"] == 0
    assert last["stalled"] == 1


def _not_separable(classes: int) -> Batch:
    batch = quarters(classes=classes)
    batch.y[::7] = 1 - batch.y[::7].clamp(0, 1)
    return batch


@pytest.mark.parametrize(("name", "outputs"), [("softmax", 4), ("logistic", 1)])
def test_one_layer_and_many_sweeps_reach_the_convex_minimum(name: str, outputs: int) -> None:
    loss, batch = losses.named(name), _not_separable(max(2, outputs))
    rows = sweeps(bind(chain(5, outputs), loss, output_ridge=0.0), batch, 60)
    twin = chain(5, outputs)
    optimizer = torch.optim.LBFGS(twin.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(twin(batch.x), batch.y)
        value.backward()
        return value

    optimizer.step(closure)
    assert rows[-1]["loss"] == pytest.approx(float(closure().detach()), abs=1e-6)


def test_one_layer_with_the_hinge_comes_near_the_linear_program() -> None:
    """The closed-form targets smooth the kinks over a width of 1/(2 beta), so a large beta comes nearer."""
    batch = _not_separable(2)
    training = bind(chain(5, 1), losses.named("hinge"), output_ridge=0.0, gamma=10.0, beta=10.0)
    last, best = sweeps(training, batch, 200)[-1]["loss"], _hinge_by_linear_programming(batch)
    assert best - 1e-9 <= last <= 1.01 * best


def _hinge_by_linear_programming(batch: Batch) -> float:
    from scipy.optimize import linprog

    a = np.concatenate([batch.x.numpy(), np.ones((len(batch), 1))], 1)
    on = batch.y.numpy()[:, None] > 0.5
    # slack >= 1 - a w where y = 1 and slack >= a w where y = 0
    left = np.concatenate([np.where(on, -a, a), -np.eye(len(a))], 1)
    right = np.where(on[:, 0], -1.0, 0.0)
    cost = np.concatenate([np.zeros(6), np.ones(len(a))])
    found = linprog(cost, left, right, bounds=[(None, None)] * 6 + [(0, None)] * len(a))
    return float(found.fun) / len(a)


def test_the_first_step_is_the_refit_on_random_features_and_moves_no_hidden_layer() -> None:
    found = bundled("digits", torch.float64)
    model = chain(64, 24, 10)
    before = model[0].weight.detach().clone()
    training = bind(model)
    training.step(Batch(found.train.x / 16, found.train.y))
    assert torch.equal(model[0].weight.detach(), before)
    a = torch.cat([model[:2](found.train.x / 16), torch.ones(len(found.train), 1, dtype=torch.float64)], 1).detach()
    gram = a.t() @ a
    ridge = 0.1 * gram.diagonal() + 1e-12 * gram.diagonal().mean()
    ridge[-1] = 1e-12 * gram.diagonal().mean()
    y = SQUARED.targets(found.train.y, 10, torch.float64)
    expected = torch.linalg.solve(gram + torch.diag(ridge), a.t() @ y).t()
    close(model[2].weight.detach(), expected[:, :-1])
    close(model[2].bias.detach(), expected[:, -1])
