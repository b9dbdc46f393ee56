"""The Jacobian of every kind of layer against torch.func: K, products, parts of K, whatever the curvature root."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jacobian_cases import CASES, Case, dense, filled, randn, relative, rooted, roots
from piecework.methods.gauss_newton.jacobian.capture import capture
from piecework.methods.gauss_newton.jacobian.planning import plan
from piecework.methods.gauss_newton.jacobian.whole import Jacobian

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),  # forward mode loads
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def _built(case: Case, num: int | None) -> tuple[nn.Module, Jacobian, Tensor]:
    """The model, its Jacobian in blocks, and the same as a matrix; `num` columns in the root, None for B = I."""
    model = filled(case.make())
    plain = dense(model, case.x, by_autograd=case.by_autograd)
    seeds, right = None, plain.flatten(0, 1)
    if num is not None:
        root, seeds = roots((plain.shape[0], plain.shape[1]), num)
        right = rooted(plain, root)
    z, jacobian = capture(model, plan(model, case.x), case.x, seeds)
    torch.testing.assert_close(z, model(case.x).detach().reshape(len(z), -1), rtol=1e-13, atol=1e-13)
    return model, jacobian, right


@every_case
@pytest.mark.parametrize("num", [None, 1, 3])
def test_k_is_that_of_torch_func(case: Case, num: int | None) -> None:
    _, jacobian, right = _built(case, num)
    gram = jacobian.gram()
    assert relative(gram, right @ right.t()) < 1e-12
    assert torch.equal(gram, gram.t())


@every_case
def test_products_are_those_of_the_matrix(case: Case) -> None:
    _, jacobian, right = _built(case, 3)
    w, v = randn(right.shape[1], seed=5), randn(right.shape[0], 2, seed=6)
    assert relative(jacobian.mv(w), right @ w) < 1e-12
    assert relative(jacobian.t_mv(v[:, 0]), right.t() @ v[:, 0]) < 1e-12
    assert relative(jacobian.product(v), right @ (right.t() @ v)) < 1e-12


@every_case
def test_rows_columns_and_the_diagonal_are_those_of_the_matrix(case: Case) -> None:
    _, jacobian, right = _built(case, 3)
    gram = right @ right.t()
    index = torch.tensor([7, 0, 7, 14])
    assert relative(jacobian.columns(index), gram[:, index]) < 1e-12
    assert relative(jacobian.gram(rows=slice(2, 11)), gram[2:11]) < 1e-12
    assert relative(jacobian.diagonal(), gram.diagonal()) < 1e-12
    assert relative(jacobian.rows(3, 9), right[3:9]) < 1e-12
    assert relative(jacobian.rows(4, 11), right[4:11]) < 1e-12
    assert relative(jacobian.at(index).mv(right[0]), right[index] @ right[0]) < 1e-12
    tiles = dict(jacobian.tiles(4 * right.shape[1]))
    assert len(tiles) == 5
    assert relative(torch.cat(list(tiles.values())), right) < 1e-12


@every_case
def test_the_plan_says_which_parameters_take_rows(case: Case) -> None:
    model = filled(case.make())
    found = plan(model, case.x)
    assert set(found.rows) == set(case.rows)
    assert set(found.reasons) == set(case.rows)
    if case.rows:
        assert found.rows_by == case.by
    assert sum(found.sizes) == found.num_parameters == dense(model, case.x, by_autograd=case.by_autograd).shape[2]


@every_case
def test_the_gram_matrix_of_two_halves_is_a_corner(case: Case) -> None:
    _, jacobian, right = _built(case, 3)
    first, second = jacobian.samples(slice(0, 2)), jacobian.samples(slice(2, 5))
    for a, b in zip(first.blocks, second.blocks, strict=True):
        whole = a.gram(b)
        rows, others = a.explicit(), b.explicit()
        assert float((whole - rows @ others.t()).abs().max()) < 1e-11 * float(1 + whole.abs().max())
    corner = sum(a.gram(b) for a, b in zip(first.blocks, second.blocks, strict=True))
    assert isinstance(corner, Tensor)
    assert relative(corner, right[:6] @ right[6:].t()) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "attention", "twice and tied", "laplacian by torch.func"])
def test_mv_is_the_slope_of_the_outputs(name: str) -> None:
    case = CASES[name]
    model, jacobian, right = _built(case, None)
    w = randn(right.shape[1], seed=5) * right.any(0)  # the padding's row of a table has no derivative by convention
    parameters = list(model.parameters())
    before = torch.cat([p.detach().reshape(-1) for p in parameters])

    def outputs(step: float) -> Tensor:
        nn.utils.vector_to_parameters(before + step * w, parameters)
        return model(case.x).detach().reshape(-1)

    slope = (outputs(1e-6) - outputs(-1e-6)) / 2e-6
    assert relative(jacobian.mv(w), slope) < 1e-6


@pytest.mark.parametrize("name", ["attention", "convolution", "bare parameters", "laplacian by torch.func"])
def test_single_precision_is_right_to_its_rounding(name: str) -> None:
    case = CASES[name]
    model = filled(case.make())
    right = dense(model, case.x).flatten(0, 1)
    x = case.x.float() if case.x.is_floating_point() else case.x
    model.float()
    found = plan(model, x)
    assert set(found.rows) == set(case.rows)
    _, jacobian = capture(model, found, x)
    assert jacobian.gram().dtype == torch.float32
    assert relative(jacobian.gram().double(), right @ right.t()) < 1e-4
    wide = jacobian.gram(torch.float64)
    assert wide.dtype == torch.float64
    rows = torch.cat([rows for _, rows in jacobian.tiles()]).double()
    assert relative(wide, rows @ rows.t()) < 1e-6
    vector = randn(len(right), seed=5)
    assert jacobian.product(vector).dtype == torch.float64


@pytest.mark.parametrize("num", [1, 3])
def test_chunks_of_vmap_are_the_whole(num: int) -> None:
    case = CASES["laplacian by torch.func"]
    model = filled(case.make())
    _, seeds = roots((5, 1), num)
    found = plan(model, case.x)
    _, whole = capture(model, found, case.x, seeds)
    _, pieces = capture(model, found, case.x, seeds, chunk_bytes=2 * 4 * 8 * num * whole.num_columns)
    torch.testing.assert_close(pieces.rows(0, 5 * num), whole.rows(0, 5 * num), rtol=1e-13, atol=1e-13)
