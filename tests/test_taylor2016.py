"""Algorithm 1 as published: its multiplier, its fixed points, its objective, and the two losses it reports."""

from __future__ import annotations

import io
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chains import bind, chain, deployed_loss, flat, quarters, randn, sweeps
from piecework import losses
from piecework.training import Batch

HINGE = losses.named("hinge")
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def _bind(model: nn.Module, loss: Any = HINGE, **settings: Any) -> Any:
    return bind(model, loss, mode="taylor2016", **settings)


def _unbiased(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """As in the paper: no biases."""
    layers: list[nn.Module] = []
    for l, (fan_in, fan_out) in enumerate(pairwise(widths)):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=False, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(randn(fan_out, fan_in, seed=l) * (2 / fan_in) ** 0.5)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def _binary(rows: int = 211, features: int = 6) -> Batch:
    x = randn(rows, features)
    return Batch(x, (x[:, 0] * x[:, 1] + 0.3 * x[:, 2] > 0).long())


@pytest.mark.parametrize("name", ["squared", "softmax", "logistic"])
def test_the_published_multiplier_goes_half_way_to_minus_the_gradient(name: str) -> None:
    loss, outputs = losses.named(name), 1 if name == "logistic" else 4
    batch = quarters(classes=max(2, outputs))
    training = _bind(chain(5, 8, outputs), loss, warm_sweeps=2)
    for _ in range(5):
        before = training.dual.clone() if training.sweeps else torch.zeros(211, outputs, dtype=torch.float64)
        training.step(batch)
        if training.sweeps <= 2:
            assert not bool(training.dual.any())
        else:
            g = loss.gradient(training.z[-1], batch.y)
            torch.testing.assert_close(training.dual, (before - g) / 2, rtol=0, atol=1e-12)


def test_the_multiplier_of_the_hinge_stays_in_its_interval() -> None:
    batch = _binary()
    training = _bind(chain(6, 8, 1), warm_sweeps=1)
    for _ in range(10):
        training.step(batch)
        on, off = training.dual[batch.y == 1], training.dual[batch.y == 0]
        assert float(on.min()) >= -1e-12
        assert float(on.max()) <= 1 + 1e-12
        assert float(off.min()) >= -1 - 1e-12
        assert float(off.max()) <= 1e-12


def _feasible(model: nn.Sequential, batch: Batch, loss: Any) -> dict[str, Any]:
    """The state of a forward pass, with minus a subgradient of the loss as the multiplier."""
    a: list[Tensor] = []
    z: list[Tensor] = []
    now = batch.x
    with torch.no_grad():
        for layer in model:
            now = layer(now)
            (z if isinstance(layer, nn.Linear) else a).append(now)
    return {"a": a, "z": z, "dual": -loss.gradient(z[-1], batch.y), "sweeps": 1}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", ["hinge", "squared", "logistic"])
def test_every_feasible_point_is_fixed(name: str, biases: bool) -> None:
    """The defect of the published multiplier: the forward pass of random weights never moves."""
    loss, batch = losses.named(name), _binary()
    model = chain(6, 8, 5, 1) if biases else _unbiased(6, 8, 5, 1)
    start = flat(model)
    training = _bind(model, loss, warm_sweeps=0)
    training.load_state_dict(_feasible(model, batch, loss))
    rows = sweeps(training, batch, 50)
    torch.testing.assert_close(flat(model), start, rtol=0, atol=1e-10)
    assert rows[-1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-10)
    assert rows[-1]["loss"] > 0.1


def test_the_same_point_moves_at_once_in_the_default_mode() -> None:
    batch = _binary()
    model = chain(6, 8, 5, 1)
    start = flat(model)
    sweeps(bind(model, HINGE, multiplier=True), batch, 2)
    assert float((flat(model) - start).abs().max()) > 0.01


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.LeakyReLU])
@pytest.mark.parametrize("name", ["hinge", "squared", "softmax"])
def test_without_a_multiplier_no_single_update_raises_the_objective(name: str, activation: type[nn.Module]) -> None:
    loss, batch = losses.named(name), quarters()
    training = _bind(_unbiased(5, 8, 7, 4, activation=activation), loss, warm_sweeps=10**6)
    training.step(batch)
    now = float(training.objective(batch.y))
    for _ in range(6):
        for update in (
            lambda: training.update_w(0),
            lambda: training.update_a(1),
            lambda: training.update_z(0),
            lambda: training.update_w(1),
            lambda: training.update_a(2),
            lambda: training.update_z(1),
            lambda: training.update_w(2),
            lambda: training.update_output(batch.y),
        ):
            update()
            after = float(training.objective(batch.y))
            assert after <= now * (1 + 1e-12)
            now = after
    assert not bool(training.dual.any())


def test_each_update_is_the_published_formula() -> None:
    batch = _binary()
    training = _bind(_unbiased(6, 8, 5, 1), gamma=10.0, beta=1.0)
    sweeps(training, batch, 2)
    training.update_w(1)
    close(training.weights[1], training.z[1].t() @ torch.linalg.pinv(training.a[1].t()), atol=1e-8)
    w, z_above, h = training.weights[1], training.z[1], training.z[0].clamp_min(0)
    training.update_a(1)
    system = w.t() @ w + 10 * torch.eye(8, dtype=torch.float64)
    close(training.a[1], torch.linalg.solve(system, (z_above @ w + 10 * h).t()).t())
    training.update_output(batch.y)
    m = training.forward(2)
    close(training.z[-1], HINGE.prox(m, batch.y, 1.0, training.dual))


def test_alternating_updates_of_a_linear_network_converge_to_the_joint_least_squares() -> None:
    batch = Batch(randn(53, 6), randn(53, 2, seed=4))
    training = _bind(_unbiased(6, 5, 2, activation=nn.Identity), losses.named("squared"), gamma=3.0, beta=2.0)
    training.step(batch)
    for _ in range(2000):
        training.update_a(1)
        training.update_z(0)
        training.update_output(batch.y)
    lower, upper = training.weights
    eye, none = partial(torch.eye, dtype=torch.float64), partial(torch.zeros, dtype=torch.float64)
    # unknowns a (5), z_1 (5), z_2 (2) of a sample, and a row for each square of the objective
    system = torch.cat(
        [
            3**0.5 * torch.cat([eye(5), -eye(5), none(5, 2)], 1),
            2**0.5 * torch.cat([none(5, 5), eye(5), none(5, 2)], 1),
            2**0.5 * torch.cat([-upper, none(2, 5), eye(2)], 1),
            torch.cat([none(2, 10), eye(2)], 1),
        ]
    )
    right = torch.cat([none(53, 5), 2**0.5 * batch.x @ lower.t(), none(53, 2), batch.y], 1)
    best = torch.linalg.lstsq(system, right.t()).solution.t()
    found = torch.cat([training.a[1], training.z[0], training.z[1]], 1)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-8)


def test_the_bias_is_taken_out_of_the_activation_update() -> None:
    batch = _binary()
    training = _bind(chain(6, 8, 5, 1))
    sweeps(training, batch, 2)
    w = training.weights[1]
    v, b = w[:, :-1], w[:, -1]
    training.update_a(1)
    system = v.t() @ v + 10 * torch.eye(8, dtype=torch.float64)
    right = (training.z[1] - b) @ v + 10 * training.z[0].clamp_min(0)
    close(training.a[1], torch.linalg.solve(system, right.t()).t())


def test_the_relaxed_and_the_deployed_loss_are_two_metrics() -> None:
    batch = _binary()
    model = chain(6, 8, 5, 1)
    training = _bind(model)
    for _ in range(4):
        (metrics,) = sweeps(training, batch, 1)
        assert metrics["loss"] == pytest.approx(deployed_loss(model, HINGE, batch), rel=1e-10)
        assert metrics["relaxed_loss"] == pytest.approx(float(HINGE(training.z[-1], batch.y)), rel=1e-12)
        assert metrics["augmented"] == pytest.approx(float(training.objective(batch.y)) / len(batch), rel=1e-12)
        assert abs(metrics["loss"] - metrics["relaxed_loss"]) > 0.01


def test_the_gaps_are_those_of_the_constraints() -> None:
    batch = _binary()
    training = _bind(chain(6, 8, 5, 1))
    metrics = sweeps(training, batch, 3)[-1]
    gaps = [training.z[l] - training.forward(l) for l in range(3)]
    size = sum(float(z.square().sum()) for z in training.z)
    assert metrics["gap_z"] == pytest.approx((sum(float(g.square().sum()) for g in gaps) / size) ** 0.5, rel=1e-10)
    feasible = _bind(chain(6, 8, 5, 1), warm_sweeps=0)
    feasible.load_state_dict(_feasible(feasible.model, batch, HINGE))
    metrics = sweeps(feasible, batch, 1)[-1]
    assert metrics["gap_a"] < 1e-12
    assert metrics["gap_z"] < 1e-12


def test_the_start_is_standard_normal_and_its_seed_decides_it() -> None:
    batch = _binary(977)
    trainings = [_bind(chain(6, 24, 5, 1), seed=seed) for seed in (0, 0, 1)]
    for training in trainings:
        training._start(batch.x)
    one, same, other = trainings
    assert all(torch.equal(a, b) for a, b in zip(one.z, same.z, strict=True))
    assert not torch.equal(one.z[0], other.z[0])
    assert abs(float(one.z[0].mean())) < 0.02
    assert abs(float(one.z[0].std()) - 1) < 0.02
    assert not torch.equal(one.a[1], one.z[0])


def test_it_learns_something_from_the_published_start() -> None:
    batch = _binary(501)
    model = chain(6, 24, 1)
    training = _bind(model)
    sweeps(training, batch, 40)
    with torch.no_grad():
        reached = float((HINGE.decide(model(batch.x)) == batch.y).double().mean())
    majority = float(torch.bincount(batch.y).max()) / len(batch)
    assert reached > majority + 0.1


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_run_resumes_to_the_bit(stop: int) -> None:
    batch = _binary()
    whole = _bind(chain(6, 8, 5, 1), warm_sweeps=2)
    expected = sweeps(whole, batch, 6)
    half = _bind(chain(6, 8, 5, 1), warm_sweeps=2)
    rows = sweeps(half, batch, stop)
    file = io.BytesIO()
    torch.save({"model": half.model.state_dict(), "training": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = chain(6, 8, 5, 1, seed=9)
    model.load_state_dict(saved["model"])
    resumed = _bind(model, warm_sweeps=2)
    resumed.load_state_dict(saved["training"])
    rows += sweeps(resumed, batch, 6 - stop)
    assert rows == expected
    assert torch.equal(flat(resumed.model), flat(whole.model))


def test_single_precision_follows_double_precision() -> None:
    batch = _binary()
    found = []
    for dtype in (torch.float32, torch.float64):
        training = _bind(chain(6, 8, 1, dtype=dtype), losses.named("squared"))
        found.append(sweeps(training, Batch(batch.x.to(dtype), batch.y), 5)[-1]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
