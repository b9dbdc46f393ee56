"""Steps on sampled rows: SPRING's minimum, the schedule, the full steps at the end, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jacobian_cases import relative
from piecework import Solo
from piecework.batches import MiniBatches
from piecework.methods.gauss_newton.choice import SOLVERS
from piecework.methods.gauss_newton.kronecker import LayerFactors
from piecework.methods.gauss_newton.objective import LeastSquares
from piecework.methods.gauss_newton.sampled import EASE, RAISE, rate
from piecework.training import BadInput, Batch, DidNotSolve
from plain_gauss_newton import OUTPUTS, SQUARED, Quadratic, bind, direction, flat, metrics, named, network, plain, rows

SAMPLE = {"sample_rows": 24, "damping": 1e-2, "inner_tolerance": 1e-12}
FIXED = {**SAMPLE, "adapt": False}
KFAC = {"solver": "kfac", "sample_rows": 24, "damping": 1e-2, "adapt": False}


def _samples(batch: Batch, size: int = 24, *, seed: int = 0) -> MiniBatches:
    return MiniBatches(batch, data="same", rank=0, size=1, batch_size=size, seed=seed)


def _move(training: Any, batch: Batch) -> Tensor:
    before = flat(training.model)
    training.step(batch)
    return before - flat(training.model)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", ["squared", "softmax"])
def test_without_momentum_it_is_the_plain_step_on_the_sample(solver: str, case: str) -> None:
    """Over an epoch whose last sample is ragged (24, 24 and 5 rows): each as if its rows were alone."""
    batch, model = rows(53, case), network(OUTPUTS[case])
    damping = 1e-2 if case == "squared" else 3.0  # untested steps are too long for softmax with less
    training = bind(model, named(case), solver=solver, **{**FIXED, "damping": damping})
    assert [len(_samples(batch).batch(step)) for step in range(4)] == [24, 24, 5, 24]
    for step in range(4):
        alone = copy.deepcopy(model)
        sample = _samples(batch).batch(step)
        found = _move(training, batch)
        settings = plain(solver=solver, damping=damping, inner_tolerance=1e-12)
        expected, _ = direction(alone, named(case), sample, **settings)
        assert relative(found, expected) < 1e-10
        assert relative(found, Quadratic.of(alone, case, sample).step(damping)) < 1e-8


def test_another_seed_draws_other_rows() -> None:
    batch = rows(53)
    first, second = (_move(bind(network(), seed=seed, **FIXED), batch) for seed in (0, 1))
    assert relative(first, second) > 0.01
    sample = _samples(batch, seed=1).batch(0)
    assert relative(second, Quadratic.of(network(), "squared", sample).step(1e-2)) < 1e-8


@pytest.mark.parametrize("momentum", [0.3, 0.95])
@pytest.mark.parametrize("solver", ["exact", "qr", "cholesky", "cg"])
def test_with_momentum_it_is_the_minimum_of_spring(momentum: float, solver: str) -> None:
    """argmin |J phi - s|^2 + damping |phi - momentum phi_before|^2, as stacked least squares; 1 / (1 - mu^2t)^(1/2)."""
    batch, model, lr = rows(53), network(), 0.05
    training = bind(model, solver=solver, momentum=momentum, lr=lr, **FIXED)
    phi = torch.zeros_like(flat(model))
    for step in range(5):
        sample = _samples(batch).batch(step)
        here = Quadratic.of(model, "squared", sample)
        j, s = 2**0.5 * here.jacobian.flatten(0, 1), here.gradient.reshape(-1) / 2**0.5
        root = (1e-2 * here.unit) ** 0.5
        stacked = torch.cat([j, root * torch.eye(len(phi), dtype=phi.dtype)])
        phi = torch.linalg.lstsq(stacked, torch.cat([s, root * momentum * phi])[:, None]).solution[:, 0]
        unbiased = phi / (1 - momentum ** (2 * (step + 1))) ** 0.5
        assert relative(_move(training, batch), lr * unbiased) < (1e-10 if solver != "cg" else 1e-8)


def test_one_iteration_with_the_factors_of_the_samples_so_far() -> None:
    """Means of two samples at the second step, each at the weights it was seen at; weight decay in the right side."""
    batch, model, decay = rows(53), network(), 1e-2
    training = bind(model, **{**KFAC, "weight_decay": decay})
    layers, objective = LayerFactors(), LeastSquares(model, SQUARED, Solo(), weight_decay=decay)
    for step in range(4):
        sample = _samples(batch).batch(step)
        point, jacobian = objective.linearised(sample)
        layers.look(jacobian, Solo())
        j = jacobian.rows(0, len(sample))
        damping = 1e-2 * float(j.square().sum(1).mean()) + decay * len(sample)
        right = j.t() @ point.s + decay * len(sample) * point.weights
        z = layers.of(jacobian, len(sample)).at(damping)(right)
        expected = float(right @ z) / float((j @ z).square().sum() + damping * (z @ z)) * z
        assert relative(_move(training, batch), expected) < 1e-10


def test_kronecker_factors_with_a_tolerance_solve_the_sample() -> None:
    batch, model = rows(53), network()
    training = bind(model, solver="kfac", momentum=0.5, lr=0.1, **FIXED)
    twin = bind(copy.deepcopy(model), solver="exact", momentum=0.5, lr=0.1, **FIXED)
    for _ in range(4):
        assert relative(_move(training, batch), _move(twin, batch)) < 1e-7


def test_one_iteration_has_no_momentum_and_no_residual() -> None:
    with pytest.raises(BadInput, match="one iteration of solver kfac has no momentum; leave it out, or give inner_t"):
        bind(network(), **KFAC, momentum=0.5)
    told = metrics(bind(network(), **KFAC), rows(53))
    assert told["iterations"] == 1
    assert "linear_residual" not in told


def test_the_rate_is_held_and_then_falls() -> None:
    assert [rate(step, 0.5, 8, 0.5) for step in range(9)] == [0.5] * 5 + [0.375, 0.25, 0.125, 0.0]
    batch, model = rows(53), network()
    training = bind(model, solver="exact", sample_steps=4, hold=0.5, **FIXED)
    for step, length in enumerate([1.0, 1.0, 1.0, 0.5]):
        expected = Quadratic.of(model, "squared", _samples(batch).batch(step)).step(1e-2)
        assert relative(_move(training, batch), length * expected) < 1e-9


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hold": 1.0, "sample_steps": 5}, r"hold must be in \[0, 1\), got 1"),
        ({"hold": -0.1, "sample_steps": 5}, r"hold must be in \[0, 1\), got -0.1"),
        ({"hold": 0.5}, "hold is a part of sample_steps; give them too, or leave it out"),
    ],
)
def test_a_hold_of_nothing_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        bind(network(), sample_rows=24, **settings)


def test_the_rate_falls_linearly_to_nothing() -> None:
    batch, model = rows(53), network()
    training = bind(model, solver="exact", lr=0.5, sample_steps=4, **FIXED)
    for step, length in enumerate([0.5, 0.375, 0.25, 0.125]):
        expected = Quadratic.of(model, "squared", _samples(batch).batch(step)).step(1e-2)
        assert relative(_move(training, batch), length * expected) < 1e-9


def test_without_an_end_the_rate_stays() -> None:
    batch, model = rows(24), network()
    training = bind(model, solver="exact", lr=0.5, **FIXED)
    for _ in range(3):
        expected = Quadratic.of(model, "squared", batch).step(1e-2)
        assert relative(_move(training, batch), 0.5 * expected) < 1e-9


def test_the_end_is_damped_steps_on_all_rows() -> None:
    batch, model = rows(53), network()
    training = bind(model, solver="qr", sample_steps=3, **SAMPLE)
    for _ in range(3):
        assert "stalled" not in metrics(training, batch)
    twin = bind(copy.deepcopy(model), solver="qr", damping=1e-2, inner_tolerance=1e-12)
    for _ in range(3):
        told, expected = metrics(training, batch), metrics(twin, batch)
        assert {name: told[name] for name in ("loss", "gain_ratio", "damping", "rejected")} == pytest.approx(
            {name: expected[name] for name in ("loss", "gain_ratio", "damping", "rejected")}, rel=1e-12
        )
    assert torch.equal(flat(model), flat(twin.model))


@pytest.mark.parametrize("case", ["squared", "softmax"])
def test_the_damping_of_samples_rises_where_the_sample_refutes_the_step(case: str) -> None:
    """By a factor until the sample's own loss falls, and back down to the recipe's, never below."""
    batch, loss = rows(53, case), named(case)
    model = network(OUTPUTS[case], seed=5)
    with torch.no_grad():
        model[0].weight.mul_(4)
    training = bind(model, loss, solver="exact", **{**SAMPLE, "damping": 1e-6})
    raised, rejected, eased = 1.0, 0.0, 0
    for step in range(25):
        sample = _samples(batch).batch(step)
        before = copy.deepcopy(model)
        told = metrics(training, batch)
        rejected += told["rejected"]
        raised *= RAISE ** told["rejected"]
        assert told["damping"] == pytest.approx(1e-6 * raised, rel=1e-9)
        here, moved = Quadratic.of(before, case, sample), flat(before) - flat(model)
        assert relative(moved, here.step(told["damping"])) < 1e-6
        with torch.no_grad():
            fall = float(loss.total(before(sample.x), sample.y) - loss.total(model(sample.x), sample.y))
        assert fall > 0
        ratio = fall / float(here.slope @ moved - moved @ here.curvature @ moved / 2)
        eased += ratio > 0.75 and raised > 1
        raised = max(1.0, raised / EASE) if ratio > 0.75 else RAISE * raised if ratio < 0.25 else raised
    assert rejected > 0
    assert eased > 0


def test_samples_that_confirm_their_steps_leave_the_damping_of_the_recipe() -> None:
    training = bind(network(hidden=()), solver="exact", **SAMPLE)
    told = [metrics(training, rows(53)) for _ in range(4)]
    assert [one["damping"] for one in told] == pytest.approx([1e-2] * 4, rel=1e-12)
    assert all(one["rejected"] == 0 for one in told)


def test_the_loss_that_is_told_is_that_of_the_sample_before_the_step() -> None:
    batch, model = rows(53, "softmax"), network(3)
    training = bind(model, named("softmax"), solver="exact", **SAMPLE)
    for step in range(3):
        sample = _samples(batch).batch(step)
        expected = float(named("softmax")(model(sample.x), sample.y).detach())
        assert metrics(training, batch)["loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize(
    "own", [{"momentum": 0.9, "lr": 0.1}, {"damping": 1e-9}, {"solver": "kfac", "inner_tolerance": None}]
)
def test_a_resumed_run_goes_on_bit_for_bit(stop: int, own: dict[str, Any]) -> None:
    """Within the samples, at their end, and in the full steps after them; the second raises its damping."""
    batch, settings = rows(53), {**SAMPLE, "sample_steps": 4, "solver": "exact", **own}
    whole = bind(network(), **settings)
    told = [metrics(whole, batch) for _ in range(7)]
    first = bind(network(), **settings)
    for _ in range(stop):
        first.step(batch)
    second = bind(copy.deepcopy(first.model), **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    again = [metrics(second, batch) for _ in range(7 - stop)]
    assert torch.equal(flat(whole.model), flat(second.model))
    for one, other in zip(told[stop:], again, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }


def test_the_momentum_is_part_of_the_state_and_a_copy() -> None:
    batch = rows(53)
    training = bind(network(), momentum=0.9, lr=0.1, **SAMPLE)
    training.step(batch)
    kept = training.state_dict()["sampled"]["phi"]
    before = kept.clone()
    training.step(batch)
    assert torch.equal(kept, before)
    assert not torch.equal(training.state_dict()["sampled"]["phi"], before)
    assert "phi" not in bind(network(), **SAMPLE).state_dict()["sampled"]


def test_a_step_that_is_not_finite_is_not_taken_and_a_loss_that_is_not_is_a_sentence() -> None:
    x = rows(24).x
    model = nn.Sequential(nn.Linear(3, 1, dtype=torch.float64))
    training = bind(model, sample_rows=24, damping=1e-3)
    training.step(Batch(x, torch.ones(24, 1, dtype=torch.float64)))
    with torch.no_grad():
        model[0].bias.fill_(1e200)
    with pytest.raises(DidNotSolve, match=r"not finite at step 1.*raise damping"):
        training.step(Batch(x, torch.ones(24, 1, dtype=torch.float64)))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_outside_its_range_is_refused(momentum: float) -> None:
    with pytest.raises(BadInput, match=r"momentum must be in \[0, 1\)"):
        bind(network(), sample_rows=24, momentum=momentum)


@pytest.mark.parametrize("setting", [{"sample_steps": 3}, {"momentum": 0.5}, {"lr": 0.5}])
def test_what_is_of_samples_is_refused_without_them(setting: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"{next(iter(setting))} is of steps on samples; give sample_rows"):
        bind(network(), **setting)


def test_fewer_rows_than_outputs_are_refused() -> None:
    training = bind(network(3), named("softmax"), sample_rows=2)
    with pytest.raises(BadInput, match=r"sample_rows=2 is fewer rows than the network has outputs \(3\)"):
        training.step(rows(24, "softmax"))


def test_more_rows_than_there_are_is_all_of_them() -> None:
    batch = rows(11)
    training = bind(network(), SQUARED, solver="exact", **{**FIXED, "sample_rows": 1000})
    expected = Quadratic.of(training.model, "squared", batch).step(1e-2)
    assert relative(_move(training, batch), expected) < 1e-10


def test_a_step_that_is_taken_back_is_tried_without_momentum() -> None:
    """Towards the step before no damping would make it short: here that one leads up."""
    batch, model = rows(53), network()
    training = bind(model, momentum=0.9, sample_rows=24, damping=1e-2)
    training.step(batch)
    training._sampled._phi = -1e3 * training._sampled._phi
    before = flat(model)
    told = metrics(training, batch)
    assert 0 < told["rejected"] < 10
    assert told["gain_ratio"] > 0
    assert not torch.equal(flat(model), before)


def test_a_step_that_is_given_up_tells_all_its_trials() -> None:
    model = network()
    training = bind(model, sample_rows=24, damping=1e-2, max_retries=2)
    training._sampled._ratio = lambda *_: -1.0
    before = flat(model)
    assert metrics(training, rows(53))["rejected"] == 3
    assert torch.equal(flat(model), before)
