"""Sketches: unbiased, the same for every shard, and embeddings as good as theory says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import outer_rows, relu_factors
from piecework.solvers import sketch
from piecework.training import BadInput, stream

Sketch = Callable[[Tensor, Tensor, int, int], Tensor]
"""(a, d, num, seed) -> a sketch of the rows d_i outer a_i."""

ROWS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "count": sketch.count,
    "sparse-sign": sketch.sparse_sign,
    "srht": sketch.srht,
}
KINDS: dict[str, Sketch] = {
    **{name: lambda a, d, num, seed, f=f: f(outer_rows(a, d), num, seed) for name, f in ROWS.items()},
    "tensorsketch": sketch.tensorsketch,
    "tensor-srht": sketch.tensor_srht,
}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def _far_from_mean(draws: Tensor, expected: Tensor) -> float:
    """In standard errors, the largest distance of the mean over draws (k, ...) from what was expected."""
    error = draws.std(0) / math.sqrt(len(draws))
    return float(((draws.mean(0) - expected).abs() / (error + 1e-12)).max())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("num", "width"), [(5, 7), (24, 3)])
def test_the_gram_matrix_of_a_sketch_is_unbiased(name: str, num: int, width: int) -> None:
    a, d = _randn(5, 3), _randn(5, width, seed=1)
    rows = outer_rows(a, d)
    found = [KINDS[name](a, d, num, seed) for seed in range(400)]
    assert found[0].shape == (5, num)
    draws = torch.stack([y @ y.t() for y in found])
    assert _far_from_mean(draws, rows @ rows.t()) < 5
    assert float(draws.std(0).max()) > 0


@pytest.mark.parametrize("name", KINDS)
def test_the_rows_of_a_shard_get_the_same_sketch(name: str) -> None:
    a, d = _randn(24, 3), _randn(24, 5, seed=1)
    whole = KINDS[name](a, d, 9, 4)
    parts = [KINDS[name](a[k : k + 7], d[k : k + 7], 9, 4) for k in range(0, 24, 7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-14)
    assert KINDS[name](a[:0], d[:0], 9, 4).shape == (0, 9)
    assert not torch.equal(KINDS[name](a, d, 9, 5), whole)


@pytest.mark.parametrize("name", KINDS)
def test_a_sketch_keeps_the_dtype_and_leaves_the_global_generator_alone(name: str) -> None:
    a, d = _randn(5, 3), _randn(5, 3, seed=1)
    before = torch.random.get_rng_state()
    found = KINDS[name](a.float(), d.float(), 6, 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), KINDS[name](a, d, 6, 0), rtol=0, atol=1e-5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_sketch_preconditions_as_well_as_a_gaussian_matrix(name: str, factor: int) -> None:
    n = 200
    a, d = relu_factors(n, 1000)
    rows = outer_rows(a, d)
    r = torch.linalg.qr(KINDS[name](a, d, factor * n, 1).t(), mode="r").R
    found = float(torch.linalg.cond(torch.linalg.solve_triangular(r.t(), rows, upper=False)))
    expected = (math.sqrt(factor) + 1) / (math.sqrt(factor) - 1)
    assert abs(found / expected - 1) < 0.2


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_any_widths_can_be_sketched_to_any_number_of_columns(name: str, wa: int, wd: int, num: int, seed: int) -> None:
    a, d = _randn(3, wa), _randn(3, wd, seed=1)
    found = KINDS[name](a, d, num, seed)
    assert found.shape == (3, num)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(KINDS[name](2 * a, d, num, seed), 2 * found, rtol=1e-12, atol=1e-12)  # linear


def test_a_whole_hadamard_transform_keeps_every_inner_product() -> None:
    rows = _randn(5, 13)
    found = sketch.srht(rows, 16, 3)
    torch.testing.assert_close(found @ found.t(), rows @ rows.t(), rtol=0, atol=1e-12)
    a, d = _randn(5, 3), _randn(5, 4, seed=1)
    found, rows = sketch.tensor_srht(a, d, 16, 3), outer_rows(a, d)
    torch.testing.assert_close(found @ found.t(), rows @ rows.t(), rtol=0, atol=1e-12)


def test_a_hadamard_sample_takes_columns_from_everywhere() -> None:
    rows = torch.zeros(2, 16, dtype=torch.float64)
    rows[0, 0] = rows[1, 8] = 1  # the same in the first half of the transform, up to a sign
    inner = [float((y[0] * y[1]).sum()) for y in (sketch.srht(rows, 8, seed) for seed in range(20))]
    assert sum(abs(x) < 0.9 for x in inner) > 10


def test_the_fast_hadamard_transform_is_the_matrix() -> None:
    from scipy.linalg import hadamard

    rows = _randn(3, 5)
    matrix = torch.from_numpy(hadamard(8)).double()
    torch.testing.assert_close(sketch.hadamard(rows, 8), rows @ matrix[:5], rtol=0, atol=1e-13)
    assert torch.equal(sketch.hadamard(rows[:, :1], 1), rows[:, :1])


def test_count_sketch_adds_each_column_once() -> None:
    found = sketch.count(torch.eye(24, dtype=torch.float64), 5, 0)
    assert torch.equal(found.abs().sum(1), torch.ones(24, dtype=torch.float64))
    assert bool((found.abs().sum(0) > 0).all())


def test_sparse_signs_put_their_entries_in_different_columns() -> None:
    found = sketch.sparse_sign(torch.eye(24, dtype=torch.float64), 21, 0, nonzeros=8)
    assert torch.equal((found != 0).sum(1), torch.full((24,), 8))
    torch.testing.assert_close(found.square().sum(1), torch.ones(24, dtype=torch.float64))
    assert bool((found != 0).any(0).all())  # groups of 3 and of 2 columns are both used to the end


def test_a_tensor_sketch_is_a_count_sketch_of_the_outer_product() -> None:
    a, d = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    for i in range(3):
        found = sketch.tensorsketch(a[:1], d[i : i + 1], 8, 0, copies=1)
        torch.testing.assert_close(
            found.abs().sort().values[0], torch.eye(8, dtype=torch.float64)[7], atol=1e-14, rtol=0
        )


def test_copies_of_a_tensor_sketch_are_independent() -> None:
    a, d = _randn(3, 5), _randn(3, 5, seed=1)
    found = sketch.tensorsketch(a, d, 12, 0, copies=2)
    assert not torch.allclose(found[:, :6].abs().sort(1).values, found[:, 6:].abs().sort(1).values)


# -- sampled units -----------------------------------------------------------------------------------------------------


def _units(seed: int = 0) -> Tensor:
    """(5, 24) activations of 24 units, of sizes that differ by a factor of 40, and one that is dead."""
    size = torch.logspace(-0.8, 0.8, 24, dtype=torch.float64)
    size[7] = 0
    return _randn(5, 24, seed=seed) * size


@pytest.mark.parametrize("num", [1, 5, 12, 23])
def test_a_sample_of_units_is_unbiased(num: int) -> None:
    x = _units()
    draws = []
    for seed in range(400):
        index, weight = sketch.sample_units(x.square().sum(0), num, seed)
        draws.append((x[:, index] * weight) @ x[:, index].t())
    found = torch.stack(draws)
    assert _far_from_mean(found, x @ x.t()) < 5


def test_a_sample_of_units_has_its_size_and_the_whole_trace() -> None:
    x = _units()
    norms = x.square().sum(0)
    for seed in range(20):
        index, weight = sketch.sample_units(norms, 9, seed)
        assert len(index) == len(set(index.tolist())) == 9
        assert 7 not in index.tolist()
        torch.testing.assert_close((weight * norms[index]).sum(), norms.sum(), rtol=1e-12, atol=0)
        assert float(weight.min()) >= 1


def test_a_unit_too_large_for_chance_is_always_there_with_weight_1() -> None:
    norms = torch.ones(24, dtype=torch.float64)
    norms[5] = 1000
    drawn = torch.zeros(24)
    for seed in range(300):
        index, weight = sketch.sample_units(norms, 4, seed)
        assert float(weight[index == 5]) == 1
        torch.testing.assert_close(weight[index != 5], torch.full((3,), 23 / 3, dtype=torch.float64))
        drawn[index] += 1
    others = torch.cat([drawn[:5], drawn[6:]])
    assert float((others - 300 * 3 / 23).abs().max()) < 5 * math.sqrt(300 * 3 / 23)


def test_equal_units_are_sampled_in_every_combination() -> None:
    seen = {tuple(sketch.sample_units(torch.ones(5), 2, seed)[0].tolist()) for seed in range(200)}
    assert len(seen) == 10


def test_as_many_units_as_there_are_is_all_of_them() -> None:
    norms = torch.arange(5.0)
    for num in (5, 9):
        index, weight = sketch.sample_units(norms, num, 0)
        assert index.tolist() == [0, 1, 2, 3, 4]
        assert weight.tolist() == [1] * 5
    index, weight = sketch.sample_units(norms, 4, 0)  # one is dead
    assert (index.tolist(), weight.tolist()) == ([1, 2, 3, 4], [1] * 4)


def test_units_without_norms_to_go_by_are_sampled_evenly() -> None:
    for norms in (torch.zeros(9), torch.full((9,), float("nan"))):
        index, weight = sketch.sample_units(norms, 3, 0)
        assert len(index) == 3
        torch.testing.assert_close(weight, torch.full((3,), 3.0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(1, 30), st.integers(0, 99))
def test_a_sample_is_never_larger_than_asked_and_never_loses_weight(norms: list[float], num: int, seed: int) -> None:
    square = torch.tensor(norms, dtype=torch.float64)
    index, weight = sketch.sample_units(square, num, seed)
    assert 1 <= len(index) <= max(num, 1)
    assert bool((weight >= 1).all() & torch.isfinite(weight).all())
    assert bool((index[1:] > index[:-1]).all())
    alive = int((square > 1e-30 * square.max()).sum())
    if alive > 0:
        assert len(index) >= min(num, alive)
        torch.testing.assert_close((weight * square[index]).sum(), square.sum(), rtol=1e-9, atol=0)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_sketched_is_refused_in_a_sentence() -> None:
    rows = _randn(5, 3)
    for bad, message in (
        (lambda: sketch.count(rows, 0, 0), "num=0"),
        (lambda: sketch.srht(rows.half(), 4, 0), "float16"),
        (lambda: sketch.sparse_sign(rows[0], 4, 0), r"\(3,\)"),
        (lambda: sketch.sparse_sign(rows, 4, 0, nonzeros=0), "nonzeros=0"),
        (lambda: sketch.tensorsketch(rows, rows[:3], 4, 0), "5 rows .* 3 rows"),
        (lambda: sketch.tensor_srht(rows, rows.float(), 4, 0), "float32"),
        (lambda: sketch.tensorsketch(rows, rows, 4, 0, copies=0), "copies=0"),
        (lambda: sketch.sample_units(rows, 4, 0), r"\(5, 3\)"),
        (lambda: sketch.sample_units(rows[0], 0, 0), "num=0"),
    ):
        with pytest.raises(BadInput, match=message):
            bad()
