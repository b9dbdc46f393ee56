"""Kronecker factors against Kronecker products, the Jacobian's blocks against their moments, and what they save."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from jacobian_cases import Attention, dense, filled, randn, relative
from piecework import Solo, losses
from piecework.methods.gauss_newton.jacobian import Jacobian, capture, plan
from piecework.methods.gauss_newton.kronecker import EVERY, FIRST, KEEP, KroneckerSystem, LayerFactors
from piecework.methods.gauss_newton.objective import LeastSquares
from piecework.methods.gauss_newton.systems import Krylov, Pull
from piecework.solvers.kronecker import KroneckerFactor
from piecework.training import Batch
from plain_gauss_newton import SQUARED, flat, network, rows


def _moment(size: int, seed: int) -> Tensor:
    rows = randn(2 * size, size, seed=seed)
    return rows.t() @ rows


@pytest.mark.parametrize("damping", [1e-3, 2.0])
def test_a_factor_is_the_inverse_of_its_kronecker_product(damping: float) -> None:
    a, counts, d, right = _moment(5, 0), randn(5, seed=1).square(), _moment(3, 2), randn(3, 5, seed=3)
    for inputs in (a, counts):
        whole = torch.kron(d, inputs if inputs.dim() == 2 else torch.diag(inputs))
        factor = KroneckerFactor.of((inputs, d))
        system = 7 * whole + damping * torch.eye(15, dtype=d.dtype)
        expected = torch.linalg.solve(system, right.reshape(-1)).view(3, 5)
        assert relative(factor.solve(right, 7, damping), expected) < 1e-10
        values = torch.linalg.eigvalsh(7 * whole)
        assert factor.dimension(7, damping) == pytest.approx(float((values / (values + damping)).sum()), rel=1e-10)
    diagonal = KroneckerFactor.of((counts,))
    assert torch.equal(diagonal.solve(right[0], 7, damping), right[0] / (7 * counts + damping))


def test_a_moment_that_is_not_finite_gives_a_factor_that_is_not() -> None:
    broken = torch.full((3, 3), math.inf, dtype=torch.float64)
    found = KroneckerFactor.of((_moment(5, 0), broken)).solve(randn(3, 5), 1, 1.0)
    assert not bool(found.isfinite().any())


def test_without_curvature_and_damping_the_factor_stays_finite() -> None:
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    found = KroneckerFactor.of((nothing, nothing)).solve(torch.zeros(3, 3, dtype=torch.float64), 1, 0.0)
    assert torch.equal(found, nothing)


# -- the moments of the Jacobian's blocks ------------------------------------------------------------------------------


def _jacobian(model: nn.Module, x: Tensor) -> Jacobian:
    return capture(model, plan(model, x), x)[1]


def _factors(jacobian: Jacobian) -> LayerFactors:
    layers = LayerFactors()
    layers.look(jacobian, Solo())
    return layers


MODELS = {
    "linear": (lambda: network(3), lambda n: randn(n, 3)),
    "no bias": (lambda: nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), lambda n: randn(n, 3)),
    "norm": (lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1)), lambda n: randn(n, 3)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Tanh(), nn.Linear(5, 2)),
        lambda n: torch.arange(n)[:, None] % 7,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_of_one_sample_the_blocks_are_exact(name: str) -> None:
    """Layers without a weight matrix have the diagonal of theirs."""
    make, inputs = MODELS[name]
    model, x = filled(make()), inputs(1)
    jacobian = _jacobian(model, x)
    v, damping = randn(jacobian.num_columns, seed=5), 0.1
    expected = torch.empty_like(v)
    whole = dense(model, x)[0]
    for block, (place,) in zip(jacobian.blocks, jacobian.places, strict=True):
        system = whole[:, place].t() @ whole[:, place]
        if len(block.moments()) == 1:
            system = torch.diag(system.diagonal())
        system = system + damping * torch.eye(len(system), dtype=v.dtype)
        expected[place] = torch.linalg.solve(system, v[place])
    assert relative(_factors(jacobian).of(jacobian, 1).at(damping)(v), expected) < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_sums_over_the_samples(name: str) -> None:
    make, inputs = MODELS[name]
    jacobian = _jacobian(filled(make()), inputs(5))
    for block in jacobian.blocks:
        parts = [block.samples(slice(i, i + 1)).moments() for i in range(5)]
        for found, *same in zip(block.moments(), *parts, strict=True):
            assert relative(found, torch.stack(same).sum(0)) < 1e-12


def test_positions_share_the_moments_of_the_outputs() -> None:
    """Positions are taken as independent: the sum of a a^T over them, and the mean of d d^T."""
    model = filled(nn.Conv2d(2, 3, 1))
    x = torch.ones(1, 2, 2, 2, dtype=torch.float64)
    block = _jacobian(nn.Sequential(model, nn.AvgPool2d(2), nn.Flatten()), x).blocks[0]
    a = torch.ones(3, dtype=torch.float64)
    found = block.moments()
    assert relative(found[0], 4 * torch.outer(a, a)) < 1e-14
    assert relative(found[1], torch.eye(3, dtype=a.dtype) / 16) < 1e-14


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_matrices_are_two_views_of_the_same(name: str) -> None:
    make, inputs = MODELS[name]
    for block in _jacobian(filled(make()), inputs(2)).blocks:
        w = randn(block.num_columns)
        assert torch.equal(block.flat(block.matrix(w)), w)


def test_every_layer_of_a_transformer_has_a_block() -> None:
    model = filled(Attention())
    x = torch.randint(0, 7, (6, 4), generator=torch.Generator().manual_seed(0))
    jacobian = _jacobian(model, x)
    made = _factors(jacobian).of(jacobian, 6)
    identity = torch.stack([made.at(0.3)(one) for one in torch.eye(jacobian.num_columns, dtype=torch.float64)])
    assert relative(identity, identity.t()) < 1e-12
    assert float(torch.linalg.eigvalsh(identity).min()) > 0


# -- systems -----------------------------------------------------------------------------------------------------------


def _system(num: int, hidden: tuple[int, ...], tolerance: float | None) -> tuple[LeastSquares, Batch, KroneckerSystem]:
    batch = rows(num)
    objective = LeastSquares(network(hidden=hidden), SQUARED, Solo())
    jacobian = objective.jacobian(batch)
    made = _factors(jacobian).of(jacobian, num)
    return objective, batch, KroneckerSystem(jacobian, Solo(), made, tolerance=tolerance, max_iterations=500)


def test_a_linear_model_is_solved_at_once() -> None:
    """Its J^T J is a Kronecker product."""
    batch = rows(53)
    objective = LeastSquares(nn.Linear(3, 1, dtype=torch.float64), losses.Squared(), Solo())
    jacobian, point = objective.jacobian(batch), objective.point(batch)
    made = _factors(jacobian).of(jacobian, 53)
    system = KroneckerSystem(jacobian, Solo(), made, tolerance=1e-10, max_iterations=9)
    assert system.solve(point.s, 0.1).solved.iterations <= 2


def test_factors_save_most_of_the_iterations() -> None:
    """Where there are many features: to the same fall of the quadratic model, with half its iterations left over."""
    batch = rows(400, features=16)
    objective = LeastSquares(network(hidden=(24, 24), features=16), SQUARED, Solo())
    point, jacobian = objective.point(batch), objective.jacobian(batch)
    damping = 1e-3 * float(jacobian.diagonal().mean())
    plain = Krylov(jacobian, Solo(), tolerance=1e-1, max_iterations=5000).solve(point.s, damping)
    made = _factors(jacobian).of(jacobian, 400)
    found = KroneckerSystem(jacobian, Solo(), made, tolerance=1e-2, max_iterations=500).solve(point.s, damping)
    assert found.solved.ok
    assert relative(found.moved, jacobian.mv(found.step)) < 1e-12
    falls = [objective.promised(point, one.step, one.moved) for one in (found, plain)]
    assert falls[0] > falls[1]
    assert 2 * found.solved.iterations < plain.solved.iterations


@pytest.mark.parametrize("pulled", [False, True])
def test_the_first_iterate_is_as_long_as_the_model_is_low(pulled: bool) -> None:
    """x = P^-1 b, and |J a x - v|^2 + damping |a x|^2 + weight |a x - place|^2 is least at a = 1."""
    objective, batch, system = _system(53, (5,), None)
    point, j = objective.point(batch), objective.jacobian(batch).rows(0, 53)
    place = randn(j.shape[1], seed=3)
    pulls = [Pull(0.7, place)] if pulled else []
    found = system.solve(point.s, 0.2, pulls)
    right = j.t() @ point.s + (0.7 * place if pulled else 0)
    made = _factors(objective.jacobian(batch)).of(objective.jacobian(batch), 53)
    direction = made.at(0.9 if pulled else 0.2)(right)
    length = float(found.step @ direction / (direction @ direction))
    assert relative(found.step, length * direction) < 1e-12
    assert relative(found.moved, j @ found.step) < 1e-12
    assert found.solved.iterations == 1

    def model(a: float) -> float:
        d = a * found.step
        value = (j @ d - point.s).square().sum() + 0.2 * d.square().sum()
        return float(value + 0.7 * (d - place).square().sum() if pulled else value)

    slope = (model(1 + 1e-4) - model(1 - 1e-4)) / 2e-4
    assert abs(slope) < 1e-8 * model(0.0)


def test_a_first_iterate_that_overflows_says_so() -> None:
    objective, batch, system = _system(53, (5,), None)
    found = system.solve(math.inf * objective.point(batch).s, 0.1)
    assert "not finite" in found.solved.reason
    assert torch.equal(found.step, torch.zeros_like(found.step))


# -- means over samples ------------------------------------------------------------------------------------------------


def test_means_forget_and_count_one_sample_in_so_many() -> None:
    """All of the first, then one in EVERY; a plain mean until KEEP would weigh more."""
    model = network(3)
    samples = [_jacobian(model, randn(60 - step, 3, seed=step)) for step in range(3 * EVERY + 1)]
    layers, expected, count = LayerFactors(), [], 0
    for step, sample in enumerate(samples):
        layers.look(sample, Solo())
        if step < FIRST or step % EVERY == 0:
            keep = min(count / (count + 1), KEEP)
            means = [moment / sample.num_samples for block in sample.blocks for moment in block.moments()]
            old = expected or [torch.zeros_like(mean) for mean in means]
            expected = [keep * before + (1 - keep) * mean for before, mean in zip(old, means, strict=True)]
            count += 1
        found = [mean for means in layers.state()["means"] for mean in means]
        assert all(relative(one, other) < 1e-12 for one, other in zip(found, expected, strict=True))
    assert count == FIRST + 3


def test_factors_go_on_with_the_same_bits() -> None:
    model, layers, other = network(), LayerFactors(), LayerFactors()
    samples = [_jacobian(model, randn(9, 3, seed=step)) for step in range(2 * EVERY)]
    for sample in samples[:7]:
        layers.look(sample, Solo())
    other.go_on(layers.state(), torch.device("cpu"))
    v = flat(model)
    for sample in samples[7:]:
        for one in (layers, other):
            one.look(sample, Solo())
        assert torch.equal(layers.of(sample, 9).at(0.1)(v), other.of(sample, 9).at(0.1)(v))
