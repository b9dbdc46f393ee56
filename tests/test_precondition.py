"""Preconditioners against the matrices they stand for, at every damping, and against the spectra of two networks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import outer_rows, relu_factors, tanh_jacobian
from piecework.solvers import cg, sketch
from piecework.solvers.precondition import LowRank, Preconditioner, nystrom, rpcholesky, sampled, sketched
from piecework.training import BadInput, stream


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def _kernel(num: int = 24, rank: int = 40) -> Tensor:
    rows = _randn(num, rank)
    return rows @ rows.t()


def _pivoted(kernel: Tensor, **settings: float) -> LowRank:
    return rpcholesky(lambda index: kernel[:, index], kernel.diagonal(), **settings)  # type: ignore[arg-type]


def _dense(made: Preconditioner, num: int, damping: float) -> Tensor:
    return made.at(damping)(torch.eye(num, dtype=torch.float64))


def _iterations(made: Preconditioner | None, kernel: Tensor, b: Tensor, damping: float, tolerance: float = 1e-8) -> int:
    return cg(
        lambda v: kernel @ v + damping * v,
        b,
        precondition=made.at(damping) if made else None,
        tolerance=tolerance,
        max_iterations=900,
    ).iterations


def _effective(kernel: Tensor, damping: float) -> float:
    values = torch.linalg.eigvalsh(kernel).clamp_min(0)
    return float((values / (values + damping)).sum())


def _whole(kernel: Tensor) -> dict[str, Preconditioner]:
    """Every kind, made so that it knows all of the kernel."""
    num = len(kernel)
    values, vectors = torch.linalg.eigh(kernel)
    root = vectors * values.clamp_min(0).sqrt()
    return {
        "rpcholesky": _pivoted(kernel, rank=num, block=7),
        "nystrom": nystrom(lambda v: kernel @ v, num, rank=num),
        "sketched": sketched(torch.cat([root, torch.zeros(num, 3, dtype=root.dtype)], 1)),
        "sampled": sampled(kernel),
    }


# -- what is exact is the inverse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3, 50.0])
@pytest.mark.parametrize("name", ["rpcholesky", "nystrom", "sketched", "sampled"])
def test_a_preconditioner_that_knows_the_kernel_is_its_inverse(name: str, damping: float) -> None:
    kernel = _kernel()
    made = _whole(kernel)[name]
    product = _dense(made, 24, damping) @ (kernel + damping * torch.eye(24, dtype=torch.float64))
    scale = float(product.diagonal().mean())
    torch.testing.assert_close(product / scale, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-9)
    assert made.rank == 24
    if damping:
        assert made.effective_dimension(damping) == pytest.approx(_effective(kernel, damping), rel=1e-9)


@pytest.mark.parametrize("name", ["rpcholesky", "nystrom", "sketched", "sampled"])
def test_one_factorisation_serves_every_damping_in_any_order(name: str) -> None:
    kernel, v = _kernel(), _randn(24, 3, seed=2)
    made = _whole(kernel)[name]
    for damping in (1.0, 0.1, 1.0):
        expected = _whole(kernel)[name].at(damping)(v)
        assert torch.equal(made.at(damping)(v), expected)
    torch.testing.assert_close(made.at(1.0)(v)[:, 1], made.at(1.0)(v[:, 1]), rtol=1e-12, atol=1e-14)
    assert made.at(1.0)(v.float()).dtype == torch.float32


@pytest.mark.parametrize("name", ["rpcholesky", "nystrom", "sketched", "sampled"])
def test_a_single_row_and_a_kernel_of_zeros_are_nothing_special(name: str) -> None:
    one = torch.full((1, 1), 3.0, dtype=torch.float64)
    made = _whole(one)[name]
    assert _iterations(made, one, torch.ones(1, dtype=torch.float64), 0.5) == 1
    zero = torch.zeros(5, 5, dtype=torch.float64)
    for damping in (0.0, 0.5):
        found = _whole(zero)[name].at(damping)(_randn(5))
        assert bool(torch.isfinite(found).all())
        torch.testing.assert_close(found / found.norm(), _randn(5) / _randn(5).norm())


@pytest.mark.parametrize("name", ["rpcholesky", "nystrom", "sketched", "sampled"])
def test_a_kernel_without_full_rank_is_solved_in_its_range_and_with_damping(name: str) -> None:
    kernel = _kernel(24, 5)
    made = _whole(kernel)[name]
    assert _iterations(made, kernel, _randn(24, seed=3), 1e-3) <= 2
    assert _iterations(made, kernel, kernel @ _randn(24, seed=3), 0.0) <= 3
    if isinstance(made, LowRank):
        assert made.rank == 5
    else:
        assert float(torch.linalg.cond(_dense(made, 24, 0.0))) < 1e15
    if name == "rpcholesky":  # it knows that nothing is left, and takes the rest for the damping alone
        assert _iterations(made, kernel, _randn(24, seed=3), 1e-3) == 1


# -- low rank ----------------------------------------------------------------------------------------------------------


def test_a_low_rank_preconditioner_is_the_formula_of_the_paper() -> None:
    basis = torch.linalg.qr(_randn(24, 5)).Q
    values = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    damping, v = 0.1, _randn(24, seed=1)
    expected = (0.5 + damping) * basis @ ((basis.t() @ v) / (values + damping)) + v - basis @ (basis.t() @ v)
    torch.testing.assert_close(LowRank(basis, values).at(damping)(v), expected, rtol=0, atol=1e-13)
    level = 0.02 * basis @ ((basis.t() @ v) / (values + 0.02)) + v - basis @ (basis.t() @ v)
    torch.testing.assert_close(LowRank(basis, values, floor=0.0).at(0.02)(v), level, rtol=0, atol=1e-13)


def test_the_part_that_is_not_known_counts_by_its_trace() -> None:
    basis = torch.eye(24, 3, dtype=torch.float64)
    values = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    known = 4 / 5 + 2 / 3 + 1 / 2
    assert LowRank(basis, values).effective_dimension(1.0) == pytest.approx(known)
    assert LowRank(basis, values, tail=2.1).effective_dimension(1.0) == pytest.approx(known + 21 * 0.1 / 1.1)
    assert LowRank(basis, values, tail=2.1).effective_dimension(0.0) == 24


def test_a_full_basis_leaves_nothing_of_the_rest_however_small_the_damping() -> None:
    basis = torch.linalg.qr(_randn(24, 24)).Q
    values = torch.logspace(0, -12, 24, dtype=torch.float64)
    found = LowRank(basis, values, floor=0.0).at(1e-12)(basis)
    torch.testing.assert_close(found / (1e-12 / (values + 1e-12)), basis, rtol=0, atol=1e-3)


def test_pivots_that_explain_nothing_are_not_drawn_again() -> None:
    made = rpcholesky(lambda index: torch.zeros(24, len(index)), torch.ones(24), rank=24, block=5)
    assert made.rank == 0


def test_pivoted_cholesky_explains_the_pivots_and_never_overshoots() -> None:
    kernel = _kernel()
    asked: list[Tensor] = []

    def columns(index: Tensor) -> Tensor:
        asked.append(index)
        return kernel[:, index]

    made = rpcholesky(columns, kernel.diagonal(), rank=10, block=4)
    pivots = torch.cat(asked)
    assert [len(index) for index in asked] == [4, 4, 2]
    assert len(set(pivots.tolist())) == 10
    found = made.basis @ torch.diag(made.values) @ made.basis.t()
    torch.testing.assert_close(found[:, pivots], kernel[:, pivots], rtol=0, atol=1e-10)
    rest = kernel - found
    assert float(torch.linalg.eigvalsh(rest)[0]) > -1e-10
    assert made.tail == pytest.approx(float(rest.trace()), rel=1e-10)
    torch.testing.assert_close(made.basis.t() @ made.basis, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((made.values[1:] <= made.values[:-1]).all())


def test_pivots_follow_the_diagonal() -> None:
    kernel = torch.diag(torch.cat([torch.full((3,), 1e6), torch.ones(300)]).double())
    made = _pivoted(kernel, rank=3, block=3, seed=1)
    torch.testing.assert_close(made.values, torch.full((3,), 1e6, dtype=torch.float64))
    other = _pivoted(kernel, rank=50, block=8, seed=2)
    again = _pivoted(kernel, rank=50, block=8, seed=2)
    assert torch.equal(other.basis, again.basis)
    assert not torch.equal(other.basis, _pivoted(kernel, rank=50, block=8, seed=3).basis)


def test_pivoted_cholesky_stops_at_the_tolerance_or_when_nothing_is_left() -> None:
    _, rows, _ = tanh_jacobian(120)
    kernel = rows @ rows.t()
    made = _pivoted(kernel, rank=120, block=8, tolerance=1e-4)
    assert made.tail <= 1e-4 * float(kernel.trace())
    assert made.rank < 40
    assert _pivoted(_kernel(24, 5), rank=24, block=8).rank == 5


def test_the_rank_follows_the_effective_dimension() -> None:
    _, rows, y = tanh_jacobian(400)
    kernel = rows @ rows.t()
    mean = float(kernel.trace()) / 400
    for relative in (1e-4, 1e-6, 1e-8):
        damping = relative * mean
        dimension = _effective(kernel, damping)
        made = _pivoted(kernel, damping=damping, block=16)
        assert dimension < made.rank <= 2 * dimension + 32
        assert made.effective_dimension(damping) == pytest.approx(dimension, rel=0.05)
        assert _iterations(made, kernel, y, damping) <= 10
    assert _pivoted(kernel, damping=10 * float(kernel.trace()), block=16).rank == 0  # less is left than the damping


def test_eigenvalues_are_looked_at_as_the_factor_grows_and_not_at_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    values = torch.linalg.eigvalsh

    def counted(matrix: Tensor) -> Tensor:
        looks.append(len(matrix))
        return values(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", counted)
    rows = torch.randn(400, 500, generator=stream(3), dtype=torch.float64)
    kernel = rows @ rows.t()
    made = rpcholesky(lambda index: kernel[:, index], kernel.diagonal(), damping=1e-3, block=4)
    assert made.rank == 200
    assert len(looks) < 20  # of 50 blocks
    assert all(later >= 1.25 * earlier for earlier, later in pairwise(looks))


def test_pivoted_cholesky_needs_as_few_iterations_as_measured_before() -> None:
    _, rows, y = tanh_jacobian(1024)
    kernel = rows @ rows.t()
    made = _pivoted(kernel, rank=128)
    mean = float(kernel.trace()) / 1024
    for relative, known in ((1e-4, 2), (1e-6, 3), (1e-8, 5), (1e-10, 10)):
        assert _iterations(made, kernel, y, relative * mean) <= 2 * known


@pytest.mark.parametrize("name", ["rpcholesky", "nystrom"])
def test_low_rank_from_single_precision_keeps_no_rounding_as_if_it_were_kernel(name: str) -> None:
    _, rows, y = tanh_jacobian(400)
    kernel = rows @ rows.t()
    single = kernel.float()
    made = (
        _pivoted(single, rank=400)
        if name == "rpcholesky"
        else nystrom(lambda v: single @ v, 400, rank=200, like=single)
    )
    mean = float(kernel.trace()) / 400
    assert made.basis.dtype == torch.float64
    expected = torch.linalg.eigvalsh(kernel).flip(0)[: made.rank]
    assert 10 < made.rank < 80
    assert float((made.values / expected - 1).abs().max()) < 1
    assert _iterations(made, kernel, y, 1e-4 * mean) <= 25 < 0.2 * _iterations(None, kernel, y, 1e-4 * mean)


def test_pivoted_cholesky_of_single_precision_never_overshoots_by_more_than_its_rounding() -> None:
    _, rows, _ = tanh_jacobian(400)
    kernel = rows @ rows.t()
    made = _pivoted(rows.float() @ rows.float().t(), rank=400, seed=1)
    rest = torch.linalg.eigvalsh(kernel - made.basis @ torch.diag(made.values) @ made.basis.t())
    assert float(rest[0]) > -4e-7 * float(made.values[0])


def test_the_shift_of_nystrom_is_taken_off_again() -> None:
    made = nystrom(lambda v: v, 300, rank=200, like=torch.zeros(0))
    assert made.rank == 200
    assert float((made.values - 1).abs().max()) < 8e-7  # the shift is 1.7e-6


def test_nystrom_knows_the_largest_eigenvalues_from_below() -> None:
    _, rows, y = tanh_jacobian(400)
    kernel = rows @ rows.t()
    made = nystrom(lambda v: kernel @ v, 400, rank=60, seed=1)
    exact = torch.linalg.eigvalsh(kernel).flip(0)[: made.rank]
    assert made.rank == 60
    torch.testing.assert_close(made.values[:30], exact[:30], rtol=1e-2, atol=0)
    assert bool((made.values <= exact * (1 + 1e-9)).all())
    damping = 1e-6 * float(kernel.trace()) / 400
    assert _iterations(made, kernel, y, damping) <= 15


# -- sketches and samples ----------------------------------------------------------------------------------------------


def test_a_sketch_in_single_precision_preconditions_in_double() -> None:
    _, rows, y = tanh_jacobian(256)
    kernel = rows @ rows.t()
    made = sketched(sketch.sparse_sign(rows, 512, 1).float())
    mean = float(kernel.trace()) / 256
    for relative, most in ((1e-4, 20), (1e-6, 26), (1e-8, 34), (1e-10, 48)):
        found = cg(
            lambda v, damping=relative * mean: rows @ (rows.t() @ v) + damping * v,
            y,
            precondition=made.at(relative * mean),
            tolerance=1e-10,
        )
        assert found.iterations <= most
        # float64 itself leaves about this much: eps |K| |g| / |r|
        floor = 2e-16 * float(torch.linalg.matrix_norm(kernel, 2) * found.x.norm() / y.norm())
        assert found.residual < max(2e-10, 5 * floor)


def test_a_short_sketch_serves_where_the_effective_dimension_is_low() -> None:
    _, rows, y = tanh_jacobian(256)
    kernel = rows @ rows.t()
    damping = 1e-6 * float(kernel.trace()) / 256
    short = sketched(sketch.sparse_sign(rows, 92, 1))
    assert short.rank == 92
    assert _iterations(short, kernel, y, damping) <= 50
    assert short.effective_dimension(damping) == pytest.approx(_effective(kernel, damping), rel=0.2)


def test_what_a_short_sketch_does_not_see_is_not_taken_for_nothing() -> None:
    rows = outer_rows(*relu_factors(200, 500))
    kernel, b = rows @ rows.t(), _randn(200, seed=3)
    damping = 1e-4 * float(kernel.trace()) / 200
    short = sketched(sketch.sparse_sign(rows, 60, 1))
    assert isinstance(short, LowRank)
    woodbury = LowRank(short.basis, short.values, floor=0.0)
    found = _iterations(short, kernel, b, damping)
    assert 2 * found < _iterations(woodbury, kernel, b, damping)
    assert found < 1.3 * _iterations(None, kernel, b, damping)


@pytest.mark.parametrize(("factor", "most"), [(2, 80), (4, 45)])
def test_sampled_units_precondition_like_a_dense_sketch(factor: int, most: int) -> None:
    n = 200
    x, active = relu_factors(n, 1000)
    kernel = (x @ x.t()) * (active @ active.t())
    index, weight = sketch.sample_units(active.square().sum(0), factor * n // 16, 1)
    made = sampled((x @ x.t()) * ((active[:, index] * weight) @ active[:, index].t()))
    assert _iterations(made, kernel, _randn(n, seed=3), 0.0, 1e-10) <= most


def test_a_sampled_kernel_that_rounding_made_indefinite_still_preconditions() -> None:
    kernel = _kernel(24, 5)
    single = kernel.float() - 1e-5 * torch.eye(24)
    made = sampled(single)
    v = _randn(24, seed=4)
    assert float(v @ made.at(1e-7)(v)) > 0
    assert _iterations(made, kernel, kernel @ v, 1e-3) <= 8


# -- what is not finite, and refusals ----------------------------------------------------------------------------------


def test_what_is_not_finite_leaves_the_identity() -> None:
    bad, v = _kernel(), _randn(24)
    bad[3, 3] = float("nan")
    finite = torch.ones(24, dtype=torch.float64)
    for made in (
        _pivoted(bad, rank=9),
        rpcholesky(lambda index: bad[:, index], finite, rank=24),
        nystrom(lambda u: bad @ u, 24, rank=9),
        sketched(bad),
        sketched(bad[:, :9]),
        sampled(bad),
    ):
        assert made.rank == 0
        assert torch.equal(made.at(0.1)(v), v)
        assert made.effective_dimension(0.1) == 0


def test_what_cannot_be_preconditioned_is_refused_in_a_sentence() -> None:
    kernel = _kernel()
    for bad, message in (
        (lambda: rpcholesky(lambda index: kernel[:, index], kernel), r"\(24, 24\)"),
        (lambda: _pivoted(kernel, rank=0), "rank=0"),
        (lambda: _pivoted(kernel, rank=3, tolerance=math.nan), "tolerance=nan"),
        (lambda: nystrom(lambda v: v, 5, rank=0), "at least one column"),
        (lambda: sketched(kernel[0]), r"\(24,\)"),
        (lambda: sampled(kernel[:5]), r"\(5, 24\)"),
    ):
        with pytest.raises(BadInput, match=message):
            bad()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["rpcholesky", "nystrom", "sketched", "short", "sampled"]),
    st.integers(1, 24),
    st.integers(1, 30),
    st.sampled_from([0.0, 1e-9, 1e-3, 10.0]),
    st.integers(0, 99),
)
def test_every_preconditioner_is_symmetric_and_definite(
    name: str, num: int, rank: int, damping: float, seed: int
) -> None:
    rows = _randn(num, rank, seed=seed)
    kernel = rows @ rows.t()
    made: Preconditioner = {
        "rpcholesky": lambda: _pivoted(kernel, rank=max(num // 2, 1), block=3, seed=seed),
        "nystrom": lambda: nystrom(lambda v: kernel @ v, num, rank=max(num // 2, 1), seed=seed),
        "sketched": lambda: sketched(sketch.count(rows, 2 * num, seed)),
        "short": lambda: sketched(sketch.count(rows, max(num // 2, 1), seed)),
        "sampled": lambda: sampled(kernel),
    }[name]()
    inverse = _dense(made, num, damping)
    assert bool(torch.isfinite(inverse).all())
    values = torch.linalg.eigvalsh((inverse + inverse.t()) / 2)
    torch.testing.assert_close(inverse, inverse.t(), rtol=0, atol=1e-6 * float(values[-1]))
    assert float(values[0]) > -1e-12 * float(values[-1])
