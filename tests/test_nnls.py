"""Non-negative codes against scipy row by row, their optimality conditions, and a long projected-gradient run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codes import case, label_loss, uniform
from piecework.solvers import composite_nnls, nnls
from piecework.solvers.active_set import departure, finish, solve_free
from piecework.solvers.nnls import (
    Composite,
    Iteration,
    fista,
    gram_and_cross,
    iterates,
    rough_then_exact,
    spectral_bound,
    sweep,
)
from piecework.training import BadInput

METHODS: tuple[Iteration, ...] = ("fista", "hals", "ao-admm")


def by_scipy(a: Tensor, dictionary: Tensor, ridge: float = 0.0) -> Tensor:
    """Row by row; the ridge as rows of sqrt(ridge) I below the dictionary, with targets of 0."""
    r = dictionary.shape[1]
    tall = np.concatenate([dictionary.numpy(), math.sqrt(ridge) * np.eye(r)])
    rows = [scipy.optimize.nnls(tall, np.concatenate([row, np.zeros(r)]))[0] for row in a.numpy()]
    return torch.from_numpy(np.stack(rows))


def kkt(a: Tensor, dictionary: Tensor, codes: Tensor, ridge: float) -> float:
    """The largest of what the conditions S >= 0, slope >= 0, S slope = 0 are missed by."""
    slope = codes @ dictionary.T @ dictionary + ridge * codes - a @ dictionary
    return max(float(v) for v in ((-codes).amax(), (-slope).amax(), (codes * slope).abs().amax()))


# -- least squares -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
def test_codes_are_those_of_scipy(method: Iteration, exact: bool, ridge: float) -> None:
    a, dictionary = case(24, 7, 5)
    found = nnls(a, dictionary, ridge=ridge, method=method, exact=exact, tolerance=1e-12, max_iterations=20_000)
    assert found.ok
    assert (found.x == 0).any()
    torch.testing.assert_close(found.x, by_scipy(a, dictionary, ridge), rtol=0, atol=1e-8)
    assert kkt(a, dictionary, found.x, ridge) < 1e-8


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 24),
    d=st.integers(1, 9),
    r=st.integers(1, 9),
    seed=st.integers(0, 1000),
    ridge=st.sampled_from([1e-3, 1.0]),
    method=st.sampled_from(METHODS),
    signs=st.booleans(),
)
def test_codes_of_any_size_are_optimal(
    n: int, d: int, r: int, seed: int, ridge: float, method: Iteration, signs: bool
) -> None:
    a, dictionary = case(n, d, r, seed=seed)
    if signs:
        a, dictionary = a - 0.5, dictionary - 0.3
    found = nnls(a, dictionary, ridge=ridge, method=method)
    assert found.ok
    assert kkt(a, dictionary, found.x, ridge) < 1e-10
    torch.testing.assert_close(found.x, by_scipy(a, dictionary, ridge), rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_a_dictionary_of_nearly_equal_columns_is_solved_exactly(method: Iteration) -> None:
    a, dictionary = case(24, 24, 9, likeness=0.999)
    assert float(torch.linalg.cond(dictionary.T @ dictionary)) > 1e6
    found = nnls(a, dictionary, method=method)
    assert found.ok
    assert kkt(a, dictionary, found.x, 0.0) < 1e-10
    rough = nnls(a, dictionary, method=method, exact=False, max_iterations=30)
    assert not rough.ok
    assert "raise max_iterations" in rough.reason
    assert rough.iterations == 30


def test_columns_of_any_length_give_the_same_product() -> None:
    a, dictionary = case(24, 7, 5)
    lengths = torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4], dtype=torch.float64)
    found = nnls(a, dictionary * lengths)
    assert found.ok
    torch.testing.assert_close(found.x * lengths, nnls(a, dictionary).x, rtol=0, atol=1e-9)


def test_equal_columns_without_a_ridge_still_fit_best() -> None:
    a, dictionary = case(24, 7, 3)
    found = nnls(a, torch.cat([dictionary, dictionary], 1), exact=True)
    assert found.ok
    fitted = found.x[:, :3] + found.x[:, 3:]
    torch.testing.assert_close(fitted, by_scipy(a, dictionary), rtol=0, atol=1e-8)


def test_rows_of_zeros_have_codes_of_zero() -> None:
    a, dictionary = case(5, 7, 3)
    a[1] = 0
    a[3] *= -1
    found = nnls(a, dictionary)
    assert found.ok
    assert found.x[1].tolist() == found.x[3].tolist() == [0, 0, 0]
    assert nnls(torch.zeros(5, 7), torch.ones(7, 3), ridge=0.1).residual == 0


def test_one_column_has_a_closed_form() -> None:
    a, dictionary = case(5, 24, 1)
    expected = ((a @ dictionary) / (dictionary.square().sum() + 0.5)).clamp_min(0)
    torch.testing.assert_close(nnls(a, dictionary, ridge=0.5).x, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_a_warm_start_is_used(method: Iteration) -> None:
    a, dictionary = case(24, 24, 9, likeness=0.9)
    solved = nnls(a, dictionary).x
    assert nnls(a, dictionary, method=method, exact=False, start=solved, tolerance=1e-6).iterations <= 10
    assert nnls(a, dictionary, method=method, exact=False, tolerance=1e-6).iterations > 10


def test_coordinate_sweeps_never_raise_the_objective() -> None:
    a, dictionary = case(24, 24, 9, likeness=0.5)
    gram, cross = gram_and_cross(a, dictionary, 0.01)
    before = math.inf
    for codes, _ in zip(iterates(gram, cross, uniform(24, 9, seed=4), "hals"), range(50), strict=False):
        value = float(0.5 * (a - codes @ dictionary.T).square().sum() + 0.005 * codes.square().sum())
        assert value <= before * (1 + 1e-12)
        before = value


def test_a_column_of_zeros_leaves_its_codes() -> None:
    a, dictionary = case(24, 7, 5)
    dictionary[:, 2] = 0
    start = uniform(24, 5, seed=4)
    swept = sweep(start, *gram_and_cross(a, dictionary, 0.0))
    assert torch.equal(swept[:, 2], start[:, 2])
    assert not torch.equal(swept[:, 1], start[:, 1])


def test_a_row_does_not_depend_on_its_company() -> None:
    a, dictionary = case(24, 7, 5)
    together = nnls(a, dictionary).x
    alone = torch.cat([nnls(row[None], dictionary).x for row in a])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-14)


def test_no_rows_have_no_codes() -> None:
    assert nnls(torch.zeros(0, 7), torch.ones(7, 3), ridge=1.0).x.shape == (0, 3)


def test_single_precision_says_that_it_reached_what_it_can() -> None:
    a, dictionary = case(24, 7, 5)
    found = nnls(a.float(), dictionary.float(), ridge=1e-3)
    assert found.ok
    assert found.x.dtype == torch.float32
    torch.testing.assert_close(found.x.double(), nnls(a, dictionary, ridge=1e-3).x, rtol=0, atol=1e-5)


def test_rows_that_are_not_finite_are_a_sentence_not_an_exception() -> None:
    a, dictionary = case(5, 7, 3)
    a[2, 2] = math.nan
    found = nnls(a, dictionary)
    assert "not finite" in found.reason
    assert not bool(found.x.any())


@pytest.mark.parametrize(
    ("a", "dictionary", "settings", "words"),
    [
        ((5, 7), (6, 3), {}, "do not fit"),
        ((5, 7), (7, 0), {}, "at least 1"),
        ((7,), (7, 3), {}, "do not fit"),
        ((5, 7), (7, 3), {"start": torch.zeros(5, 4)}, r"\(5, 4\)"),
        ((5, 7), (7, 3), {"ridge": -1.0}, "ridge"),
        ((5, 7), (7, 3), {"method": "newton"}, "fista, hals, ao-admm"),
    ],
)
def test_what_does_not_fit_is_refused(
    a: tuple[int, ...], dictionary: tuple[int, ...], settings: dict[str, object], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        nnls(torch.ones(a), torch.ones(dictionary), **settings)  # type: ignore[arg-type]


# -- the parts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), ask=st.booleans(), r=st.sampled_from([1, 3, 5, 24]))
def test_pivoting_is_exact_from_any_guess(seed: int, ask: bool, r: int) -> None:
    a, dictionary = case(24, 24, r, seed=seed)
    gram, cross = gram_and_cross(a, dictionary, 1e-3)
    guess = (uniform(24, r, seed=seed + 7) - 0.5).clamp_min(0)
    found = finish(gram, cross, guess, ask=True)
    assert kkt(a, dictionary, found, 1e-3) < 1e-10
    blind = finish(gram, cross, rough_then_exact(gram, cross), ask=False)
    torch.testing.assert_close(blind, found, rtol=0, atol=1e-10)


def test_pivoting_never_makes_a_row_worse() -> None:
    a, dictionary = case(24, 7, 3)
    dictionary = torch.cat([dictionary, dictionary], 1)  # without full rank
    gram, cross = gram_and_cross(a, dictionary, 0.0)
    guess = uniform(24, 6, seed=9)
    found = finish(gram, cross, guess)
    before, now = (departure(s, s @ gram - cross, gram.diagonal()) for s in (guess, found))
    assert found.isfinite().all()
    assert (now <= before).all()


def test_codes_are_never_negative_not_even_by_a_rounding() -> None:
    _, dictionary = case(1, 24, 9)
    codes = (uniform(24, 9, seed=3) - 0.5).clamp_min(0)
    gram, cross = gram_and_cross(codes @ dictionary.T, dictionary, 0.0)  # slopes and codes that are 0 at once
    found = finish(gram, cross, torch.ones_like(codes))
    torch.testing.assert_close(found, codes, rtol=0, atol=1e-12)
    assert float(found.min()) == 0


def test_masked_systems_are_those_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    _, dictionary = case(1, 7, 5)
    gram, right = dictionary.T @ dictionary, uniform(11, 5, seed=3)
    free = uniform(11, 5, seed=4) > 0.5
    expected = torch.zeros_like(right)
    for row, f in enumerate(free):
        expected[row, f] = torch.linalg.solve(gram[f][:, f], right[row, f])
    torch.testing.assert_close(solve_free(gram, free, right), expected, rtol=0, atol=1e-12)
    monkeypatch.setattr("piecework.solvers.active_set.TILE", 100)  # four rows at once, the last tile of three
    torch.testing.assert_close(solve_free(gram, free, right), expected, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), r=st.integers(1, 24), signs=st.booleans())
def test_the_spectral_bound_bounds(seed: int, r: int, signs: bool) -> None:
    _, dictionary = case(1, 24, r, seed=seed)
    gram = (dictionary - 0.2 * signs).T @ (dictionary - 0.2 * signs)
    norm = float(torch.linalg.matrix_norm(gram, 2))
    assert float(spectral_bound(gram)) >= norm * (1 - 1e-14)
    if not signs:
        assert float(spectral_bound(gram)) <= 1.01 * norm
    assert float(spectral_bound(torch.zeros(r, r))) > 0


# -- with a label ------------------------------------------------------------------------------------------------------


def projected_gradient(a: Tensor, dictionary: Tensor, weight: float, ridge: float, sign: float = 1.0) -> Tensor:
    """Plain and slow: 20,000 steps of 1/L."""
    n, r = len(a), dictionary.shape[1]
    _, slope, lipschitz = label_loss(n, r)
    gram, cross = gram_and_cross(a, dictionary, ridge)
    length = 1 / (weight * float(torch.linalg.matrix_norm(gram, 2)) + lipschitz)
    s = torch.zeros(n, r, dtype=torch.float64)
    for _ in range(20_000):
        s = (s - length * (sign * slope(s) + weight * (s @ gram - cross))).clamp_min(0)
    return s


@pytest.mark.parametrize("method", ["fista", "proximal"])
@pytest.mark.parametrize("weight", [0.3, 1.0, 30.0])
def test_codes_that_see_a_label_are_those_of_projected_gradients(method: Composite, weight: float) -> None:
    a, dictionary = case(5, 7, 3)
    _, slope, lipschitz = label_loss(5, 3)
    found = composite_nnls(slope, lipschitz, a, dictionary, weight=weight, ridge=1e-3, method=method, tolerance=1e-13)
    assert found.ok
    torch.testing.assert_close(found.x, projected_gradient(a, dictionary, weight, 1e-3), rtol=0, atol=1e-8)
    assert float((found.x - nnls(a, dictionary, ridge=1e-3).x).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["fista", "proximal"])
def test_a_label_may_push_the_other_way(method: Composite) -> None:
    a, dictionary = case(5, 7, 3)
    _, slope, lipschitz = label_loss(5, 3)
    found = composite_nnls(lambda s: -slope(s), lipschitz, a, dictionary, weight=30.0, ridge=1e-3, method=method)
    assert found.ok
    expected = projected_gradient(a, dictionary, 30.0, 1e-3, sign=-1.0)
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-8)


def test_without_a_label_the_codes_are_least_squares() -> None:
    a, dictionary = case(24, 7, 5)
    found = composite_nnls(torch.zeros_like, 1.0, a, dictionary, weight=3.0, ridge=0.1)
    assert found.iterations == 0
    torch.testing.assert_close(found.x, nnls(a, dictionary, ridge=0.1).x)
    cold = composite_nnls(
        torch.zeros_like, 1.0, a, dictionary, weight=3.0, ridge=0.1, start=torch.zeros(24, 5).double()
    )
    assert cold.iterations > 0
    torch.testing.assert_close(cold.x, nnls(a, dictionary, ridge=0.1).x, rtol=0, atol=1e-8)


def test_proximal_steps_grow_fewer_with_the_weight() -> None:
    a, dictionary = case(24, 24, 9, likeness=0.8)
    _, slope, lipschitz = label_loss(24, 9)
    steps = {
        (method, weight): composite_nnls(slope, lipschitz, a, dictionary, weight=weight, ridge=1e-3, method=method)
        for method in ("fista", "proximal")
        for weight in (1e2, 1e4)
    }
    assert all(found.ok for found in steps.values())
    assert steps["proximal", 1e4].iterations < steps["proximal", 1e2].iterations
    assert steps["proximal", 1e4].iterations < steps["fista", 1e4].iterations / 10


def test_a_composite_solve_that_stops_early_says_so() -> None:
    a, dictionary = case(24, 7, 5)
    _, slope, lipschitz = label_loss(24, 5)
    found = composite_nnls(slope, lipschitz, a, dictionary, weight=1.0, max_iterations=7)
    assert found.iterations == 7
    assert "raise max_iterations" in found.reason
    with pytest.raises(BadInput, match="weight must be above 0"):
        composite_nnls(slope, lipschitz, a, dictionary, weight=0.0)
    with pytest.raises(BadInput, match="fista, proximal"):
        composite_nnls(slope, lipschitz, a, dictionary, weight=1.0, method="hals")  # type: ignore[arg-type]


def test_so_many_iterations_are_made_and_no_more() -> None:
    calls = []

    def slope(s: Tensor) -> Tensor:
        calls.append(1)
        return s - 1

    found = fista(slope, 1.0, torch.zeros(3, 5), iterations=4)
    assert len(calls) == 4
    assert found.tolist() == torch.ones(3, 5).tolist()
    assert fista(slope, 1.0, torch.zeros(3, 5), iterations=0).tolist() == torch.zeros(3, 5).tolist()


# -- what the codes are good for ---------------------------------------------------------------------------------------


def test_the_envelope_has_the_gradient_of_its_residual() -> None:
    a, dictionary = case(5, 7, 3)
    value, slope, lipschitz = label_loss(5, 3)
    weight, ridge, step = 3.0, 1e-3, 1e-5

    def envelope(rows: Tensor) -> tuple[Tensor, Tensor]:
        s = composite_nnls(slope, lipschitz, rows, dictionary, weight=weight, ridge=ridge, tolerance=1e-14).x
        fit = (rows - s @ dictionary.T).square().sum(1) + ridge * s.square().sum(1)
        return value(s) + weight / 2 * fit, s

    _, s = envelope(a)
    gradient = weight * (a - s @ dictionary.T)
    for column in range(7):
        move = step * torch.eye(7, dtype=torch.float64)[column]
        difference = (envelope(a + move)[0] - envelope(a - move)[0]) / (2 * step)
        torch.testing.assert_close(difference, gradient[:, column], rtol=0, atol=1e-7)


def test_the_contrast_tends_to_the_implicit_gradient() -> None:
    a, dictionary = case(24, 7, 5)
    _, slope, lipschitz = label_loss(24, 5)
    gram, _ = gram_and_cross(a, dictionary, 1e-3)
    s0 = nnls(a, dictionary, ridge=1e-3).x
    implicit = solve_free(gram, s0 > 0, slope(s0)) @ dictionary.T

    def pulled(sign: float, weight: float) -> Tensor:
        settings = {"weight": weight, "ridge": 1e-3, "start": s0, "tolerance": 1e-15}
        return composite_nnls(lambda s: sign * slope(s), lipschitz, a, dictionary, method="proximal", **settings).x

    one, two = {}, {}
    for weight in (1e4, 1e5):
        plus, minus = pulled(1.0, weight), pulled(-1.0, weight)
        assert torch.equal(plus > 0, s0 > 0)
        norm = torch.linalg.vector_norm(implicit)
        one[weight] = float(torch.linalg.vector_norm(weight * (s0 - plus) @ dictionary.T - implicit) / norm)
        two[weight] = float(torch.linalg.vector_norm(weight / 2 * (minus - plus) @ dictionary.T - implicit) / norm)
    assert one[1e4] < 1e-2
    assert 9 < one[1e4] / one[1e5] < 11
    assert two[1e4] < 1e-4
    assert 80 < two[1e4] / two[1e5] < 120
