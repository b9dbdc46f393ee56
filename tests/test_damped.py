"""Solvers of (K + damping I) g = r against dense algebra, and at the limits of precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import outer_rows, relu_factors, tanh_jacobian, true_residual
from piecework.solvers import Solved, cg, sketch
from piecework.solvers.damped import exact, nystrom_pcg, pcg, rpchol_pcg, sketch_pcg
from piecework.solvers.precondition import nystrom, rpcholesky, sampled, sketched
from piecework.training import BadInput, stream

Solver = Callable[[Tensor, Tensor, float], Solved]
"""(rows of J, rhs, damping) -> solved."""


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def _product(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: rows @ (rows.t() @ v)


def _rpchol(rows: Tensor, rhs: Tensor, damping: float, **settings: int) -> Solved:
    kernel = rows @ rows.t()
    columns = lambda index: kernel[:, index]  # noqa: E731
    return rpchol_pcg(_product(rows), columns, kernel.diagonal(), rhs, damping, tolerance=1e-10, **settings)


SOLVERS: dict[str, Solver] = {
    "exact": lambda rows, rhs, damping: exact(rows @ rows.t(), rhs, damping),
    "cg": lambda rows, rhs, damping: pcg(_product(rows), rhs, damping, tolerance=1e-10),
    "sketch": lambda rows, rhs, damping: sketch_pcg(
        _product(rows), rhs, damping, features=sketch.sparse_sign(rows, 4 * len(rows), 1), tolerance=1e-10
    ),
    "short-sketch": lambda rows, rhs, damping: sketch_pcg(
        _product(rows), rhs, damping, features=sketch.count(rows, max(len(rows) // 2, 1), 1), tolerance=1e-10
    ),
    "rpchol": _rpchol,
    "rpchol-3": lambda rows, rhs, damping: _rpchol(rows, rhs, damping, rank=3, block=2),
    "nystrom": lambda rows, rhs, damping: nystrom_pcg(_product(rows), rhs, damping, rank=3, tolerance=1e-10),
}
PRECONDITIONED = [name for name in SOLVERS if name not in ("exact", "cg")]


# -- every solver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num", [1, 3, 5, 24])
@pytest.mark.parametrize("outputs", [(), (3,)])
def test_every_solver_agrees_with_a_dense_solve(name: str, num: int, outputs: tuple[int, ...]) -> None:
    rows, rhs = _randn(num, 40), _randn(num, *outputs, seed=1)
    for damping in (0.0, 0.5, 30.0):
        found = SOLVERS[name](rows, rhs, damping)
        system = (rows @ rows.t()).numpy() + damping * np.eye(num)
        assert found.ok
        assert found.x.shape == rhs.shape
        assert found.residual <= 1e-8
        assert found.residual == pytest.approx(true_residual(rows, rhs, damping, found.x), rel=0.5, abs=1e-14)
        np.testing.assert_allclose(found.x.numpy(), np.linalg.solve(system, rhs.numpy()), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_solves_a_kernel_without_full_rank(name: str) -> None:
    rows, rhs = _randn(24, 5), _randn(24, seed=1)
    found = SOLVERS[name](rows, rhs, 1e-3)
    assert found.ok
    assert true_residual(rows, rhs, 1e-3, found.x) <= 1e-8
    within = rows @ _randn(5, seed=2)
    found = SOLVERS[name](rows, within, 0.0)
    assert true_residual(rows, within, 0.0, found.x) <= 1e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_to_solve_is_zero_and_no_kernel_is_the_damping(name: str) -> None:
    found = SOLVERS[name](_randn(5, 9), torch.zeros(5, dtype=torch.float64), 0.1)
    assert (found.ok, found.residual, found.iterations) == (True, 0.0, 0)
    assert not bool(found.x.any())
    nothing, rhs = torch.zeros(5, 9, dtype=torch.float64), _randn(5)
    found = SOLVERS[name](nothing, rhs, 0.25)
    assert found.ok
    torch.testing.assert_close(found.x, 4 * rhs, rtol=1e-12, atol=0)
    singular = SOLVERS[name](nothing, rhs, 0.0)
    assert not singular.ok
    assert bool(torch.isfinite(singular.x).all())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_becomes_a_sentence(name: str, bad: float) -> None:
    rows, rhs = _randn(24, 40), _randn(24, seed=1)
    broken, wrong = rows.clone(), rhs.clone()
    broken[3, 4], wrong[2] = bad, bad
    for found, blamed in (
        (SOLVERS[name](broken, rhs, 0.1), "not finite"),
        (SOLVERS[name](rows, wrong, 0.1), "the damping holds"),
        (SOLVERS[name](rows, rhs, bad), "the damping holds"),
    ):
        assert not found.ok
        assert blamed in found.reason
        assert "not finite" in found.reason
        assert found.residual == math.inf
        assert not bool(found.x.any())


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "exact"])
def test_vectors_in_single_precision_stay_so_and_their_residual_is_true(name: str) -> None:
    rows, rhs = _randn(24, 40).float(), _randn(24, seed=1).float()
    found = SOLVERS[name](rows, rhs, 5.0)
    assert found.x.dtype == torch.float32
    truth = true_residual(rows, rhs, 5.0, found.x)
    assert truth < 1e-5
    assert found.residual == pytest.approx(truth, abs=2e-6)
    assert not found.ok  # 1e-10 was asked for
    assert "rounding" in found.reason


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_seed_gives_the_same_answer(name: str) -> None:
    rows, rhs = _randn(24, 40), _randn(24, seed=1)
    before = torch.random.get_rng_state()
    assert torch.equal(SOLVERS[name](rows, rhs, 0.1).x, SOLVERS[name](rows, rhs, 0.1).x)
    assert torch.equal(torch.random.get_rng_state(), before)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SOLVERS)),
    st.integers(1, 24),
    st.integers(1, 40),
    st.floats(-8, 3),
    st.integers(0, 99),
)
def test_no_solver_is_wrong_without_saying_so(name: str, num: int, width: int, power: float, seed: int) -> None:
    rows, rhs = _randn(num, width, seed=seed), _randn(num, seed=seed + 1)
    found = SOLVERS[name](rows, rhs, 10**power)
    truth = true_residual(rows, rhs, 10**power, found.x)
    assert found.residual == pytest.approx(truth, rel=0.9, abs=1e-7)
    assert not found.ok or truth <= 2e-6
    if power > -4:
        assert found.ok


# -- preconditioned conjugate gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["count", "sparse-sign", "srht", "tensorsketch", "tensor-srht", "units"])
@pytest.mark.parametrize(("factor", "most"), [(2, 80), (4, 45)])
def test_a_sketch_of_a_few_times_the_rows_bounds_the_iterations(kind: str, factor: int, most: int) -> None:
    n = 200
    a, d = relu_factors(n, 1000)
    rows, rhs, num = outer_rows(a, d), _randn(n, seed=3), factor * n
    if kind == "units":
        index, weight = sketch.sample_units(d.square().sum(0), num // a.shape[1], 1)
        gram = (a @ a.t()) * ((d[:, index] * weight) @ d[:, index].t())
        found = sketch_pcg(_product(rows), rhs, 0.0, preconditioner=sampled(gram), tolerance=1e-10)
    else:
        features = {
            "count": lambda: sketch.count(rows, num, 1),
            "sparse-sign": lambda: sketch.sparse_sign(rows, num, 1),
            "srht": lambda: sketch.srht(rows, num, 1),
            "tensorsketch": lambda: sketch.tensorsketch(a, d, num, 1),
            "tensor-srht": lambda: sketch.tensor_srht(a, d, num, 1),
        }[kind]()
        found = sketch_pcg(_product(rows), rhs, 0.0, features=features, tolerance=1e-10)
    assert found.ok
    assert found.iterations <= most
    assert found.iterations < pcg(_product(rows), rhs, 0.0, tolerance=1e-10).iterations


def test_a_preconditioner_of_the_whole_kernel_needs_at_most_two_iterations() -> None:
    _, rows, y = tanh_jacobian(60)
    kernel = rows @ rows.t()
    damping = 1e-5 * float(kernel.trace()) / 60
    x, active = relu_factors(60, 100)
    ridge = (x @ x.t()) * (active @ active.t())
    index, weight = sketch.sample_units(active.square().sum(0), 100, 0)
    same = sampled((x @ x.t()) * ((active[:, index] * weight) @ active[:, index].t()))
    for found in (
        _rpchol(rows, y, damping, rank=60),
        nystrom_pcg(_product(rows), y, damping, rank=60),
        sketch_pcg(_product(rows), y, damping, features=rows),
        pcg(lambda v: ridge @ v, _randn(60, seed=1), 1e-3, same),
    ):
        assert found.ok
        assert found.iterations <= 2


def test_single_precision_features_reach_ten_digits_in_sixty_iterations() -> None:
    _, rows, y = tanh_jacobian(256)
    features = sketch.sparse_sign(rows, 512, 1).float()
    mean = float(rows.square().sum()) / 256
    norm = float(torch.linalg.matrix_norm(rows, 2)) ** 2
    for relative in (1e-4, 1e-6, 1e-8, 1e-10):
        found = sketch_pcg(_product(rows), y, relative * mean, features=features, tolerance=1e-10)
        # Below 1e-8 of damping the products themselves leave more than 1e-10: eps |K| |g| / |r|.
        floor = 2e-16 * norm * float(found.x.norm() / y.norm())
        assert found.residual <= max(1e-9, 4 * floor)
        assert found.iterations <= 60
        assert found.ok == (found.residual <= 1e-9)


def test_restarts_take_out_what_rounding_left_of_the_residual() -> None:
    _, rows, _ = tanh_jacobian(256)
    damping = 1e-1 * float(rows.square().sum()) / 256
    single, rhs = rows.float(), _randn(256, seed=3).float()
    made = sketched(sketch.sparse_sign(rows, 512, 1))
    found = pcg(_product(single), rhs, damping, made, tolerance=1e-7)
    plain = cg(lambda v: _product(single)(v) + damping * v, rhs, precondition=made.at(damping), tolerance=1e-7)
    assert 3 * found.residual < plain.residual
    assert plain.iterations < found.iterations <= 3 * plain.iterations


def test_the_rank_is_that_asked_for_or_follows_the_damping() -> None:
    _, rows, y = tanh_jacobian(400)
    kernel = rows @ rows.t()
    asked: list[int] = []

    def columns(index: Tensor) -> Tensor:
        asked.append(len(index))
        return kernel[:, index]

    mean = float(kernel.trace()) / 400
    for rank, relative, total in ((10, 1e-4, 10), (130, 1e-4, 130), (None, 1e-1, 16), (None, 1e-6, 128)):
        asked.clear()
        damping = relative * mean
        assert rpchol_pcg(_product(rows), columns, kernel.diagonal(), y, damping, rank=rank, block=16).ok
        assert sum(asked) == total or (rank is None and sum(asked) < total + 32)


def test_numbers_too_small_to_be_multiplied_in_single_precision_are_solved_too() -> None:
    rows, rhs = _randn(24, 40).float(), _randn(24, seed=1).float()
    expected = pcg(_product(rows), rhs, 5.0, tolerance=1e-4)
    found = pcg(_product(rows), rhs * 2.0**-80, 5.0, tolerance=1e-4)
    assert found.ok
    assert found.iterations == expected.iterations
    torch.testing.assert_close(found.x * 2.0**80, expected.x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("good", [0, 2, 24])
def test_a_product_that_stops_being_finite_leaves_zero_and_a_sentence(good: int) -> None:
    rows, rhs = _randn(24, 40), _randn(24, seed=1)
    calls: list[int] = []

    def product(v: Tensor) -> Tensor:
        calls.append(0)
        return rows @ (rows.t() @ v) * (1.0 if len(calls) <= good else math.nan)

    found = pcg(product, rhs, 0.1, max_iterations=24)
    assert ("a product or the preconditioner" if good < 24 else "the answer of conjugate gradients") in found.reason
    assert found.residual == math.inf
    assert not bool(found.x.any())


def test_one_preconditioner_serves_the_retries_of_the_damping() -> None:
    _, rows, y = tanh_jacobian(120)
    kernel = rows @ rows.t()
    mean = float(kernel.trace()) / 120
    for made in (
        sketched(sketch.sparse_sign(rows, 240, 1)),
        rpcholesky(lambda index: kernel[:, index], kernel.diagonal(), rank=100),
        nystrom(lambda v: kernel @ v, 120, rank=100),
        sampled(kernel),
    ):
        for relative in (1e-4, 2e-4, 8e-4, 1e-2):
            found = pcg(_product(rows), y, relative * mean, made, tolerance=1e-9)
            assert found.ok
            assert found.iterations <= 25
            assert true_residual(rows, y, relative * mean, found.x) <= 1e-8


def test_a_solve_that_stops_early_says_what_to_do() -> None:
    rows, rhs = _randn(24, 24), _randn(24, seed=1)
    found = pcg(_product(rows), rhs, 1e-3, max_iterations=3)
    assert found.iterations == 3
    assert "raise max_iterations" in found.reason
    assert found.residual == pytest.approx(true_residual(rows, rhs, 1e-3, found.x))
    indefinite = pcg(lambda v: -v, rhs, 0.1, None)
    assert "not positive definite" in indefinite.reason


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    rows, rhs = _randn(5, 9), _randn(5, seed=1)
    kernel, product = rows @ rows.t(), _product(rows)
    for bad, message in (
        (lambda: exact(kernel[:3], rhs, 0.1), r"\(3, 5\)"),
        (lambda: exact(kernel, rhs, -0.1), "-0.1"),
        (lambda: exact(kernel.long(), rhs, 0.1), "int64"),
        (lambda: pcg(product, rhs.half(), 0.1), "float16"),
        (lambda: pcg(product, kernel[None], 0.1), r"\(1, 5, 5\)"),
        (lambda: sketch_pcg(product, rhs, 0.1), "pass one of the two"),
        (lambda: sketch_pcg(product, rhs, 0.1, features=rows[:3]), "got 3"),
        (lambda: rpchol_pcg(product, lambda i: kernel[:, i], rhs[:3], rhs, 0.1), r"\(3,\)"),
        (lambda: nystrom_pcg(product, rhs, 0.1, rank=0), "at least one column"),
    ):
        with pytest.raises(BadInput, match=message):
            bad()
