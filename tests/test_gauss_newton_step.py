"""One step against dense algebra: every solver, every loss, the limits; and the loop against a plain twin."""

from __future__ import annotations

import copy
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.func import functional_call, jvp

from jacobian_cases import randn, relative
from piecework.methods.gauss_newton import choice, systems
from piecework.methods.gauss_newton.jacobian import Jacobian
from piecework.methods.gauss_newton.sketches import Sketch
from piecework.training import Batch
from plain_gauss_newton import (
    OUTPUTS,
    SQUARED,
    PlainLevenbergMarquardt,
    Quadratic,
    bind,
    direction,
    flat,
    metrics,
    named,
    network,
    plain,
    rows,
)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode

DIRECT = ("exact", "qr", "cholesky")
ITERATIVE = ("cg", "rpchol", "nystrom", "kfac")
SOLVERS: dict[str, dict[str, Any]] = {
    **{name: {"solver": name} for name in (*DIRECT, *ITERATIVE)},
    **{kind: {"solver": "sketch", "sketch": kind} for kind in get_args(Sketch)},
}
FEW, MANY = 7, 53
"""Samples: fewer rows than the 26 or 38 parameters with any of the losses, and more."""


def test_every_solver_is_in_the_table() -> None:
    assert {settings["solver"] for settings in SOLVERS.values()} == set(choice.SOLVERS)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", OUTPUTS)
@pytest.mark.parametrize("num", [FEW, MANY])
def test_the_step_is_that_of_the_parameters(solver: str, case: str, num: int) -> None:
    model, batch = network(OUTPUTS[case]), rows(num, case)
    settings = plain(damping=1e-3, inner_tolerance=1e-12, **SOLVERS[solver])
    found, told = direction(model, named(case), batch, **settings)
    expected = Quadratic.of(model, named(case).name, batch).step(1e-3)
    assert relative(found, expected) < (1e-10 if solver in DIRECT else 1e-8)
    assert told["damping"] == pytest.approx(1e-3, rel=1e-12)
    assert told["linear_residual"] < 1e-11
    assert told["stalled"] == 0


@pytest.mark.parametrize("solver", ["cg", "nystrom", "units", "count"])
def test_an_iterative_solver_stops_at_its_tolerance(solver: str) -> None:
    model, batch = network(hidden=(24,)), rows(MANY)
    settings = plain(damping=1e-4, sketch_rows=0.1, inner_tolerance=1e-3, **SOLVERS[solver])
    _, told = direction(model, SQUARED, batch, **settings)
    assert 1e-6 < told["linear_residual"] <= 1e-3
    _, tighter = direction(model, SQUARED, batch, **{**settings, "inner_tolerance": 1e-10})
    assert tighter["iterations"] > told["iterations"]


def test_iterations_are_bounded_and_the_residual_then_says_so() -> None:
    settings = plain(damping=1e-6, solver="cg", inner_iterations=3, inner_tolerance=1e-10)
    _, told = direction(network(), SQUARED, rows(MANY), **settings)
    assert told["iterations"] == 3
    assert told["linear_residual"] > 1e-6


def test_softmax_agrees_with_the_form_that_has_no_root() -> None:
    """(H K + damping I) z = p - y, d = J^T z."""
    model, batch = network(3), rows(FEW, "softmax")
    here = Quadratic.of(model, "softmax", batch)
    j = here.jacobian.flatten(0, 1).numpy()
    h = linalg.block_diag(*here.hessian.numpy())
    system = h @ j @ j.T + 1e-3 * here.unit * np.eye(len(j))
    z = np.linalg.solve(system, here.gradient.reshape(-1).numpy())
    found, _ = direction(model, named("softmax"), batch, **plain(solver="exact", damping=1e-3))
    assert relative(found, torch.from_numpy(j.T @ z)) < 1e-10


@pytest.mark.parametrize("tile", [1, 5, 4096])
@pytest.mark.parametrize("solver", ["exact", "qr", "cg"])
def test_tiles_change_nothing(solver: str, tile: int) -> None:
    model, batch = network(3), rows(24, "squared-3")
    found, _ = direction(model, SQUARED, batch, **plain(solver=solver, tile=tile, inner_tolerance=1e-13))
    assert relative(found, Quadratic.of(model, "squared", batch).step(1e-3)) < 1e-10


@pytest.mark.parametrize(("num", "size", "factored"), [(24, 7, 1), (100, 7, 4), (100, 45, 3), (53, 53, 1)])
def test_qr_factors_no_triangle_for_a_few_rows(
    num: int, size: int, factored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tiles of `size` rows and 26 parameters, as many as make 26 rows at a time."""
    seen, triangle, tiles = [], systems.stacked_triangle, Jacobian.tiles

    def watched(stack: Tensor) -> Tensor:
        seen.append(len(stack))
        return triangle(stack)

    monkeypatch.setattr(Jacobian, "tiles", lambda self: tiles(self, size * self.num_columns))
    monkeypatch.setattr(systems, "stacked_triangle", watched)
    model, batch = network(), rows(num)
    found, _ = direction(model, SQUARED, batch, **plain(solver="qr"))
    assert relative(found, Quadratic.of(model, "squared", batch).step(1e-3)) < 1e-10
    *stacks, _damped = seen
    assert len(stacks) == factored
    assert sum(stacks) == num + 27 * (factored - 1)  # with the residuals' column


def test_frozen_parameters_stay_and_are_no_part_of_the_system() -> None:
    model, batch = network(), rows(24)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    training = bind(model, **plain(solver="exact"))
    start, expected = flat(model), Quadratic.of(model, "squared", batch).step(1e-3)
    training.step(batch)
    assert relative(start - flat(model), expected) < 1e-10
    assert torch.equal(model[0].weight, before)


# -- the direction and what it promises --------------------------------------------------------------------------------


def _solved(case: str, num: int, **settings: Any) -> tuple[Tensor, Any, float]:
    """s, the direction and the damping of the first system."""
    batch = rows(num, case)
    training = bind(network(OUTPUTS[case]), named(case), **settings)
    point = training._objective.point(batch)
    made = training._choice.linearise(point, None, step=0, tolerance=settings.get("inner_tolerance", 1e-2))
    damping = 1e-3 * made.unit
    return point.s, made.system.solve(point.s, damping), damping


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", ["squared", "softmax"])
@pytest.mark.parametrize("num", [FEW, MANY])
def test_what_is_left_of_the_residual_is_damping_times_g(solver: str, case: str, num: int) -> None:
    """s - J d = damping g, so that |d|^2 = s.g - damping |g|^2 and g needs no solve of its own."""
    s, found, damping = _solved(case, num, inner_tolerance=1e-11, **SOLVERS[solver])
    g = (s - found.moved) / damping
    size = float(found.step.square().sum())
    assert float(s @ g - damping * g.square().sum()) == pytest.approx(size, rel=1e-7)
    assert found.solved.ok
    j = bind(network(OUTPUTS[case]), named(case))._objective.jacobian(rows(num, case))
    assert relative(found.step, j.t_mv(g)) < 1e-7
    assert relative(found.moved, j.mv(found.step)) < 1e-10


@pytest.mark.parametrize("tolerance", [0.5, 1e-1, 1e-10])
def test_the_predicted_fall_is_right_for_a_wrong_direction_too(tolerance: float) -> None:
    model, batch = network(), rows(MANY)
    settings = plain(solver="cg", inner_tolerance=tolerance, damping=1e-5)
    found, told = direction(model, SQUARED, batch, **settings)
    here = Quadratic.of(model, "squared", batch)
    moved = copy.deepcopy(model)
    nn.utils.vector_to_parameters(flat(model) - found, moved.parameters())
    fall = SQUARED.total(model(batch.x), batch.y) - SQUARED.total(moved(batch.x), batch.y).detach()
    promised = here.slope @ found - found @ here.curvature @ found / 2
    assert told["gain_ratio"] == pytest.approx(float((fall / promised).detach()), rel=1e-10)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", DIRECT)
def test_a_linear_model_with_few_rows_is_fitted_in_one_step(solver: str) -> None:
    batch = rows(3, features=5)
    model = network(hidden=(), features=5)
    start = (model(batch.x) - batch.y).detach()
    # the normal equations lose half of the digits, and a damping of rounding is not told from none
    damping, left = (1e-9, 1e-7) if solver == "cholesky" else (1e-14, 1e-12)
    told = metrics(bind(model, solver=solver, damping=damping), batch)
    assert float((model(batch.x) - batch.y).detach().norm()) <= left * float(start.norm())
    assert told["gain_ratio"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("solver", "damping"), [("auto", 1e-14), ("qr", 1e-14), ("cholesky", 1e-11)])
def test_a_linear_model_with_many_rows_is_least_squares_in_one_step(solver: str, damping: float) -> None:
    batch = rows(53, "squared-3", features=5)
    model = network(3, hidden=(), features=5)
    told = metrics(bind(model, solver=solver, damping=damping), batch)
    best, *_ = linalg.lstsq(np.column_stack([batch.x, np.ones(53)]), batch.y.numpy())
    found = np.column_stack([model[0].weight.detach(), model[0].bias.detach()]).T
    np.testing.assert_allclose(found, best, atol=1e-9)
    assert told["gain_ratio"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("solver", DIRECT)
def test_damping_from_zero_is_ridge_regression(solver: str) -> None:
    batch, weight = rows(24, features=5), nn.Linear(5, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(weight.weight)
    damping = 0.3 * 2 * float(batch.x.square().sum()) / 24  # K = 2 X X^T
    bind(weight, **plain(solver=solver, damping=0.3)).step(batch)
    ridge = Ridge(alpha=damping / 2, fit_intercept=False, solver="cholesky").fit(batch.x, batch.y[:, 0])
    np.testing.assert_allclose(weight.weight.detach()[0], ridge.coef_, rtol=1e-10)


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_huge_damping_is_a_gradient_step(case: str) -> None:
    model, batch = network(OUTPUTS[case]), rows(24, case)
    here = Quadratic.of(model, named(case).name, batch)
    size = float(torch.linalg.matrix_norm(here.curvature, 2))
    settings = plain(solver="exact", damping=1e6 * size / here.unit)
    found, _ = direction(model, named(case), batch, **settings)
    assert relative(found, here.slope / (1e6 * size)) < 2e-6


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", DIRECT)
@pytest.mark.parametrize("geodesic", [True, False])
@pytest.mark.parametrize("damping", [1e-1, 1e-7])
def test_the_loop_is_that_of_a_plain_twin(solver: str, geodesic: bool, damping: float) -> None:
    batch = rows(MANY, seed=4)
    twin = PlainLevenbergMarquardt(network(seed=3), batch, damping=damping, geodesic=geodesic)
    training = bind(network(seed=3), solver=solver, damping=damping, geodesic=geodesic)
    rejected = 0
    for _ in range(8):
        told, expected = metrics(training, batch), twin.step()
        rejected += int(expected["rejected"])
        assert {name: told[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert relative(flat(training.model), flat(twin.model)) < 1e-7
    assert rejected > 0 or damping > 1e-3


def test_the_correction_is_the_second_derivative_along_the_step() -> None:
    """(3) with s_dd by torch.func, on a step so short that the third derivative is of no account."""
    model, batch = network(), rows(24)
    found, _ = direction(model, SQUARED, batch, damping=30.0, solver="exact", geodesic=True)
    d, _ = direction(model, SQUARED, batch, **plain(damping=30.0, solver="exact"))
    here = Quadratic.of(model, "squared", batch)
    parts = torch.split(d, [p.numel() for p in model.parameters()])
    names = {name: p.detach() for name, p in model.named_parameters()}
    along = {n: part.view_as(p) for (n, p), part in zip(names.items(), parts, strict=True)}

    def moving(weights: dict[str, Tensor]) -> Tensor:
        return jvp(lambda w: functional_call(model, w, (batch.x,)), (weights,), (along,))[1]

    bend = jvp(moving, (names,), (along,))[1]
    expected = -here.solve(2 * torch.einsum("nkp,nk->p", here.jacobian, bend), 30.0 * here.unit) / 2
    assert relative(d - found, expected) < 0.02
    assert float((d - found).norm()) > 1e-4 * float(d.norm())


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_the_correction_is_left_to_direct_solvers_unless_asked_for(solver: str) -> None:
    model, batch = network(), rows(24)
    settings = {"solver": solver, "inner_tolerance": 1e-12, "adapt": False, "damping": 0.1}
    default, _ = direction(model, SQUARED, batch, **settings)
    asked, _ = direction(model, SQUARED, batch, **settings, geodesic=solver == "exact")
    other, _ = direction(model, SQUARED, batch, **settings, geodesic=solver != "exact")
    assert torch.equal(default, asked)
    assert relative(other, default) > 1e-4


@pytest.mark.parametrize("solver", ["auto", "exact", "qr", "cg", "rpchol", "sketch"])
@pytest.mark.parametrize("case", ["squared", "softmax", "logistic"])
def test_the_loss_never_rises_and_is_that_of_the_model(solver: str, case: str) -> None:
    batch, loss = rows(24, case), named(case)
    model = network(OUTPUTS[case], seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    training = bind(model, loss, solver=solver, damping=1e-8)
    before = float(loss(model(batch.x), batch.y).detach())
    for _ in range(10):
        told = metrics(training, batch)
        assert told["loss"] == pytest.approx(float(loss(model(batch.x), batch.y).detach()), rel=1e-12)
        assert told["loss"] <= before
        assert (told["loss"] < before) == (not told["stalled"])
        before = told["loss"]


def test_without_adapting_a_step_that_raises_the_loss_is_taken_too() -> None:
    batch, model = rows(24), network(seed=5)
    with torch.no_grad():
        model[0].weight.mul_(4)
    training = bind(model, **plain(solver="exact", damping=1e-10))
    told = [metrics(training, batch) for _ in range(4)]
    assert max(one["loss"] for one in told[1:]) > told[0]["loss"] or min(one["gain_ratio"] for one in told) < 0
    assert told[0]["damping"] == pytest.approx(1e-10)
    assert all(one["rejected"] == 0 for one in told)


def test_without_adapting_a_correction_that_is_too_long_is_left_out() -> None:
    model, batch = network(), rows(53)
    alone = copy.deepcopy(model)
    told = metrics(bind(model, adapt=False, damping=1e-9, solver="exact"), batch)
    metrics(bind(alone, adapt=False, damping=1e-9, solver="exact", geodesic=False), batch)
    assert told["stalled"] == 0
    assert torch.equal(flat(model), flat(alone))


@pytest.mark.parametrize("change", ["weights", "features"])
def test_what_is_altered_between_steps_is_seen(change: str) -> None:
    model, batch = network(), rows(53)
    training = bind(model)
    training.step(batch)
    with torch.no_grad():
        if change == "weights":
            nn.utils.vector_to_parameters(0.5 * flat(model), model.parameters())
        else:
            batch.x.copy_(rows(53, seed=7).x)
    fresh = bind(copy.deepcopy(model))
    fresh.load_state_dict(training.state_dict())
    assert metrics(training, batch)["loss"] == metrics(fresh, batch)["loss"]
    assert torch.equal(flat(model), flat(fresh.model))


def test_at_the_optimum_a_step_stalls_and_moves_nothing() -> None:
    batch = rows(24, features=5)
    model = network(hidden=(), features=5)
    training = bind(model, solver="qr", damping=1e-14, max_retries=3)
    while not (told := metrics(training, batch))["stalled"]:
        pass
    before = flat(model)
    again = metrics(training, batch)
    assert again["stalled"] == 1
    assert again["rejected"] == 4  # a trial and three retries
    assert again["loss"] == told["loss"]
    assert torch.equal(flat(model), before)


def test_a_perfect_start_stalls_and_many_stalls_leave_finite_numbers() -> None:
    model = network()
    x = randn(24, 3)
    training = bind(model, solver="exact")
    batch = Batch(x, model(x).detach())
    before = flat(model)
    for _ in range(12):
        told = metrics(training, batch)
        assert told["stalled"] == 1
        assert told["loss"] == 0
        assert np.isfinite(told["damping"])
    assert torch.equal(flat(model), before)
