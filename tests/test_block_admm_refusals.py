"""What block-ADMM cannot train, and what it is told: one sentence each, with the way out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piecework import Adam, BadInput, Batch, BlockADMM, CannotTrain, DidNotSolve, losses
from piecework.group import Group
from piecework.models import mlp
from piecework.testing import threads

LOSS = losses.Softmax()


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class _Blind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).float()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": (1.0, -1.0)}, "beta must be above 0"),
        ({"alpha_beta": 1.5}, r"alpha_beta must be in \(0, 1\]"),
        ({"sweeps": 0}, "sweeps must be at least 1"),
        ({"dual_step": 2.0}, "dual_step must be in"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"order": "forward"}, "order must be backward, jacobi or pipelined"),
        ({"at": (1,), "blocks": 2}, "either at=.* or blocks="),
        ({"mode": "batch", "dual_memory": "class", "dual_step": 1.0}, "keeps the duals of every row already"),
        ({"dual_memory": "class"}, "give dual_step"),
        ({"order": "pipelined", "sweeps": 2}, "passes a mini-batch once"),
        ({"balance": True}, "give sweeps=2"),
        ({"schedule": "cosine"}, "needs schedule_steps"),
    ],
)
def test_settings_that_make_no_method_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        BlockADMM(**settings)


def test_a_setting_of_adam_beside_another_optimiser_is_said_to_do_nothing() -> None:
    with pytest.warns(UserWarning, match="lr is Adam's"):
        BlockADMM(lr=0.1, optimizer=partial(torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize(
    ("model", "recipe", "said"),
    [
        (partial(nn.Sequential, _Inner()), BlockADMM(at=("0.second",)), "0.second is inside 0 .*one module"),
        (partial(nn.Sequential, _Inner()), BlockADMM(at=("1",)), "no module '1'"),
        (partial(mlp, 5, [7], 3), BlockADMM(at=(3,)), "rising positions from 1 to 2"),
        (partial(mlp, 5, [7], 3), BlockADMM(blocks=3), "cut into 1 to 2 blocks"),
        (_Inner, BlockADMM(blocks=2), "cuts an nn.Sequential, and this model is one _Inner"),
        (nn.Flatten, BlockADMM(), "nothing to train"),
        (partial(nn.LazyLinear, 3), BlockADMM(), "no shape yet"),
    ],
)
def test_models_that_cannot_be_cut_like_this_are_refused(model: Any, recipe: BlockADMM, said: str) -> None:
    with pytest.raises(CannotTrain, match=said):
        recipe.bind(model(), LOSS)


def test_an_opaque_model_is_one_block() -> None:
    metrics = BlockADMM().bind(_Inner(), LOSS).step(Batch(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])))
    assert abs(float(metrics["cosine"]) - 1) < 1e-6


def test_as_many_penalties_and_optimisers_as_there_are_cuts_and_blocks() -> None:
    with pytest.raises(BadInput, match="2 blocks are joined by 1 penalties, got 2"):
        BlockADMM(beta=(1.0, 1.0)).bind(mlp(5, [7], 3), LOSS)
    with pytest.raises(BadInput, match="2 blocks need as many optimisers, got 1"):
        BlockADMM(optimizer=(torch.optim.Adam,)).bind(mlp(5, [7], 3), LOSS)


def test_a_block_that_gives_no_tensor_is_named() -> None:
    model = nn.Sequential(nn.Linear(5, 5), _Pair(), nn.Linear(5, 3))
    training = BlockADMM(at=(2,)).bind(model, LOSS)
    with pytest.raises(CannotTrain, match=r"block 0 .*_Pair.* gives a tuple"):
        training.step(Batch(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])))


def test_a_layer_without_a_derivative_inside_a_block_is_told_what_it_needs() -> None:
    model = nn.Sequential(nn.Linear(5, 5), _Blind(), nn.Linear(5, 3))
    training = BlockADMM(probe_every=0).bind(model, LOSS)
    with pytest.raises(CannotTrain, match=r"no derivative reaches 0.weight of block 0.* prox_input"):
        training.step(Batch(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])))


@pytest.mark.parametrize("recipe", [BlockADMM(mode="batch"), BlockADMM(dual_memory="sample", dual_step=1.0)])
def test_rows_without_numbers_cannot_be_remembered(recipe: BlockADMM) -> None:
    training = recipe.bind(mlp(5, [7], 3), LOSS)
    with pytest.raises(BadInput, match=r"no index; give Batch\(x, y, index\)"):
        training.step(Batch(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])))


def test_real_targets_have_no_multiplier_for_each_class() -> None:
    training = BlockADMM(dual_memory="class", dual_step=1.0).bind(mlp(5, [7], 1), losses.Squared())
    with pytest.raises(BadInput, match="these targets are real numbers"):
        training.step(Batch(torch.randn(4, 5), torch.randn(4, 1)))


def test_more_ranks_than_blocks_are_refused_on_every_rank() -> None:
    def bind(group: Group) -> str:
        with pytest.raises(CannotTrain) as refusal:
            BlockADMM().bind(mlp(5, [7], 3), LOSS, group=group)
        return str(refusal.value)

    assert all("this model has 2 for 3 ranks; use at most 2 ranks" in said for said in threads(3, bind))


def test_an_empty_batch_and_smoothing_without_labels_are_refused() -> None:
    with pytest.raises(BadInput, match="no rows"):
        BlockADMM().bind(mlp(5, [7], 3), LOSS).step(Batch(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(CannotTrain, match="no smoothed labels"):
        BlockADMM(label_smoothing=0.1).bind(mlp(5, [7], 3), losses.Squared())


def test_a_state_of_other_blocks_is_refused() -> None:
    one, other = (BlockADMM(blocks=blocks).bind(mlp(5, [7, 7], 3), LOSS) for blocks in (2, 3))
    with pytest.raises(BadInput, match="of 2 blocks, and this model is cut into 3"):
        other.load_state_dict(one.state_dict())


def test_backpropagation_points_here_for_a_layer_without_a_derivative() -> None:
    with pytest.raises(CannotTrain, match="block-admm"):
        Adam().bind(mlp(5, [7], 3, activation="sign"), LOSS)


@pytest.mark.parametrize("order", ["backward", "pipelined"])
def test_a_loss_that_does_not_fall_is_said_and_on_every_rank(order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(24, 5, generator=generator), torch.randint(3, (24,), generator=generator))
    said: list[str] = []

    def train(group: Group, lr: float) -> int:
        training = BlockADMM(lr=lr, stall_sweeps=10, order=order).bind(mlp(5, [7], 3), LOSS, group=group)  # type: ignore[arg-type]
        for number in range(60):
            try:
                training.step(batch)
            except DidNotSolve as stalled:
                said.append(str(stalled))
                return number
        return 60

    assert set(threads(2, partial(train, lr=1e-12))) <= {19, 29}  # a loss that stands still may still lose a digit
    assert len(said) == 2
    assert all("the loss has not fallen in 10 sweeps" in one for one in said)
    assert set(threads(2, partial(train, lr=1e-2))) == {60}
