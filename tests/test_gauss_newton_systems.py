"""The systems of a step: what float32 leaves is refined, how many products a solve takes, and which ones it uses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from jacobian_cases import dense, relative
from piecework import Batch, Group, Solo, losses
from piecework.methods.gauss_newton.jacobian import Jacobian, MatrixFree
from piecework.methods.gauss_newton.objective import LeastSquares
from piecework.methods.gauss_newton.systems import MOST_REFINEMENTS, Krylov, SampleSpace
from piecework.testing import threads
from plain_gauss_newton import SQUARED, bind, direction, named, network, plain, rows


class _Counted:
    """An operator that counts its products."""

    def __init__(self, operator: Jacobian | MatrixFree) -> None:
        self.operator, self.num_rows, self.forward, self.back = operator, operator.num_rows, 0, 0

    def mv(self, w: Tensor) -> Tensor:
        self.forward += 1
        return self.operator.mv(w)

    def t_mv(self, v: Tensor) -> Tensor:
        self.back += 1
        return self.operator.t_mv(v)


def _least_squares(num: int, hidden: tuple[int, ...], dtype: torch.dtype) -> tuple[LeastSquares, Batch]:
    batch = rows(num)
    model = network(hidden=hidden).to(dtype)
    return LeastSquares(model, SQUARED, Solo()), Batch(batch.x.to(dtype), batch.y.to(dtype))


def test_a_solve_by_conjugate_gradients_takes_one_product_more_than_iterations() -> None:
    """The one that checks the residual gives the step and how it moves the rows, too."""
    objective, batch = _least_squares(29, (5,), torch.float64)
    point = objective.point(batch)
    counted = _Counted(objective.jacobian(batch))
    system = Krylov(counted, Solo(), tolerance=1e-6, max_iterations=100)
    found = system.solve(point.s, 0.1)
    assert found.solved.iterations > 3
    assert counted.forward == counted.back == found.solved.iterations + 1
    assert relative(found.step, counted.operator.t_mv(found.solved.x)) < 1e-14
    assert relative(found.moved, counted.operator.mv(found.step)) < 1e-14


@pytest.mark.parametrize("hidden", [(3,), (120,)])
def test_what_single_precision_leaves_is_refined_with_the_same_factor(
    hidden: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damping of 1e-5 is near the rounding of K in float32. Products with J in float64 are cheaper than another K for
    the narrow network, and not for the wide one."""
    objective, batch = _least_squares(90, hidden, torch.float32)
    point, formed = objective.point(batch), []
    gram = Jacobian.gram

    def counted(self: Jacobian, *arguments: Any) -> Tensor:
        formed.append(arguments[0])
        return gram(self, *arguments)

    monkeypatch.setattr(Jacobian, "gram", counted)
    system = SampleSpace(objective.jacobian(batch), Solo(), tolerance=1e-5, single=True)
    double = copy.deepcopy(objective.model).double()
    j = 2**0.5 * dense(double, batch.x.double())[:, 0]
    damping = 1e-5 * float((j @ j.t()).diagonal().mean())
    found = system.solve(point.s, damping)
    narrow = hidden == (3,)
    assert formed == ([torch.float32] if narrow else [torch.float32, torch.float64])
    assert system.single == narrow
    assert found.solved.iterations <= MOST_REFINEMENTS
    assert found.solved.residual <= 1e-5
    eye = torch.eye(j.shape[1], dtype=j.dtype)
    right = j.t() @ point.s.double()
    assert float(((j.t() @ j + damping * eye) @ found.step.double() - right).norm() / right.norm()) < 1e-4
    assert relative(found.moved.double(), j @ found.step.double()) < 1e-4


def test_ranks_refine_alike_and_one_may_have_no_rows() -> None:
    objective, batch = _least_squares(90, (3,), torch.float32)
    point, jacobian = objective.point(batch), objective.jacobian(batch)
    damping = 1e-5 * float(jacobian.diagonal().mean())
    alone = SampleSpace(jacobian, Solo(), tolerance=1e-5, single=True)
    whole = alone.solve(point.s, damping)

    def work(group: Group) -> tuple[bool, Tensor]:
        own = slice(0, 0) if group.rank == 1 else slice(0, 50) if group.rank == 0 else slice(50, 90)
        system = SampleSpace(jacobian.samples(own), group, tolerance=1e-5, single=True)
        step = system.solve(point.s[own], damping).step
        return system.single, step

    assert alone.single
    for single, step in threads(3, work):
        assert single
        assert relative(step, whole.step) < 1e-3


@pytest.mark.parametrize(("case", "graph"), [("squared", False), ("softmax", True), ("squared-3", True)])
def test_many_outputs_are_solved_with_products_through_the_graph(
    case: str, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    for kind in (Jacobian, MatrixFree):
        mv = kind.mv

        def counted(self: Any, w: Tensor, mv: Any = mv, name: str = kind.__name__) -> Tensor:
            used.append(name)
            return mv(self, w)  # type: ignore[no-any-return]

        monkeypatch.setattr(kind, "mv", counted)
    loss, batch = named(case), rows(31, case)
    outputs = 3 if graph else 1
    settings = plain(inner_tolerance=1e-11)
    by_products, told = direction(network(outputs), loss, batch, solver="cg", **settings)
    assert told["iterations"] > 5
    assert used.count("MatrixFree") >= told["iterations"] if graph else "MatrixFree" not in used
    assert used.count("Jacobian") <= 1 or not graph
    exact, _ = direction(network(outputs), loss, batch, solver="exact", **settings)
    assert relative(by_products, exact) < 1e-8


def test_graphs_of_several_tiles_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    training = bind(network(3), losses.Softmax(), solver="cg", tile=10, **plain())
    made = []
    graph = MatrixFree._graph

    def counted(self: MatrixFree, part: slice, *, need_double: bool) -> Any:
        made.append(part)
        return graph(self, part, need_double=need_double)

    monkeypatch.setattr(MatrixFree, "_graph", counted)
    for _ in range(2):
        training.step(rows(31, "softmax"))
    assert len(made) == 2 * 4
