"""The Jacobian as a whole: what it costs, what it keeps, its sketches, and samples over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from jacobian_cases import CASES, dense, filled, randn, relative, rooted, roots
from piecework.group import Group
from piecework.methods.gauss_newton.jacobian import blocks
from piecework.methods.gauss_newton.jacobian.blocks import KINDS, Kind, Rows
from piecework.methods.gauss_newton.jacobian.capture import capture, predicted_bytes
from piecework.methods.gauss_newton.jacobian.factors import Outer
from piecework.methods.gauss_newton.jacobian.planning import plan
from piecework.methods.gauss_newton.jacobian.whole import Jacobian, concatenate
from piecework.testing import threads
from piecework.training import BadInput

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),  # forward mode loads
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


def _wide(outputs: int = 1, *, bias: bool = False) -> nn.Module:
    return filled(
        nn.Sequential(
            nn.Linear(96, 128, bias=bias), nn.Tanh(), nn.Linear(128, 160, bias=bias), nn.Tanh(),
            nn.Linear(160, outputs, bias=bias),
        )
    )  # fmt: skip


def _of(name: str, num: int | None = None) -> tuple[Jacobian, Tensor]:
    case = CASES[name]
    model = filled(case.make())
    plain = dense(model, case.x)
    seeds, right = None, plain.flatten(0, 1)
    if num is not None:
        root, seeds = roots((plain.shape[0], plain.shape[1]), num)
        right = rooted(plain, root)
    return capture(model, plan(model, case.x), case.x, seeds)[1], right


# -- costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "units"), [(3, 24), (24, 3), (5, 5)])
@pytest.mark.parametrize("uses", [1, 3])
def test_both_contraction_orders_give_one_number(inputs: int, units: int, uses: int) -> None:
    block = Outer(randn(5, uses, inputs), randn(5, 1, uses, units, seed=1), True)
    rows, w, v = block.explicit(), randn(block.num_columns, seed=2), randn(5, seed=3)
    assert relative(block.mv(w), rows @ w) < 1e-12
    assert relative(block.t_mv(v), rows.t() @ v) < 1e-12


def test_the_wider_side_is_contracted_first() -> None:
    for inputs, units in [(3, 400), (400, 3)]:
        block = Outer(randn(50, 1, inputs), randn(50, 1, 1, units, seed=1), False)
        with _Sizes() as sizes:
            block.mv(randn(block.num_columns, seed=2))
            block.t_mv(randn(50, seed=3))
        assert sizes.most == 1200  # the weight itself, where the other order makes 50 x 400


def test_a_product_with_k_is_4np_operations() -> None:
    model, x = _wide(), randn(24, 96, seed=1)
    _, jacobian = capture(model, plan(model, x), x)
    with FlopCounterMode(display=False) as flops:
        jacobian.product(randn(24, seed=2))
    assert flops.get_total_flops() == pytest.approx(4 * 24 * jacobian.num_columns, rel=0.02)


def test_more_rows_a_sample_share_a_product() -> None:
    model, x = _wide(3), randn(24, 96, seed=1)
    _, jacobian = capture(model, plan(model, x), x)
    with FlopCounterMode(display=False) as flops:
        jacobian.product(randn(72, seed=2))
    assert flops.get_total_flops() == pytest.approx(4 * 24 * jacobian.num_columns, rel=0.06)


def test_the_gram_matrix_costs_its_symmetric_half() -> None:
    model, x = _wide(), randn(1024, 96, seed=1)
    _, jacobian = capture(model, plan(model, x), x)
    assert jacobian.width == 96 + 128 + 128 + 160 + 160 + 1
    with FlopCounterMode(display=False) as flops:
        gram = jacobian.gram()
    assert flops.get_total_flops() <= 0.57 * 2 * 1024**2 * jacobian.width  # 9/16 in eight tiles
    assert relative(gram[:5], jacobian.rows(0, 5) @ jacobian.rows(0, 1024).t()) < 1e-12


@pytest.mark.parametrize(
    ("inputs", "units", "uses", "operations"),
    [
        (24, 24, 2, 2 * 9**2 * 4 * 48),
        (5, 3, 24, 2 * 9 * 24 * 15),
    ],  # rows; torch's counter overlooks their product, addmm_
)
def test_the_gram_matrix_of_shared_weights_takes_the_shorter_way(
    inputs: int, units: int, uses: int, operations: int
) -> None:
    block = Outer(randn(9, uses, inputs), randn(9, 1, uses, units, seed=1), False)
    with FlopCounterMode(display=False) as flops:
        block.gram(block)
    assert flops.get_total_flops() == operations


class _Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes; views of what it was given do not count."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        self.most = max([self.most, *(t.numel() for t in made if t.untyped_storage().data_ptr() not in given)])
        return found


def test_no_tensor_of_samples_times_parameters_is_made() -> None:
    model, x = _wide(bias=True), randn(24, 96, seed=1)
    layout = plan(model, x)
    with _Sizes() as sizes:
        _, jacobian = capture(model, layout, x)
        v = randn(24, seed=2)
        jacobian.product(v), jacobian.mv(jacobian.t_mv(v)), jacobian.gram(), jacobian.diagonal()
        jacobian.columns(torch.tensor([3, 5])), jacobian.units(24, 0)
        jacobian.features("tensorsketch", 48, 0), jacobian.features("tensor-srht", 48, 0)
    assert jacobian.num_columns <= sizes.most < 24 * jacobian.num_columns / 10


def test_gram_rows_of_units_stay_within_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Outer(randn(24, 40, 24), randn(24, 1, 40, 24, seed=1), False)
    right = block.explicit() @ block.explicit().t()
    monkeypatch.setattr(blocks, "TILE", 24 * 24 * 8)
    with _Sizes() as sizes:
        gram = block.gram(block)
    assert relative(gram, right) < 1e-12
    assert sizes.most <= 24 * 40 * 24  # the factors themselves; the rows are 24 x 576 in slabs of 4 units
    assert relative(block.diagonal(), right.diagonal()) < 1e-12


class _Counted(torch.autograd.Function):
    """The identity, which counts its backward passes in the list it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: list[int]) -> Tensor:
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.count.append(1)
        return grad, None


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 24), nn.Linear(24, 3)
        self.forwards: list[int] = []
        self.backwards: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(1)
        return _Counted.apply(self.last(torch.tanh(self.first(x))), self.backwards)  # type: ignore[no-any-return]


@pytest.mark.parametrize("num", [None, 1, 2])
def test_one_forward_and_c_backward_passes(num: int | None) -> None:
    model, x = filled(_Counting()), randn(5, 5, seed=1)
    assert isinstance(model, _Counting)
    layout = plan(model, x)
    model.forwards.clear(), model.backwards.clear()
    capture(model, layout, x, None if num is None else roots((5, 3), num)[1])
    assert len(model.forwards) == 1
    assert len(model.backwards) == (num or 3)


@pytest.mark.parametrize("name", CASES)
def test_the_memory_is_known_before(name: str) -> None:
    case = CASES[name]
    model = filled(case.make())
    layout = plan(model, case.x)
    _, jacobian = capture(model, layout, case.x)
    assert predicted_bytes(layout, 5) == jacobian.bytes
    _, seeds = roots((5, layout.num_outputs), 2)
    assert predicted_bytes(layout, 5, 2) == capture(model, layout, case.x, seeds)[1].bytes


# -- sketches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["attention", "convolution"])
def test_sketches_are_right_on_average(kind: Kind, name: str) -> None:
    jacobian, right = _of(name, 2)
    _right_on_average(lambda seed: (lambda y: y @ y.t())(jacobian.features(kind, 24, seed)), right @ right.t())


@pytest.mark.parametrize("name", ["mlp", "attention", "convolution"])
def test_sampled_units_are_right_on_average(name: str) -> None:
    jacobian, right = _of(name, 2)
    _right_on_average(lambda seed: jacobian.units(2, seed), right @ right.t())


def _right_on_average(draw: Callable[[int], Tensor], right: Tensor) -> None:
    draws = torch.stack([draw(seed) for seed in range(400)])
    error = draws.std(0) / 20
    assert float(error.max()) > 0
    assert float(((draws.mean(0) - right).abs() / (error + 1e-12 * right.abs().max())).max()) < 5


def test_a_sketch_of_many_columns_is_near() -> None:
    jacobian, right = _of("twice and tied", 2)
    for kind in KINDS:
        features = jacobian.features(kind, 4096, 3)
        assert relative(features @ features.t(), right @ right.t()) < 0.25


def test_all_units_are_the_gram_matrix() -> None:
    jacobian, right = _of("mlp", 3)
    assert relative(jacobian.units(24, 0), right @ right.t()) < 1e-12
    assert relative(jacobian.units(23, 0), right @ right.t()) > 1e-6
    assert torch.equal(jacobian.units(5, 0), jacobian.units(5, 0).t())


def test_samples_are_sketched_alike_wherever_they_are() -> None:
    jacobian, _ = _of("attention", 2)
    for kind in KINDS:
        whole, part = jacobian.features(kind, 24, 3), jacobian.samples(slice(2, 5)).features(kind, 24, 3)
        torch.testing.assert_close(whole[4:], part, rtol=1e-12, atol=1e-12)
        assert not torch.equal(whole, jacobian.features(kind, 24, 4))


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "attention", "convolution", "bare parameters"])
def test_ranks_gather_to_one_jacobian(name: str) -> None:
    jacobian, right = _of(name, 3)
    shards = [slice(0, 1), slice(1, 5)]

    def run(group: Group) -> tuple[Tensor, Tensor]:
        whole = jacobian.samples(shards[group.rank]).gathered(group)
        return whole.gram(), whole.t_mv(torch.ones(15, dtype=torch.float64))

    for gram, pulled in threads(2, run):
        assert relative(gram, right @ right.t()) < 1e-12
        assert relative(pulled, right.sum(0)) < 1e-12
    assert threads(1, lambda group: jacobian.gathered(group) is jacobian) == [True]


def test_jacobians_are_joined_along_samples() -> None:
    jacobian, right = _of("attention", 3)
    again = concatenate([jacobian.samples(slice(2, 5)), jacobian.samples(slice(0, 2))])
    assert relative(again.rows(0, 15), torch.cat([right[6:], right[:6]])) < 1e-14


def test_sequences_of_several_lengths_are_joined() -> None:
    model, x = filled(CASES["attention"].make()), CASES["attention"].x
    layout = plan(model, x)
    parts = [capture(model, layout, part)[1] for part in (x, x[:, :3])]
    right = torch.cat([dense(model, part).flatten(0, 1) for part in (x, x[:, :3])])
    assert relative(concatenate(parts).gram(), right @ right.t()) < 1e-12


def test_blocks_refuse_factors_that_do_not_fit() -> None:
    with pytest.raises(BadInput, match="same n and T"):
        Outer(randn(5, 2, 3), randn(5, 1, 3, 4), False)
    with pytest.raises(BadInput, match="explicit rows"):
        Rows(randn(5, 3))
    with pytest.raises(BadInput, match="same samples"):
        Jacobian((Rows(randn(5, 1, 3)), Rows(randn(4, 1, 3))), ((slice(0, 3),), (slice(3, 6),)), 6)
    jacobian, _ = _of("mlp", 1)
    with pytest.raises(BadInput, match="needs a vector"):
        jacobian.mv(randn(3))
    with pytest.raises(BadInput, match="a sketch is one of"):
        jacobian.features("gaussian", 5, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mlp", "attention", "convolution", "bare parameters"])
def test_a_rank_without_rows_takes_part(name: str) -> None:
    jacobian, right = _of(name, 3)
    none = jacobian.samples(slice(0, 0))
    assert none.num_rows == 0
    assert none.gram().shape == (0, 0)
    assert none.diagonal().shape == none.mv(right[0]).shape == none.product(right[:0, 0]).shape == (0,)
    assert float(none.t_mv(right[:0, 0]).abs().sum()) == 0
    assert list(none.tiles()) == []
    assert none.features("tensorsketch", 5, 0).shape == none.features("count", 5, 0).shape == (0, 5)
    assert none.units(3, 0).shape == (0, 0)
    assert jacobian.columns(torch.empty(0, dtype=torch.int64)).shape == (15, 0)

    def run(group: Group) -> Tensor:
        return (none if group.rank == 0 else jacobian).gathered(group).gram()

    for gram in threads(2, run):
        assert relative(gram, right @ right.t()) < 1e-12
