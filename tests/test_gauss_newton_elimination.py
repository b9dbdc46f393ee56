"""The last linear layer in closed form after each step, against scipy; and where there is no closed form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from jacobian_cases import randn, relative
from piecework.methods.gauss_newton.elimination import eliminate_
from piecework.training import Batch, CannotTrain
from plain_gauss_newton import Quadratic, bind, flat, metrics, named, network, rows


def _features(model: nn.Sequential, x: torch.Tensor, bias: bool) -> np.ndarray[Any, Any]:
    a = model[:-1](x).detach().numpy()
    return np.column_stack([a, np.ones(len(a))]) if bias else a


def _last(model: nn.Sequential, bias: bool) -> np.ndarray[Any, Any]:
    parts = [model[-1].weight.detach(), model[-1].bias.detach()[:, None]] if bias else [model[-1].weight.detach()]
    return torch.cat(parts, 1).numpy().T


@pytest.mark.parametrize("case", ["squared", "squared-3"])
@pytest.mark.parametrize("bias", ["trained", "frozen", "none"])
@pytest.mark.parametrize("tile", [5, 4096])
def test_the_last_layer_is_the_least_squares_optimum(case: str, bias: str, tile: int) -> None:
    batch, outputs = rows(53, case), 3 if case == "squared-3" else 1
    model = network(outputs)
    if bias == "none":
        model[-1] = nn.Linear(5, outputs, bias=False, dtype=torch.float64)
        nn.init.ones_(model[-1].weight)
    elif bias == "frozen":
        model[-1].bias.requires_grad_(False).fill_(0.3)
    training = bind(model, eliminate_output=True, tile=tile, geodesic=False)
    for _ in range(3):
        told = metrics(training, batch)
        wanted = batch.y - (0.3 if bias == "frozen" else 0.0)
        best, *_ = linalg.lstsq(_features(model, batch.x, bias == "trained"), wanted)
        np.testing.assert_allclose(_last(model, bias == "trained"), best, rtol=1e-9, atol=1e-9)
        assert told["loss"] == pytest.approx(float((model(batch.x) - batch.y).square().sum().detach()) / 53, rel=1e-12)
        assert told["stalled"] == 0
    if bias == "frozen":
        assert torch.equal(model[-1].bias, torch.full((outputs,), 0.3, dtype=torch.float64))


def test_classes_are_fitted_by_their_zeros_and_ones() -> None:
    batch, model = rows(53, "softmax"), network(3)
    bind(model, named("squared"), eliminate_output=True).step(batch)
    best, *_ = linalg.lstsq(_features(model, batch.x, True), nn.functional.one_hot(batch.y, 3).double().numpy())
    np.testing.assert_allclose(_last(model, True), best, rtol=1e-9, atol=1e-9)


def test_the_layers_before_it_make_the_step_of_all_weights() -> None:
    """Only the last layer is replaced: the others are where the plain step had put them."""
    batch, model = rows(53), network()
    other = copy.deepcopy(model)
    bind(model, eliminate_output=True, geodesic=False, solver="qr").step(batch)
    start, expected = flat(other), Quadratic.of(other, "squared", batch).step(1e-3)
    assert relative(start[:20] - flat(model)[:20], expected[:20]) < 1e-10
    assert relative(start[20:] - flat(model)[20:], expected[20:]) > 1e-3


def test_with_fewer_rows_than_inputs_it_is_the_optimum_nearest_to_the_present() -> None:
    batch = rows(3)
    model, plain = (network(hidden=(24,), seed=3) for _ in range(2))
    bind(model, eliminate_output=True, geodesic=False, adapt=False, solver="qr").step(batch)
    bind(plain, geodesic=False, adapt=False, solver="qr").step(batch)
    features = _features(plain, batch.x, True)
    change, *_ = linalg.lstsq(features, (batch.y - plain(batch.x)).detach().numpy())
    np.testing.assert_allclose(_last(model, True), _last(plain, True) + change, atol=1e-9)


def test_a_rejected_step_takes_the_last_layer_back() -> None:
    batch, model = rows(53), network()
    with torch.no_grad():
        model[0].weight.mul_(4)
    settings = {"solver": "qr", "damping": 1e-14, "geodesic": False, "max_retries": 1}
    bind(model, eliminate_output=True, **settings).step(batch)
    told, stalled = metrics(bind(model, **settings), batch), 0.0
    assert told["loss"] > 0
    training = bind(model, eliminate_output=True, **settings)
    for _ in range(10):
        before = flat(model)
        told = metrics(training, batch)
        stalled += told["stalled"]
        assert torch.equal(flat(model), before) == bool(told["stalled"])
    assert stalled > 0


def test_it_reaches_what_the_plain_steps_do_not_in_as_many() -> None:
    batch = rows(53)
    ends = []
    for eliminate in (True, False):
        training = bind(network(), eliminate_output=eliminate)
        ends.append([metrics(training, batch)["loss"] for _ in range(3)])
    assert ends[0][0] < ends[1][0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: model.append(nn.Tanh()), "ends in a trainable nn.Linear, and this model ends in Tanh"),
        (lambda model: model[-1].weight.requires_grad_(False), "ends in a trainable nn.Linear"),
    ],
)
def test_a_model_without_a_last_linear_layer_is_refused(change: Any, match: str) -> None:
    model = network()
    change(model)
    with pytest.raises(CannotTrain, match=match):
        bind(model, eliminate_output=True)


class _Squaring(nn.Module):
    """Ends in a layer, but does something with what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x).square()  # type: ignore[no-any-return]


def test_a_module_that_is_no_sequence_is_refused() -> None:
    with pytest.raises(CannotTrain, match=r"eliminate_output needs a sequence of layers.*ends in _Squaring"):
        bind(_Squaring(), eliminate_output=True)


@pytest.mark.parametrize("case", ["softmax", "logistic"])
def test_another_loss_is_refused(case: str) -> None:
    with pytest.raises(CannotTrain, match=f"closed form for the squared loss, not for {case}.*set eliminate_output"):
        bind(network(), named(case), eliminate_output=True)


def _twice() -> nn.Module:
    layer = nn.Linear(3, 3, dtype=torch.float64)
    return nn.Sequential(layer, nn.Tanh(), layer)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("make", [_twice, _tied])
def test_a_last_layer_that_is_used_twice_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(CannotTrain, match="its weights are used there too; set eliminate_output=False"):
        bind(make(), eliminate_output=True)


def test_a_last_layer_over_positions_is_fitted_at_all_of_them() -> None:
    batch, layer = Batch(randn(17, 4, 3), randn(17, 4, 1, seed=1).flatten(1)), nn.Linear(5, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 5, dtype=torch.float64), nn.Tanh(), layer)
    bind(model, eliminate_output=True, geodesic=False).step(batch)
    a = model[:-1](batch.x).detach().reshape(-1, 5).numpy()
    best, *_ = linalg.lstsq(np.column_stack([a, np.ones(len(a))]), batch.y.reshape(-1, 1))
    np.testing.assert_allclose(_last(model, True), best, rtol=1e-9, atol=1e-9)


class _Exp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


def test_inputs_that_overflow_leave_the_last_layer() -> None:
    """In a trial that is rejected then, since its loss is not finite either."""
    model = nn.Sequential(nn.Linear(3, 5), _Exp(), nn.Linear(5, 1)).double()
    training = bind(model, eliminate_output=True)
    with torch.no_grad():
        model[0].weight.fill_(1e4)
    before = flat(model)
    eliminate_(training._objective, rows(53), model[2], 53)
    assert torch.equal(flat(model), before)
