"""Nonlinear conjugate gradients: scipy's minima, strong Wolfe steps, any number of ranks, resumable to the bit."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from piecework.group import Group, Solo
from piecework.losses import Logistic, Softmax, Squared
from piecework.methods import CG
from piecework.methods.cg import strong_wolfe
from piecework.models import mlp
from piecework.nn import Sign, Standardise
from piecework.testing import threads
from piecework.training import BadInput, Batch, CannotTrain


def _rows(num: int = 53, *, outputs: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 5, generator=generator, dtype=torch.float64)
    turn = torch.randn(5, outputs, generator=generator, dtype=torch.float64)
    return Batch(x, torch.sin(x @ turn))


def _network(seed: int = 1, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return mlp(5, [7], 2, activation="tanh", seed=seed, dtype=dtype)


def _linear() -> nn.Linear:
    model = nn.Linear(5, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    return model


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).clone()


def _by_scipy(model: nn.Module, batch: Batch, loss: Any, steps: int, gtol: float) -> Any:
    parameters = list(model.parameters())

    def value(weights: np.ndarray) -> tuple[float, np.ndarray]:
        nn.utils.vector_to_parameters(torch.from_numpy(weights.copy()), parameters)
        total = loss(model(batch.x), batch.y)
        gradients = torch.autograd.grad(total, parameters)
        return float(total.detach()), torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy()

    start = _weights(model).numpy()
    return minimize(value, start, jac=True, method="CG", options={"maxiter": steps, "gtol": gtol})


def test_a_convex_problem_ends_where_scipy_ends_in_about_as_many_steps() -> None:
    batch = _rows(outputs=1)
    classes = Batch(batch.x, (batch.y[:, 0] > 0).long())
    for loss, rows in ((Squared(), batch), (Logistic(), classes)):
        theirs = _by_scipy(_linear(), rows, loss, 300, 1e-6)
        training, taken = CG().bind(_linear(), loss, group=Solo()), 0
        while taken < 300:
            metrics = training.step(rows)
            taken += 1
            if float(metrics["gradient_norm"]) < 1e-6:
                break
        torch.testing.assert_close(_weights(training.model), torch.from_numpy(theirs.x), rtol=0, atol=1e-4)
        assert float(metrics["loss"]) == pytest.approx(theirs.fun, abs=1e-9)
        # scipy's bound of 1 on the first trial happens to make its searches on the quadratic exact.
        assert taken <= 2 * theirs.nit + 5
        assert float(metrics["evaluations"]) <= 2 * theirs.nfev + 12


def test_a_network_gets_as_far_as_with_scipy() -> None:
    batch, ours, theirs = _rows(), [], []
    for seed in range(3):
        training = CG().bind(_network(seed), Squared(), group=Solo())
        metrics = [training.step(batch) for _ in range(60)][-1]
        found = _by_scipy(_network(seed), batch, Squared(), 60, 0.0)
        ours.append((float(metrics["loss"]), float(metrics["evaluations"])))
        theirs.append((found.fun, found.nfev))
    (loss, passes), (their_loss, their_passes) = np.median(ours, axis=0), np.median(theirs, axis=0)
    assert loss <= 1.5 * their_loss
    assert passes <= 1.2 * their_passes


def test_on_a_quadratic_with_exact_searches_it_ends_after_as_many_steps_as_dimensions() -> None:
    batch = _rows(outputs=1)
    training = CG(c1=1e-6, c2=1e-5, max_line_search=60).bind(_linear(), Squared(), group=Solo())
    norms = [float(training.step(batch)["gradient_norm"]) for _ in range(6)]
    assert norms[5] < 1e-6 * norms[0]
    assert norms[3] > 1e-6 * norms[0]


def _wave(turn: float, tilt: float) -> Callable[[float], tuple[float, float]]:
    def along(step: float) -> tuple[float, float]:
        value = math.cos(turn * step + 1.0) + tilt * step * step
        return value, -turn * math.sin(turn * step + 1.0) + 2 * tilt * step

    return along


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    turn=st.floats(0.1, 30),
    tilt=st.floats(0.0, 3.0),
    first=st.floats(-6, 3).map(lambda power: 10**power),
    c2=st.sampled_from([0.1, 0.4, 0.9]),
)
def test_a_search_ends_at_a_strong_wolfe_step(turn: float, tilt: float, first: float, c2: float) -> None:
    along, c1 = _wave(turn, tilt), 1e-4
    value, slope = along(0.0)
    step = strong_wolfe(along, value, slope, first, c1=c1, c2=c2, trials=100)
    found, tangent = along(step)
    assert step > 0
    assert found <= value + c1 * step * slope
    assert abs(tangent) <= c2 * abs(slope)


def test_a_search_out_of_trials_gives_the_best_it_has_seen() -> None:
    def along(step: float) -> tuple[float, float]:
        return (step - 3.0) ** 2, 2 * (step - 3.0)

    assert strong_wolfe(along, 9.0, -6.0, 0.1, c1=1e-4, c2=0.01, trials=1) == 0.1
    assert strong_wolfe(along, 9.0, -6.0, 50.0, c1=1e-4, c2=0.01, trials=1) == 0.0
    rising = [strong_wolfe(lambda step: (step, 1.0), 0.0, -1.0, 1.0, c1=1e-4, c2=0.4, trials=9)]
    lost = [strong_wolfe(lambda step: (math.nan, math.nan), 0.0, -1.0, 1.0, c1=1e-4, c2=0.4, trials=9)]
    assert rising == lost == [0.0]


def test_a_search_backs_out_of_what_is_not_a_number() -> None:
    def along(step: float) -> tuple[float, float]:
        return (math.inf, math.nan) if step > 4 else ((step - 3.0) ** 2, 2 * (step - 3.0))

    step = strong_wolfe(along, 9.0, -6.0, 1e6, c1=1e-4, c2=0.4, trials=25)
    assert abs(along(step)[1]) <= 0.4 * 6


def test_multiplying_the_loss_by_a_power_of_two_changes_no_bit() -> None:
    class Eightfold(Squared):
        def total(self, z: Tensor, y: Tensor) -> Tensor:
            return 8 * super().total(z, y)

    batch, found = _rows(), []
    for loss in (Squared(), Eightfold()):
        training = CG().bind(_network(), loss, group=Solo())
        training.step(batch)  # the length of the first trial step is the one thing that knows the scale
        training.model.load_state_dict(_network(seed=4).state_dict())
        training._direction = None
        start = training._objective.evaluate(batch)
        assert training._first_trial(start, -(start.norm**2)) * start.norm == pytest.approx(1.0)
        for _ in range(9):
            training.step(batch)
        found.append(_weights(training.model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-8)


def test_the_loss_never_rises_and_the_end_costs_no_passes() -> None:
    batch = _rows(outputs=1)
    training = CG().bind(_linear(), Squared(), group=Solo())
    metrics = [training.step(batch) for _ in range(90)]
    losses = [float(one["loss"]) for one in metrics]
    assert losses == sorted(losses, reverse=True)
    assert float(metrics[-1]["stalled"]) == 1
    assert float(metrics[-1]["evaluations"]) == float(metrics[-2]["evaluations"])
    assert float(training.step(_rows(outputs=1, seed=9))["stalled"]) == 0


def test_metrics_are_plain_and_true() -> None:
    batch, model = _rows(), _network()
    training = CG().bind(model, Squared(), group=Solo())
    for _ in range(3):
        metrics = training.step(batch)
    assert set(metrics) == {"loss", "gradient_norm", "evaluations", "stalled"}
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert float(metrics["loss"]) == pytest.approx(float(Squared()(model(batch.x), batch.y).detach()), rel=1e-12)


@pytest.mark.parametrize("stop", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stopped_and_resumed_it_is_one_run_to_the_bit(stop: int, dtype: torch.dtype) -> None:
    rows = _rows()
    batch = Batch(rows.x.to(dtype), rows.y.to(dtype))
    whole = CG().bind(_network(dtype=dtype), Squared(), group=Solo())
    wanted = [whole.step(batch) for _ in range(15)]
    first = CG().bind(_network(dtype=dtype), Squared(), group=Solo())
    for _ in range(stop):
        first.step(batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = CG().bind(_network(seed=5, dtype=dtype), Squared(), group=Solo())
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert [second.step(batch) for _ in range(15 - stop)] == wanted[stop:]
    assert torch.equal(_weights(second.model), _weights(whole.model))


def _on_ranks(group: Group, batch: Batch, cuts: list[int], steps: int) -> tuple[Tensor, int]:
    rows = slice(cuts[group.rank], cuts[group.rank + 1])
    model = _network(seed=1 + group.rank)
    training = CG().bind(model, Squared(), group=group)
    own = Batch(batch.x[rows], batch.y[rows])
    metrics = [training.step(own) for _ in range(steps)]
    return _weights(model), int(metrics[-1]["evaluations"])


@pytest.mark.parametrize("cuts", [[0, 20, 53], [0, 53, 53], [0, 5, 22, 53], [0, 0, 53, 53]])
def test_ranks_with_uneven_or_no_rows_take_the_steps_of_one(cuts: list[int]) -> None:
    batch = _rows()
    alone, passes = _on_ranks(Solo(), batch, [0, 53], 8)
    for weights, counted in threads(len(cuts) - 1, partial(_on_ranks, batch=batch, cuts=cuts, steps=8)):
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-10)
        assert counted == passes


def test_raw_pixels_and_three_classes_will_do() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (61, 24), generator=generator, dtype=torch.uint8)
    scaling = Standardise(x.double().mean(0), x.double().std(0))
    model = nn.Sequential(scaling, mlp(24, [5], 3, dtype=torch.float64))
    training = CG().bind(model, Softmax(), group=Solo())
    metrics = [training.step(Batch(x, (x[:, 0] // 86).long())) for _ in range(40)]
    assert float(metrics[-1]["loss"]) < 0.1 * float(metrics[0]["loss"])


def test_a_start_that_is_not_a_number_stays_and_says_so() -> None:
    batch, model = _rows(), _network()
    with torch.no_grad():
        next(model.parameters()).fill_(math.inf)
    before = _weights(model)
    training = CG().bind(model, Squared(), group=Solo())
    assert float(training.step(batch)["stalled"]) == 1
    assert torch.equal(_weights(model), before)


def test_what_it_cannot_train_is_refused_in_a_sentence() -> None:
    for model, words in (
        (nn.Flatten(), "cg found nothing to train"),
        (nn.Sequential(nn.Linear(5, 2), nn.Dropout(0.5)), "cg compares the loss .* layer 1 draws random numbers"),
        (nn.Sequential(nn.Linear(5, 4), Sign(), nn.Linear(4, 2)), r"layer 1 \(Sign\)"),
    ):
        with pytest.raises(CannotTrain, match=words):
            CG().bind(model, Squared(), group=Solo())


def test_settings_that_mean_nothing_and_foreign_states_are_refused() -> None:
    for settings_ in ({"c1": 0.0}, {"c1": 0.5}, {"c2": 1.0}, {"max_line_search": 0}, {"tile": 0}):
        with pytest.raises(BadInput, match=next(iter(settings_))):
            CG(**settings_)
    other = CG().bind(mlp(5, [3], 2, dtype=torch.float64), Squared(), group=Solo())
    other.step(_rows())
    with pytest.raises(BadInput, match="trainable numbers"):
        CG().bind(_network(), Squared(), group=Solo()).load_state_dict(other.state_dict())
