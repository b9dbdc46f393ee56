"""Linear solvers against dense algebra: ridge by Cholesky with its rank report, step lengths, conjugate gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from piecework.solvers import Solved, cg, ridge_solve, solve_step


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sums(rows: int = 53, features: int = 7, outputs: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (rows, d), targets (rows, k), their Gram matrix and cross product."""
    a, y = _randn(rows, features), _randn(rows, outputs, seed=1)
    return a, y, a.t() @ a, y.t() @ a


# -- ridge -------------------------------------------------------------------------------------------------------------


def test_without_a_ridge_it_is_least_squares() -> None:
    a, y, gram, cross = _sums()
    found = ridge_solve(gram, cross, 0.0)
    assert found.ok
    assert found.iterations == 1
    assert found.residual < 1e-13
    torch.testing.assert_close(found.x.t(), torch.linalg.lstsq(a, y).solution, rtol=0, atol=1e-11)


def test_a_ridge_is_a_penalty_on_each_feature() -> None:
    a, y, gram, cross = _sums()
    ridge = torch.linspace(0, 3, 7, dtype=torch.float64)
    taller = torch.cat([a, torch.diag(ridge.sqrt())])
    expected = torch.linalg.lstsq(taller, torch.cat([y, y.new_zeros(7, 3)])).solution
    torch.testing.assert_close(ridge_solve(gram, cross, ridge).x.t(), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(ridge_solve(gram, cross, 0.5).x, ridge_solve(gram, cross, torch.full((7,), 0.5)).x)


def test_an_endless_ridge_gives_zero() -> None:
    _, _, gram, cross = _sums()
    assert float(ridge_solve(gram, cross, 1e14).x.abs().max()) < 1e-11


def test_single_precision_sums_are_solved_in_double() -> None:
    _, _, gram, cross = _sums()
    assert ridge_solve(gram.float(), cross.float(), 0.1).x.dtype == torch.float64


def test_a_lost_rank_is_reported_and_solved() -> None:
    a, y, _, _ = _sums()
    a = torch.cat([a, a[:, 1:3], torch.zeros(53, 1, dtype=torch.float64)], 1)  # two copies and a dead feature
    gram, cross = a.t() @ a, y.t() @ a
    found = ridge_solve(gram, cross, 0.0)
    assert not found.ok
    assert "numerical rank 7 of 10" in found.reason
    assert "ridge" in found.reason
    assert found.reason.count(";") == 1  # what happened; what to do
    assert float(found.x[:, -1].abs().max()) == 0
    fitted, best = a @ found.x.t(), torch.linalg.lstsq(a[:, :7], y).solution
    torch.testing.assert_close(fitted, a[:, :7] @ best, rtol=0, atol=1e-5)
    whole = ridge_solve(gram, cross, 1e-3)
    assert whole.ok
    assert whole.iterations == 1


def test_sums_that_are_not_finite_are_a_sentence_not_an_exception() -> None:
    _, _, gram, cross = _sums()
    for bad in (float("nan"), float("inf")):
        broken = gram.clone()
        broken[2, 2] = bad
        found = ridge_solve(broken, cross, 0.0)
        assert not found.ok
        assert "not finite" in found.reason
        assert not bool(found.x.any())


def test_no_data_gives_zero() -> None:
    found = ridge_solve(torch.zeros(3, 3), torch.zeros(2, 3), 1e-12)
    assert found.x.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert found.residual == 0


# -- step lengths ------------------------------------------------------------------------------------------------------


def test_step_lengths_solve_their_system() -> None:
    factor = _randn(4, 6)
    curvature, slope = factor @ factor.t(), _randn(4, seed=2)
    found = solve_step(curvature, slope)
    torch.testing.assert_close(found.x, torch.linalg.solve(curvature, slope), rtol=0, atol=1e-10)
    assert found.residual < 1e-10


def test_step_lengths_do_not_mind_the_scale_of_a_move() -> None:
    factor = _randn(3, 5)
    curvature, slope = factor @ factor.t(), _randn(3, seed=2)
    scale = torch.tensor([1e-8, 1.0, 1e8], dtype=torch.float64)
    found = solve_step(curvature * scale[:, None] * scale, slope * scale)
    torch.testing.assert_close(found.x * scale, solve_step(curvature, slope).x, rtol=1e-8, atol=0)


def test_equal_moves_share_their_step() -> None:
    curvature, slope = torch.tensor([[2.0, 2.0], [2.0, 2.0]]), torch.tensor([3.0, 3.0])
    torch.testing.assert_close(solve_step(curvature, slope).x, torch.tensor([0.75, 0.75], dtype=torch.float64))


def test_a_move_that_does_nothing_takes_no_step() -> None:
    curvature, slope = torch.diag(torch.tensor([4.0, 0.0])), torch.tensor([2.0, 1.0])
    assert solve_step(curvature, slope).x.tolist() == [0.5, 0]
    nothing = solve_step(torch.zeros(2, 2), torch.zeros(2))
    assert nothing.ok
    assert nothing.x.tolist() == [0, 0]


def test_step_lengths_that_are_not_finite_become_a_sentence() -> None:
    found = solve_step(torch.eye(2, dtype=torch.float64), torch.tensor([float("inf"), 1.0]))
    assert not found.ok
    assert found.x.tolist() == [0, 0]


# -- conjugate gradients -----------------------------------------------------------------------------------------------


def _definite(size: int = 24) -> tuple[Tensor, Tensor]:
    factor = _randn(size, size)
    return factor @ factor.t() / size + torch.eye(size, dtype=torch.float64), _randn(size, seed=3)


def test_conjugate_gradients_agree_with_a_dense_solve_and_with_scipy() -> None:
    from scipy.sparse.linalg import cg as theirs

    matrix, b = _definite()
    found = cg(lambda v: matrix @ v, b, tolerance=1e-12)
    assert found.ok
    assert found.residual <= 1e-12
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, b), rtol=0, atol=1e-10)
    steps: list[np.ndarray] = []
    theirs(matrix.numpy(), b.numpy(), rtol=1e-12, callback=steps.append)
    assert abs(found.iterations - len(steps)) <= 1


def test_conjugate_gradients_end_in_as_many_steps_as_there_are_eigenvalues() -> None:
    values = torch.tensor([1.0, 5.0, 30.0], dtype=torch.float64).repeat(8)
    assert cg(lambda v: values * v, _randn(24), tolerance=1e-10).iterations == 3


def test_several_right_hand_sides_are_solved_together() -> None:
    matrix, _ = _definite()
    b = _randn(24, 3, seed=4)
    torch.testing.assert_close(
        cg(lambda v: matrix @ v, b, tolerance=1e-12).x, torch.linalg.solve(matrix, b), rtol=0, atol=1e-9
    )


def test_the_right_preconditioner_needs_one_step() -> None:
    matrix, b = _definite()
    inverse = torch.linalg.inv(matrix)
    found = cg(lambda v: matrix @ v, b, precondition=lambda v: inverse @ v)
    assert found.iterations == 1
    torch.testing.assert_close(found.x, inverse @ b, rtol=0, atol=1e-8)


def test_a_solve_that_stops_early_says_what_to_do() -> None:
    matrix, b = _definite()
    found = cg(lambda v: matrix @ v, b, tolerance=1e-12, max_iterations=2)
    assert found.iterations == 2
    assert "raise max_iterations" in found.reason
    assert found.residual > 1e-12
    indefinite = cg(lambda v: -v, b)
    assert "not positive definite" in indefinite.reason
    assert not indefinite.ok


def test_nothing_to_solve_costs_nothing() -> None:
    found = cg(lambda v: v, torch.zeros(5))
    assert (found.iterations, found.residual, found.ok) == (0, 0.0, True)
    assert found.x.tolist() == [0] * 5


def test_a_solution_with_a_reason_is_not_ok() -> None:
    assert Solved(torch.zeros(1), "", 1, 0.0).ok
    assert not Solved(torch.zeros(1), "the matrix is singular", 1, 0.0).ok
    with pytest.raises(AttributeError):
        Solved(torch.zeros(1), "", 1, 0.0).reason = "no"  # type: ignore[misc]
