"""K + damping I with K at hand: its factorisation, what repairs it, and the limits of either precision."""

from __future__ import annotations

import math

import pytest
import torch

from jacobian_cases import randn
from kernels import tanh_jacobian, true_residual
from piecework.solvers import damped
from piecework.solvers.damped import DampedGram, exact


def test_a_kernel_that_rounding_made_unsymmetric_is_symmetrised() -> None:
    rows, rhs = randn(5, 9), randn(5, seed=1)
    kernel = rows @ rows.t()
    skew = 1e-3 * randn(5, 5, seed=2)
    found = exact(kernel + (skew - skew.t()), rhs, 0.1)
    torch.testing.assert_close(found.x, exact(kernel, rhs, 0.1).x, rtol=0, atol=1e-12)
    before = kernel.clone()
    exact(kernel, rhs, 3.0)
    assert torch.equal(kernel, before)


def test_a_kernel_that_rounding_made_indefinite_is_repaired_and_still_solved() -> None:
    values = torch.logspace(0, 6, 24, dtype=torch.float64)
    values[0] = -1e-9  # of the mean diagonal: 1e-14
    vectors = torch.linalg.qr(randn(24, 24)).Q
    kernel = vectors @ torch.diag(values) @ vectors.t()
    rhs = vectors[:, 1:] @ randn(23, seed=1)
    found = exact(kernel, rhs, 0.0)
    assert found.ok
    assert found.iterations > 1
    assert float((kernel @ found.x - rhs).norm() / rhs.norm()) < 1e-6


def test_a_small_eigenvalue_is_solved_for_by_refinement_and_not_cut_off() -> None:
    values = torch.logspace(0, 6, 24, dtype=torch.float64)
    values[0], values[1] = -1e-9, 1.9e-8  # the second is below what eigenvalues are cut at
    vectors = torch.linalg.qr(randn(24, 24)).Q
    kernel = vectors @ torch.diag(values) @ vectors.t()
    rhs = vectors[:, 1] + vectors[:, 5]
    found = exact(kernel, rhs, 0.0)
    assert found.residual < 0.05
    assert "too near to singular" in found.reason


def test_a_right_hand_side_outside_the_range_gets_the_least_squares_answer_and_a_reason() -> None:
    rows, rhs = randn(24, 5), randn(24, seed=1)
    kernel = rows @ rows.t()
    found = exact(kernel, rhs, 0.0)
    outside = float((rhs - rows @ torch.linalg.lstsq(rows, rhs).solution).norm() / rhs.norm())
    assert "too near to singular" in found.reason
    assert found.residual == pytest.approx(outside, rel=1e-6)
    torch.testing.assert_close(found.x, torch.linalg.pinv(kernel) @ rhs, rtol=0, atol=1e-8)


def test_a_kernel_far_from_definite_is_not_solved_in_silence() -> None:
    kernel = torch.diag(torch.tensor([4.0, 2.0, -3.0], dtype=torch.float64))
    found = exact(kernel, torch.ones(3, dtype=torch.float64), 0.5)
    assert not found.ok
    torch.testing.assert_close(found.x, torch.tensor([1 / 4.5, 1 / 2.5, 0], dtype=torch.float64))
    assert found.residual == pytest.approx(math.sqrt(1 / 3))


@pytest.mark.parametrize("smooth", [True, False])
def test_a_kernel_in_single_precision_never_gives_a_wrong_answer_in_silence(smooth: bool) -> None:
    _, rows, y = tanh_jacobian(256)
    rhs = y if smooth else randn(256, seed=3)
    single = rows.float() @ rows.float().t()
    mean = float(rows.square().sum()) / 256
    silent = 0
    for relative in (1e3, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10):
        found = exact(single, rhs, relative * mean)
        truth = true_residual(rows, rhs, relative * mean, found.x)
        assert found.x.dtype == torch.float64
        assert truth / 2 < found.residual < 5 * truth + 1e-6
        silent += found.ok
        assert found.ok == (found.residual <= 1e-6)
        if 1e-6 < found.residual < 1e-3:
            assert "float64" in found.reason
            assert exact(single, rhs, relative * mean, tolerance=1e-3).ok
    assert silent  # a large damping makes single precision good enough


def test_the_precision_of_a_kernel_can_be_told() -> None:
    _, rows, y = tanh_jacobian(120)
    single = rows.float() @ rows.float().t()
    damping = 1e-4 * float(rows.square().sum()) / 120
    told = exact(single.double(), y, damping, rounding=torch.finfo(torch.float32).eps)
    assert told.residual == pytest.approx(exact(single, y, damping).residual)
    assert not told.ok
    assert exact(single.double(), y, damping).residual < 1e-10  # it cannot know
    assert exact(single, y, damping, rounding=0.0).ok


def test_single_precision_gets_one_attempt_and_no_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 N^3 in float64 are not for work whose next attempt is float64 anyhow."""
    monkeypatch.setattr(damped, "_by_eigenvalues", lambda *_: pytest.fail("eigenvalues of float32"))
    values = torch.tensor([1.0, 0.5, -0.2])
    basis = torch.linalg.qr(randn(3, 3)).Q.float()
    made = DampedGram(basis @ torch.diag(values) @ basis.t(), dtype=torch.float32)
    assert made.inverse(0.0) is None
    solved = made.solve(torch.ones(3), 0.0)
    assert (solved.ok, solved.iterations, solved.residual) == (False, 1, math.inf)
    assert made.solve(torch.ones(3), 0.5).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_of_a_factor_is_what_solves(dtype: torch.dtype) -> None:
    rows, rhs = randn(24, 30), randn(24, seed=1)
    made = DampedGram((rows @ rows.t()).to(dtype), dtype=dtype)
    inverse = made.inverse(0.3)
    assert inverse is not None
    assert torch.allclose(inverse(torch.stack([rhs, 2 * rhs], 1))[:, 1], 2 * inverse(rhs), rtol=1e-12)
    exactly = torch.linalg.solve(rows @ rows.t() + 0.3 * torch.eye(24, dtype=rows.dtype), rhs)
    assert float((inverse(rhs) - exactly).norm() / exactly.norm()) < (1e-12 if dtype == torch.float64 else 1e-3)


def test_a_kernel_is_left_as_it_was() -> None:
    """Dampings and what repairs a factorisation are added to the diagonal in place, and taken off again to the bit."""
    values = torch.tensor([1.0, 0.5, 1e-17], dtype=torch.float64)
    basis = torch.linalg.qr(randn(3, 3)).Q
    kernel = basis @ torch.diag(values) @ basis.t()
    kernel = (kernel + kernel.t()) / 2
    before = kernel.clone()
    made = DampedGram(kernel, symmetric=True)
    for damping in (0.1, 0.0, 0.3):
        made.solve(torch.ones(3, dtype=torch.float64), damping)
    assert torch.equal(kernel, before)


def test_many_dampings_of_one_kernel_are_each_solved_in_double() -> None:
    _, rows, y = tanh_jacobian(120)
    kernel = rows @ rows.t()
    mean = float(kernel.trace()) / 120
    for relative in (1e-2, 1e-4, 1e-8, 1e-10):
        found = exact(kernel, y, relative * mean)
        assert found.ok
        assert found.iterations == 1
        assert found.residual < 1e-7
