"""Products with J and K without factors, against the matrix of torch.func; their cost, and what they fall back to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import FlopCounterMode

from jacobian_cases import CASES, dense, filled, randn, relative, rooted
from piecework.methods.gauss_newton.jacobian.products import MatrixFree
from piecework.training import BadInput

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),  # forward mode loads
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


@pytest.mark.parametrize(("tile", "keep"), [(None, None), (2, None), (2, True), (None, False)])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("torch attention", "sparse embedding")])
def test_products_are_those_of_the_matrix(name: str, tile: int | None, keep: bool | None) -> None:
    case = CASES[name]
    model = filled(case.make())
    right = dense(model, case.x, by_autograd=case.by_autograd).flatten(0, 1)
    free = MatrixFree(model, case.x, tile=tile, keep=keep)
    assert (free.num_rows, free.num_columns) == tuple(right.shape)
    w, v = randn(right.shape[1], seed=5), randn(right.shape[0], 2, seed=6)
    for _ in range(2):  # kept graphs serve again
        assert relative(free.mv(w), right @ w) < 1e-12
        assert relative(free.t_mv(v[:, 0]), right.t() @ v[:, 0]) < 1e-12
    assert relative(free.product(v), right @ (right.t() @ v)) < 1e-12


@pytest.mark.parametrize("tile", [None, 2])
def test_a_curvature_root_is_applied_on_both_sides(tile: int | None) -> None:
    case = CASES["attention"]
    model = filled(case.make())
    root = randn(5, 3, 2, seed=8)
    right = rooted(dense(model, case.x), root)
    free = MatrixFree(
        model,
        case.x,
        num_outputs=2,
        root_mv=lambda v, part: torch.einsum("nkc,nc->nk", root[part], v),
        root_t_mv=lambda z, part: torch.einsum("nkc,nk->nc", root[part], z),
        tile=tile,
    )
    w, v = randn(right.shape[1], seed=5), randn(10, seed=6)
    assert relative(free.mv(w), right @ w) < 1e-12
    assert relative(free.t_mv(v), right.t() @ v) < 1e-12
    assert relative(free.product(v), right @ (right.t() @ v)) < 1e-12
    with pytest.raises(BadInput, match="together"):
        MatrixFree(model, case.x, root_mv=lambda v, part: v)
    with pytest.raises(BadInput, match="at least 1"):
        MatrixFree(model, case.x, tile=0)


@pytest.mark.parametrize("outputs", [1, 24])
def test_a_product_costs_8np_whatever_the_number_of_rows(outputs: int) -> None:
    model = filled(nn.Sequential(nn.Linear(96, 128, False), nn.Tanh(), nn.Linear(128, outputs, False)))
    x = randn(24, 96, seed=1)
    free = MatrixFree(model, x)
    free.product(randn(24 * outputs, seed=2))  # builds the graphs
    with FlopCounterMode(display=False) as flops:
        free.product(randn(24 * outputs, seed=2))
    assert flops.get_total_flops() <= 8 * 24 * free.num_columns


class _Square(torch.autograd.Function):
    """A square whose backward pass has no derivative; forward mode has."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad  # type: ignore[no-any-return]

    @staticmethod
    def jvp(ctx: Any, moved: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * moved  # type: ignore[no-any-return]


class _Squares(nn.Module):
    own = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(_Square.apply(hidden) if self.own else hidden.square())  # type: ignore[no-any-return]


@pytest.mark.parametrize("tile", [None, 2])
def test_forward_mode_steps_in_where_a_backward_pass_has_no_derivative(tile: int | None) -> None:
    model, x = filled(_Squares()), randn(5, 5, seed=1)
    model.own = False
    right = dense(model, x).flatten(0, 1)
    model.own = True
    free = MatrixFree(model, x, tile=tile)
    w, v = randn(right.shape[1], seed=5), randn(15, seed=6)
    assert not bool(free.mv(0 * w).any())
    assert free.forward_mode
    assert relative(free.mv(w), right @ w) < 1e-12
    assert relative(free.product(v), right @ (right.t() @ v)) < 1e-12
