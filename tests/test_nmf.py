"""Factorisation: its updates fall, its columns stay unit, its dead factors come back, and scikit-learn is matched."""

from __future__ import annotations

import importlib
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from codes import case, uniform
from piecework.solvers import nmf, nnls
from piecework.solvers.nmf import dead, relative_error, revive, start_dictionary, sweep_dictionary, unit_columns
from piecework.training import BadInput, stream


def objective(a: Tensor, codes: Tensor, dictionary: Tensor, ridge: float = 0.0) -> float:
    return float((a - codes @ dictionary.T).square().sum() + ridge * codes.square().sum()) / 2


def assert_factors(codes: Tensor, dictionary: Tensor) -> None:
    assert (codes >= 0).all()
    assert (dictionary >= 0).all()
    norms = torch.linalg.vector_norm(dictionary, dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-12)


# -- the dictionary ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 24), d=st.integers(1, 9), r=st.integers(1, 9), seed=st.integers(0, 1000))
def test_column_updates_never_raise_the_objective(n: int, d: int, r: int, seed: int) -> None:
    a, dictionary = case(n, d, r, seed=seed)
    codes = (uniform(n, r, seed=seed + 9) - 0.3).clamp_min(0)
    gram, cross = codes.T @ codes, a.T @ codes
    before = objective(a, codes, dictionary)
    for _ in range(10):
        dictionary = sweep_dictionary(dictionary, gram, cross, sweeps=1)
        now = objective(a, codes, dictionary)
        assert now <= before * (1 + 1e-12)
        assert_factors(codes, dictionary)
        before = now


def test_a_column_update_is_the_best_unit_column() -> None:
    a, dictionary = case(24, 3, 3)
    codes = uniform(24, 3, seed=9)
    swept = sweep_dictionary(dictionary, codes.T @ codes, a.T @ codes, sweeps=1)
    last = objective(a, codes, swept)
    tries = unit_columns(uniform(3, 20_000, seed=10))[0]
    others = swept.clone()
    values = []
    for column in tries.T[:2000]:
        others[:, 2] = column  # the last to be updated: the others are as they were then
        values.append(objective(a, codes, others))
    assert last <= min(values)
    assert min(values) < last * 1.01


def test_a_column_has_the_direction_of_the_usual_update() -> None:
    a, dictionary = case(24, 7, 1)
    codes = uniform(24, 1, seed=9)
    gram, cross = codes.T @ codes, a.T @ codes
    usual = (dictionary + (cross - dictionary @ gram) / gram).clamp_min(0)
    torch.testing.assert_close(sweep_dictionary(dictionary, gram, cross), unit_columns(usual)[0], rtol=0, atol=1e-14)


def test_a_column_that_no_code_uses_stays() -> None:
    a, dictionary = case(24, 7, 3)
    codes = uniform(24, 3, seed=9)
    codes[:, 1] = 0
    swept = sweep_dictionary(dictionary, codes.T @ codes, a.T @ codes)
    assert torch.equal(swept[:, 1], dictionary[:, 1])
    assert not torch.equal(swept[:, 0], dictionary[:, 0])


def test_unit_columns_leave_the_product_as_it_was() -> None:
    a, dictionary = case(24, 7, 5)
    dictionary = dictionary * torch.tensor([1e-6, 0.0, 1.0, 3.0, 1e6], dtype=torch.float64)
    codes = uniform(24, 5, seed=9)
    unit, lengths = unit_columns(dictionary)
    norms = torch.linalg.vector_norm(unit, dim=0)
    torch.testing.assert_close(norms, torch.tensor([1, 0, 1, 1, 1.0], dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close((codes * lengths) @ unit.T, codes @ dictionary.T, rtol=1e-14, atol=0)
    moved = codes * lengths
    gram, cross = codes.T @ codes, a.T @ codes
    torch.testing.assert_close(lengths[:, None] * gram * lengths, moved.T @ moved, rtol=1e-13, atol=0)
    torch.testing.assert_close(cross * lengths, a.T @ moved, rtol=1e-13, atol=0)


# -- dead factors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [False, True])
def test_dead_factors_come_back_to_life(drawn: bool) -> None:
    a, dictionary = case(24, 7, 5)
    codes = nnls(a, dictionary).x
    codes[:, [1, 3]] = 0
    gram = codes.T @ codes
    assert dead(gram).tolist() == [False, True, False, True, False]
    revived = revive(dictionary, gram, a, codes, generator=stream(3) if drawn else None)
    assert torch.equal(revived[:, [0, 2, 4]], dictionary[:, [0, 2, 4]])
    assert not torch.equal(revived[:, 1], revived[:, 3])
    assert_factors(codes, revived)
    again = nnls(a, revived).x
    assert not dead(again.T @ again, part=1e-6).any()
    assert objective(a, again, revived) < objective(a, codes, dictionary)


def test_revival_takes_the_worst_rows_or_draws_by_a_generator() -> None:
    a, dictionary = case(24, 7, 3)
    codes = torch.zeros(24, 3, dtype=torch.float64)
    gram = torch.diag(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    worst = int(torch.linalg.vector_norm(a, dim=1).argmax())
    torch.testing.assert_close(revive(dictionary, gram, a, codes)[:, 1], a[worst] / a[worst].norm())
    one, same, other = (revive(dictionary, gram, a, codes, generator=stream(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_where_all_is_alive_or_all_fits_nothing_is_revived() -> None:
    a, dictionary = case(24, 7, 3)
    codes = uniform(24, 3, seed=9)
    assert revive(dictionary, codes.T @ codes, a, codes) is dictionary
    codes[:, 1] = 0
    fitted = codes @ dictionary.T
    assert torch.equal(revive(dictionary, codes.T @ codes, fitted, codes), dictionary)


# -- the start ---------------------------------------------------------------------------------------------------------


def test_the_start_finds_directions_that_differ() -> None:
    corners = torch.eye(5, dtype=torch.float64)
    a = corners.repeat(20, 1) * (1 + uniform(100, 1, seed=1))
    dictionary = start_dictionary(a, 5, generator=stream(0))
    assert sorted(dictionary.argmax(0).tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(dictionary, start_dictionary(a, 5, generator=stream(0)))
    assert_factors(a, dictionary)


@pytest.mark.parametrize("a", [torch.zeros(5, 7), torch.zeros(0, 7), torch.ones(2, 7)])
def test_the_start_manages_with_little(a: Tensor) -> None:
    dictionary = start_dictionary(a.double(), 4, generator=stream(0))
    assert dictionary.shape == (7, 4)
    assert_factors(a, dictionary)
    assert int(torch.linalg.matrix_rank(dictionary)) == 4  # no two are equal


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_objective_never_rises(ridge: float) -> None:
    a = uniform(24, 7, seed=1)
    found = nmf(a, 3, ridge=ridge, max_iterations=200, tolerance=0.0)
    assert len(found.history) == found.iterations
    assert bool((found.history.diff() <= 1e-12 * found.history[0]).all())
    last = objective(a, found.codes, found.dictionary, ridge)
    assert last <= float(found.history[-1]) * (1 + 1e-12)
    assert last == pytest.approx(float(found.history[-1]), rel=1e-3)
    assert_factors(found.codes, found.dictionary)
    torch.testing.assert_close(found.codes, nnls(a, found.dictionary, ridge=ridge).x, rtol=0, atol=1e-10)
    assert found.relative_error == pytest.approx(relative_error(a, found.codes, found.dictionary), abs=1e-15)


def test_an_exact_factorisation_is_found() -> None:
    parts = torch.eye(4, dtype=torch.float64).repeat_interleave(3, 0)  # (12, 4), parts that do not overlap
    a = uniform(24, 4, seed=3) @ parts.T
    found = nmf(a, 4, tolerance=0.0, max_iterations=500)
    assert found.relative_error < 1e-3


def test_a_factor_that_starts_dead_does_not_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    a = uniform(24, 7, seed=1) * torch.tensor([1, 1, 1, 1, 1, 1, 0.0], dtype=torch.float64)
    start = unit_columns(uniform(7, 3, seed=2))[0]
    start[:, 1] = torch.eye(7, dtype=torch.float64)[6]  # a direction that no row has
    expected = nmf(a[:, :6], 3).relative_error
    module = importlib.import_module("piecework.solvers.nmf")  # the function has the same name
    monkeypatch.setattr(module, "start_dictionary", lambda *_, **__: start)
    found = nmf(a, 3)
    assert not dead(found.codes.T @ found.codes, part=1e-3).any()
    assert found.relative_error == pytest.approx(expected, rel=0.1)


def theirs(a: Tensor, rank: int, init: str, seed: int) -> float:
    model = NMF(rank, init=init, solver="cd", random_state=seed, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        codes = model.fit_transform(a.numpy())
    return objective(a, torch.from_numpy(codes), torch.from_numpy(model.components_.T))


@pytest.mark.parametrize("name", ["digits", "random"])
def test_scikit_learn_does_not_fit_better(name: str) -> None:
    a = torch.from_numpy(load_digits().data[:600]) / 16 if name == "digits" else uniform(101, 24, seed=0)
    rank, seeds = (16, range(3)) if name == "digits" else (5, range(5))
    found = [nmf(a, rank, seed=seed, tolerance=1e-4 if name == "digits" else 1e-6) for seed in seeds]
    ours = torch.tensor([objective(a, each.codes, each.dictionary) for each in found])
    for init in ("random", "nndsvda"):
        their = torch.tensor([theirs(a, rank, init, seed) for seed in seeds])
        assert float(ours.median()) <= float(their.median()) * (1 + 1e-3)


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    a = uniform(24, 7, seed=1)
    state = torch.random.get_rng_state()
    one, same, other = (nmf(a, 3, seed=seed, max_iterations=5) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one.codes, same.codes)
    assert torch.equal(one.dictionary, same.dictionary)
    assert not torch.equal(one.dictionary, other.dictionary)


def test_an_early_stop_is_said_and_a_late_one_is_not() -> None:
    a = uniform(24, 7, seed=1)
    early, late = nmf(a, 3, max_iterations=5), nmf(a, 3)
    assert not early.ok
    assert "raise max_iterations" in early.reason
    assert early.iterations == 5
    assert late.ok
    assert late.iterations < 1000


def test_equal_rows_zeros_and_single_precision_are_no_trouble() -> None:
    found = nmf(torch.zeros(5, 7), 3)
    assert found.ok
    assert found.relative_error == 0
    assert_factors(found.codes, found.dictionary.double().div(found.dictionary.double().norm(dim=0)))
    assert nmf(torch.ones(5, 7), 3).relative_error < 1e-3
    single = nmf(uniform(24, 7, seed=1).float(), 3)
    assert single.codes.dtype == single.dictionary.dtype == torch.float32
    assert single.relative_error == pytest.approx(nmf(uniform(24, 7, seed=1), 3).relative_error, rel=0.05)


@pytest.mark.parametrize(
    ("a", "rank", "words"),
    [
        (torch.ones(5, 7), 0, "at least 1, got 0"),
        (torch.ones(5, 7), 8, "more than the 7 features"),
        (-torch.ones(5, 7), 3, "at least 0"),
        (torch.full((5, 7), math.nan), 3, "finite"),
        (torch.ones(5, 7, 3), 3, "matrix"),
    ],
)
def test_what_cannot_be_factorised_is_refused(a: Tensor, rank: int, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        nmf(a, rank)
