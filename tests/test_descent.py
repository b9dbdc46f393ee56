"""The published solver, gradient descent on the sketched system: where it converges, and how slowly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import outer_rows, relu_factors
from piecework.solvers import sketch
from piecework.solvers.damped import sketch_pcg
from piecework.solvers.descent import gradient_descent, sketched_norm
from piecework.solvers.precondition import SketchedQR
from piecework.training import BadInput, stream


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def _product(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: rows @ (rows.t() @ v)


def _true_residual(rows: Tensor, rhs: Tensor, damping: float, x: Tensor) -> float:
    return float((rows @ (rows.t() @ x) + damping * x - rhs).norm() / rhs.norm())


@pytest.mark.parametrize("factor", [2, 4, 8, 16, 30, 40, 60, 100])
def test_unit_steps_converge_exactly_where_the_norm_says(factor: int) -> None:
    n = 40
    rows, rhs = outer_rows(*relu_factors(n, 1000, features=10)), _randn(n, seed=3)
    features = sketch.count(rows, factor * n, 2)
    r = SketchedQR(features).triangle(0.0)
    norm = float(torch.linalg.matrix_norm(torch.linalg.solve_triangular(r.t(), rows, upper=False), 2)) ** 2
    assert sketched_norm(_product(rows), r) == pytest.approx(norm, rel=0.03)
    found = gradient_descent(_product(rows), rhs, features, step=1.0, tolerance=1e-8, max_iterations=5000)
    assert found.ok == (norm < math.sqrt(2))
    if factor <= 8:
        assert not found.ok
        assert "diverges" in found.reason
        assert found.residual == math.inf
        assert not bool(found.x.any())
    if factor >= 60:
        assert found.ok
    if found.ok:
        assert _true_residual(rows, rhs, 0.0, found.x) <= 1e-8


def test_a_step_from_the_norm_converges_more_slowly_than_conjugate_gradients() -> None:
    n = 40
    rows, rhs = outer_rows(*relu_factors(n, 1000, features=10)), _randn(n, seed=3)
    features = sketch.count(rows, 4 * n, 2)
    for damping in (0.0, 0.1):
        found = gradient_descent(_product(rows), rhs, features, damping, tolerance=1e-3)
        assert found.ok
        assert _true_residual(rows, rhs, damping, found.x) <= 1e-3
        with_cg = sketch_pcg(_product(rows), rhs, damping, features=features, tolerance=1e-3)
        assert 5 * with_cg.iterations < found.iterations
    found = gradient_descent(_product(rows), rhs, features, tolerance=1e-9, max_iterations=20)
    assert "raise max_iterations" in found.reason
    assert found.iterations == 20
    assert found.residual == pytest.approx(_true_residual(rows, rhs, 0.0, found.x))


def test_descent_has_the_same_limits_as_the_other_solvers() -> None:
    rows, features = _randn(5, 9), sketch.srht(_randn(5, 9), 64, 0)
    none = gradient_descent(_product(rows), torch.zeros(5, dtype=torch.float64), features)
    assert (none.ok, none.iterations) == (True, 0)
    nan = torch.full((5,), math.nan, dtype=torch.float64)
    assert "not finite" in gradient_descent(_product(rows), nan, features).reason
    broken = gradient_descent(lambda v: v * math.nan, _randn(5), features)
    assert "not finite" in broken.reason
    assert not bool(broken.x.any())
    one = gradient_descent(lambda v: 3 * v, torch.ones(1, dtype=torch.float64), 3**0.5 * torch.ones(1, 1).double())
    assert float(one.x) == pytest.approx(1 / 3)
    with pytest.raises(BadInput, match="s >= N"):
        gradient_descent(_product(rows), _randn(5), rows[:, :3])
