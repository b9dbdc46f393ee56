"""Block-ADMM against backpropagation: the limits in which they are the same, and the laws of those in which not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kept import Kept
from piecework import Adam, Batch, BlockADMM, losses
from piecework.group import Group, Solo
from piecework.methods.block_admm.at_work import BlocksAtWork
from piecework.models import mlp
from piecework.testing import processes, threads

LOSS = losses.Softmax()


def _network(
    *, activation: str = "tanh", depth: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0
) -> nn.Module:
    return mlp(5, [7] * (depth - 1), 3, activation=activation, seed=seed, dtype=dtype)


def _rows(n: int = 24, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype)
    return Batch(x, torch.randint(3, (n,), generator=generator), torch.arange(n))


def _still(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def _gradients(training: BlocksAtWork, number: int = 0) -> list[Tensor]:
    """What the optimisers of all blocks were given in their step of this number, in the model's order."""
    found = []
    for block in training._blocks:
        if block.optimizer is not None:
            assert isinstance(block.optimizer, Kept)
            found += block.optimizer.given[number]
    return found


def _true(model: nn.Module, batch: Batch) -> list[Tensor]:
    parameters = [one for one in model.parameters() if one.requires_grad]
    return list(torch.autograd.grad(LOSS(model(batch.x), batch.y), parameters))


def _worst(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest relative error of a tensor."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one.detach() - other.detach()).norm() / other.detach().norm()) for one, other in pairs)


@settings(max_examples=25, deadline=None)
@given(
    exponent=st.floats(-2, 5),
    cuts=st.sets(st.integers(1, 10), max_size=6),
    recompute=st.booleans(),
    n=st.sampled_from([1, 3, 24]),
)
def test_one_sweep_is_backpropagation_for_any_penalty_and_any_cut(
    exponent: float, cuts: set[int], recompute: bool, n: int
) -> None:
    model, batch = _network(), _rows(n)
    recipe = BlockADMM(
        at=tuple(sorted(cuts)), blocks=None if cuts else 1, beta=10**exponent, recompute=recompute, optimizer=Kept
    )
    wanted = _true(model, batch)
    training = recipe.bind(model, LOSS)
    training.step(batch)
    assert _worst(_gradients(training), wanted) < 1e-12


@pytest.mark.parametrize("beta", [1.0, 1e2, 1e3, 1e5])
def test_a_large_penalty_costs_no_digits_in_float32(beta: float) -> None:
    model, batch = _network(activation="relu", dtype=torch.float32), _rows(dtype=torch.float32)
    wanted = _true(model, batch)
    training = BlockADMM(beta=beta, optimizer=Kept).bind(model, LOSS)
    training.step(batch)
    assert _worst(_gradients(training), wanted) < 1e-5


def test_each_cut_may_have_its_own_penalty() -> None:
    model, batch = _network(depth=4), _rows()
    wanted = _true(model, batch)
    training = BlockADMM(beta=(0.1, 37.0, 1e4), optimizer=Kept).bind(model, LOSS)
    training.step(batch)
    assert _worst(_gradients(training), wanted) < 1e-12


def test_one_block_is_plain_training_bit_for_bit() -> None:
    one, other = _network(), _network()
    plain, block = Adam(lr=0.01).bind(one, LOSS), BlockADMM(blocks=1, lr=0.01).bind(other, LOSS)
    for seed in range(5):
        losses_ = [training.step(_rows(seed=seed))["loss"] for training in (plain, block)]
        assert torch.equal(*losses_)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("blocks", [2, 3, 6])
def test_an_adam_for_each_block_is_one_adam(blocks: int) -> None:
    one, other = _network(), _network()
    plain = Adam(lr=0.01).bind(one, LOSS)
    block = BlockADMM(blocks=blocks, beta=37.0, lr=0.01).bind(other, LOSS)
    for seed in range(30):
        plain.step(_rows(seed=seed))
        block.step(_rows(seed=seed))
    assert _worst(other.parameters(), one.parameters()) < 1e-10


def test_a_shorter_step_scales_the_signal_by_its_power() -> None:
    model, batch = _network(), _rows()
    wanted = _true(model, batch)
    training = BlockADMM(alpha_beta=0.1, beta=3.0, optimizer=Kept).bind(model, LOSS)
    training.step(batch)
    found = _gradients(training)
    for number in range(6):
        for place in (2 * number, 2 * number + 1):
            assert _worst([found[place]], [0.1 ** (5 - number) * wanted[place]]) < 1e-8


def test_all_blocks_at_once_need_a_sweep_for_each_block_before_a_signal_comes() -> None:
    for sweeps in (1, 3):
        model, batch = _network(), _rows()
        start = [one.detach().clone() for one in model.parameters()]
        BlockADMM(order="jacobi", sweeps=sweeps, lr=0.1).bind(model, LOSS).step(batch)
        moved = [not torch.equal(one, before) for one, before in zip(model.parameters(), start, strict=True)]
        assert moved == [number // 2 >= 6 - sweeps for number in range(12)]


def _errors(model: nn.Sequential, batch: Batch) -> list[Tensor]:
    """The back-propagated error of the total loss at the input of each linear layer but the first."""
    inputs, h = [], batch.x
    for layer in model:
        if isinstance(layer, nn.Linear) and h is not batch.x:
            h.retain_grad()
            inputs.append(h)
        h = layer(h)
    (LOSS(h, batch.y) * len(batch)).backward()
    return [one.grad for one in inputs if one.grad is not None]


@pytest.mark.parametrize("dual_step", [0.3, 1.0])
def test_the_multipliers_become_the_backpropagated_errors(dual_step: float) -> None:
    model, batch = _network(depth=4), _rows()
    training = BlockADMM(mode="batch", dual_step=dual_step, alpha_beta=0.3, optimizer=_still, probe_every=0).bind(
        model, LOSS
    )
    for _ in range(400):
        training.step(batch)
    kept = training.state_dict()["order"]["memory"]["kept"]
    assert _worst([kept[f"dual {number}"] for number in (1, 2, 3)], _errors(model, batch)) < 2e-3


def test_without_duals_the_error_is_biased_as_one_over_the_penalty() -> None:
    biases = []
    penalties = (10.0, 30.0, 100.0)
    for beta in penalties:
        model, batch = _network(depth=3), _rows()
        wanted = _true(model, batch)
        training = BlockADMM(sweeps=300, alpha_beta=0.5, beta=beta, optimizer=Kept, probe_every=0).bind(model, LOSS)
        training.step(batch)
        biases.append(_worst(_gradients(training, -1), wanted))
    slopes = [
        math.log(b / a) / math.log(q / p) for (a, b), (p, q) in zip(pairwise(biases), pairwise(penalties), strict=True)
    ]
    assert all(abs(slope + 1) < 0.1 for slope in slopes), (biases, slopes)


def test_keeping_every_row_is_going_on_with_its_sweeps() -> None:
    model, batch = _network(depth=4), _rows()
    kept = BlockADMM(mode="batch", dual_step=0.7, alpha_beta=0.3, optimizer=Kept, probe_every=0).bind(model, LOSS)
    for _ in range(7):
        kept.step(batch)
    swept = BlockADMM(sweeps=7, dual_step=0.7, alpha_beta=0.3, optimizer=Kept, probe_every=0).bind(model, LOSS)
    swept.step(batch)
    assert _worst(_gradients(kept, 6), _gradients(swept, 6)) < 1e-10


def test_a_row_keeps_its_multiplier_whatever_batch_it_comes_in() -> None:
    batch = _rows(24)
    recipe = partial(BlockADMM, mode="batch", dual_step=0.7, alpha_beta=0.3, optimizer=_still, probe_every=0)
    whole, parts = recipe().bind(_network(depth=3), LOSS), recipe().bind(_network(depth=3), LOSS)
    orders = [torch.randperm(24, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    for order in orders:
        whole.step(batch)
        for rows in order.split(7):
            parts.step(Batch(batch.x[rows], batch.y[rows], rows))
    one, other = (training.state_dict()["order"]["memory"]["kept"] for training in (whole, parts))
    assert _worst([other["dual 1"][:24], other["x 2"][:24]], [one["dual 1"], one["x 2"]]) < 1e-10


def test_the_cosine_to_the_gradient_is_one_for_backpropagation_and_less_for_more_steps() -> None:
    exact = BlockADMM().bind(_network(), LOSS).step(_rows())["cosine"]
    assert abs(float(exact) - 1) < 1e-12
    more = BlockADMM(local_steps=5, lr=0.1).bind(_network(), LOSS).step(_rows())["cosine"]
    assert 0 < float(more) < 0.999


def test_batch_normalisation_sees_the_batch_in_every_evaluation_and_moves_once() -> None:
    def network() -> nn.Sequential:
        made = _network(depth=3)
        return nn.Sequential(made[0], nn.BatchNorm1d(7, dtype=torch.float64), made[1], *made[2:])

    model, other, batch = network(), network(), _rows()
    wanted = _true(other, batch)
    for recompute in (False, True):
        training = BlockADMM(recompute=recompute, optimizer=Kept).bind(model, LOSS)
        model.load_state_dict(network().state_dict())
        training.step(batch)
        vectors = [torch.cat([one.flatten() for one in tensors]) for tensors in (_gradients(training), wanted)]
        assert _worst(vectors[:1], vectors[1:]) < 1e-12  # a bias before a normalisation has no gradient of its own
        assert torch.equal(model[1].running_mean, other[1].running_mean)
        assert int(model[1].num_batches_tracked) == 1
    BlockADMM(sweeps=3, local_steps=2, order="jacobi", lr=0.1).bind(model, LOSS).step(batch)
    assert int(model[1].num_batches_tracked) == 2


def test_dropout_masks_are_the_same_in_all_evaluations_of_a_step() -> None:
    def network() -> nn.Sequential:
        made = _network(depth=4)
        return nn.Sequential(*made[:4], nn.Dropout(0.5), *made[4:])

    found = []
    for recompute, sweeps in ((False, 1), (True, 1), (True, 2)):
        recipe = BlockADMM(recompute=recompute, sweeps=sweeps, optimizer=Kept, probe_every=0, seed=4, beta=1e6)
        training = recipe.bind(network(), LOSS)
        training.step(_rows())
        found.append(_gradients(training, sweeps - 1))
    assert _worst(found[1], found[0]) < 1e-12
    # With a large penalty the second sweep has the same linearisation, where the masks are the same.
    assert _worst(found[2], found[0]) < 1e-3


def test_the_step_reports_the_loss_of_the_deployed_network_before_it() -> None:
    for recipe in (
        BlockADMM(),
        BlockADMM(sweeps=3),
        BlockADMM(mode="batch", dual_step=1.0),
        BlockADMM(label_smoothing=0.1),
    ):
        model = _network()
        training = recipe.bind(model, LOSS)
        for seed in (0, 0, 1):
            batch = _rows(seed=seed)
            before = LOSS(model(batch.x), batch.y).detach()
            assert abs(float(training.step(batch)["loss"] - before)) < 1e-12


@pytest.mark.parametrize("order", ["backward", "jacobi", "pipelined"])
def test_evaluating_blocks_again_changes_no_bit(order: Any) -> None:
    found = []
    for recompute in (False, True):
        model = _network(depth=4)
        recipe = BlockADMM(order=order, recompute=recompute, lr=0.05, local_steps=2)
        training = recipe.bind(model, LOSS)
        for seed in range(12):
            training.step(_rows(seed=seed))
        found.append([one.detach() for one in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_pipeline_visits_a_block_with_the_weights_of_then() -> None:
    """The written-out schedule: forward on tick b + t, back on tick b + 2 (T - 1) - t, from t = 0."""
    depth, ticks = 3, 9
    model, twin = _network(depth=depth), _network(depth=depth)
    recipe = BlockADMM(order="pipelined", optimizer=partial(torch.optim.SGD, lr=0.1), probe_every=0)
    training = recipe.bind(model, LOSS)
    blocks = [twin[0:2], twin[2:4], twin[4:]]
    inputs: dict[tuple[int, int], Tensor] = {}
    errors: dict[tuple[int, int], Tensor] = {}
    for now in range(ticks):
        training.step(_rows(seed=now))
        inputs[now, 0] = _rows(seed=now).x
        moves = []
        for t, block in enumerate(blocks):
            if (now - t, t) in inputs and t < depth - 1:
                with torch.no_grad():
                    inputs[now - t, t + 1] = block(inputs[now - t, t])
        for t, block in enumerate(blocks):
            batch = now - 2 * (depth - 1) + t
            if batch < 0:
                continue
            x = inputs[batch, t].clone().requires_grad_()
            out = block(x)
            out = LOSS(out, _rows(seed=batch).y) if t == depth - 1 else out
            gradients = torch.autograd.grad(out, [x, *block.parameters()], errors.get((batch, t)))
            errors[batch, t - 1] = gradients[0]
            moves.append((block, gradients[1:]))
        with torch.no_grad():
            for block, gradients in moves:
                for one, gradient in zip(block.parameters(), gradients, strict=True):
                    one.sub_(0.1 * gradient)
    assert _worst(model.parameters(), twin.parameters()) < 1e-12


def test_frozen_layers_stay_and_what_lies_below_them_learns() -> None:
    model, batch = _network(depth=4), _rows()
    model[2].requires_grad_(False)
    start = [one.detach().clone() for one in model.parameters()]
    training = BlockADMM(optimizer=Kept).bind(model, LOSS)
    wanted = _true(model, batch)
    training.step(batch)
    assert _worst(_gradients(training), wanted) < 1e-12
    BlockADMM(lr=0.1).bind(model, LOSS).step(batch)
    moved = [not torch.equal(one, before) for one, before in zip(model.parameters(), start, strict=True)]
    assert moved == [True, True, False, False, True, True, True, True]


def test_changing_the_penalty_keeps_the_multiplier() -> None:
    recipe = BlockADMM(sweeps=4, dual_step=1.0, alpha_beta=0.5, balance=True, beta=1e4, optimizer=_still)
    training = recipe.bind(_network(depth=3), LOSS)
    training.step(_rows())
    changed = training.state_dict()["beta"]
    assert changed[1] < 1e4
    assert all(math.log2(1e4 / beta).is_integer() for beta in changed[1:])


def _trained(group: Group, recipe: BlockADMM) -> tuple[list[Tensor], float]:
    model = nn.Sequential(*_network(depth=4), nn.BatchNorm1d(3, dtype=torch.float64))
    training = recipe.bind(model, LOSS, group=group)
    metrics = {}
    for seed, rows in ((0, 24), (1, 24), (2, 5), (0, 24), (1, 24), (3, 24), (4, 24), (5, 7), (6, 24), (7, 24)):
        metrics |= training.step(_rows(rows, seed=seed))
    training.sync()
    return [one.detach().clone() for one in model.state_dict().values()], float(metrics["cosine"])


@pytest.mark.parametrize(
    "recipe",
    [
        BlockADMM(lr=0.02, probe_every=3),
        BlockADMM(lr=0.02, sweeps=3, alpha_beta=0.5, dual_step=0.5, local_steps=2, probe_every=3),
        BlockADMM(lr=0.02, order="jacobi", sweeps=2, alpha_beta=0.5, probe_every=3),
        BlockADMM(lr=0.02, mode="batch", dual_step=1.0, probe_every=3),
        BlockADMM(lr=0.02, sweeps=3, balance=True, beta=100.0, dual_step=1.0, probe_every=3),
        BlockADMM(lr=0.02, order="pipelined", local_steps=2, probe_every=1),
    ],
    ids=["backward", "sweeps", "jacobi", "batch", "balanced", "pipelined"],
)
def test_blocks_on_ranks_are_one_process_bit_for_bit(recipe: BlockADMM) -> None:
    alone, cosine = _trained(Solo(), recipe)
    for size in (2, 4):
        for found, same_cosine in threads(size, partial(_trained, recipe=recipe)):
            assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
            assert abs(same_cosine - cosine) < 1e-12


def _pipelined(group: Group) -> tuple[list[Tensor], float]:
    return _trained(group, BlockADMM(lr=0.02, order="pipelined", probe_every=1))


def test_real_processes_give_the_bits_of_one() -> None:
    alone, _ = _pipelined(Solo())
    for found, _ in processes(2, _pipelined, timeout=60):
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
