"""Block-ADMM through layers without a derivative: their blocks, their proximal steps, and one call for all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kept import Kept
from piecework import Batch, BlockADMM, CannotTrain, losses
from piecework.group import Group, Solo
from piecework.methods.block_admm.at_work import BlocksAtWork
from piecework.nn import (
    BlackBox,
    NonNegative,
    OneHot,
    ProxLayer,
    Quantiser,
    Sign,
    Simplex,
    Sort,
    TopK,
    VectorQuantiser,
)
from piecework.testing import threads

LOSS = losses.Softmax()


def _rows(n: int = 24, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return Batch(x, (x[:, :3] + 0.3 * x[:, 2:]).argmax(1), torch.arange(n))


def _linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, dtype=torch.float64, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in layer.parameters():
            one.copy_(torch.randn(one.shape, generator=generator, dtype=torch.float64) / inputs**0.5)
    return layer


def _around(layer: nn.Module, *, width: int = 7) -> nn.Sequential:
    """The layer between two linear ones."""
    return nn.Sequential(_linear(5, width, 1), layer, _linear(width, 3, 2))


def test_the_candidates_of_a_black_box_come_from_a_seed_and_leave_the_global_generator_alone() -> None:
    def moved(seed: int, noise: int) -> Tensor:
        model = _around(BlackBox(torch.floor, candidates=5))
        training = BlockADMM(lr=0.1, beta=0.01, seed=seed).bind(model, LOSS)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        training.step(_rows())
        training.step(_rows())
        assert torch.equal(torch.get_rng_state(), before)
        return model[0].weight.detach()

    assert torch.equal(moved(0, 1), moved(0, 2))
    assert not torch.equal(moved(0, 1), moved(1, 1))


def _given(training: Any, block: int, number: int = 0) -> list[Tensor]:
    """What the optimiser of a block was given in its step of this number."""
    given: list[Tensor] = training._blocks[block].optimizer.given[number]
    return given


def _close(one: Tensor, other: Tensor, error: float = 1e-12) -> bool:
    return float((one - other).norm()) <= error * float(other.norm()) and float(other.norm()) > 0


def _codewords(k: int = 9, d: int = 7) -> Tensor:
    return torch.randn(k, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("prox", ["linear", "exact"])
def test_codewords_get_the_gradient_of_backpropagation(prox: Any) -> None:
    model, batch = _around(VectorQuantiser(_codewords())), _rows()
    (wanted,) = torch.autograd.grad(LOSS(model(batch.x), batch.y), [model[1].codebook])
    training = BlockADMM(beta=0.01, prox=prox, optimizer=Kept).bind(model, LOSS)
    training.step(batch)
    assert _close(_given(training, 1)[0], wanted)


def _every_layer() -> nn.Sequential:
    """A network with one of each, a normalisation before the sign, and linear layers between them."""
    layers = [
        Sign(),
        TopK(3),
        Sort(),
        Quantiser(5),
        VectorQuantiser(_codewords()),
        OneHot(),
        Simplex(),
        NonNegative(),
        BlackBox(torch.floor, candidates=4),
    ]
    made: list[nn.Module] = [_linear(5, 7, 0), nn.BatchNorm1d(7, dtype=torch.float64)]
    for number, layer in enumerate(layers):
        made += [layer, _linear(7, 7 if number < len(layers) - 1 else 3, number + 1)]
    return nn.Sequential(*made)


def _bound(recipe: BlockADMM, model: nn.Module, group: Group | None = None) -> BlocksAtWork:
    training = recipe.bind(model, LOSS, group=group)
    assert isinstance(training, BlocksAtWork)
    return training


@pytest.mark.parametrize("where", [{}, {"blocks": 1}, {"blocks": 4}, {"at": (2,)}, {"at": (3, 5)}, {"at": ("4",)}])
def test_each_layer_without_a_derivative_is_a_block_of_its_own_whatever_the_cuts(where: dict[str, Any]) -> None:
    model = _every_layer()
    parts = [list(block.module) for block in _bound(BlockADMM(**where), model)._blocks]
    assert [module for part in parts for module in part] == list(model)
    for part in parts:
        assert len(part) == 1 or not any(isinstance(module, ProxLayer) for module in part)
    nested = nn.Sequential(nn.Sequential(_linear(5, 7, 0), Sign()), nn.Sequential(nn.ReLU(), _linear(7, 3, 1)))
    assert [len(block.module) for block in _bound(BlockADMM(blocks=1), nested)._blocks] == [1, 1, 2]


@pytest.mark.parametrize("layer", [Sign(), Sort(), NonNegative(), BlackBox(torch.floor)])
def test_a_last_layer_without_a_derivative_is_refused(layer: nn.Module) -> None:
    with pytest.raises(CannotTrain, match=f"last layer .{type(layer).__name__}.* put a layer with weights behind it"):
        BlockADMM().bind(nn.Sequential(_linear(5, 3, 0), layer), LOSS)


@pytest.mark.parametrize("prox", ["linear", "exact"])
def test_one_call_trains_below_every_layer_without_a_derivative(prox: Any) -> None:
    """Each layer in a network of its own, against the same network where nothing below the layer learns."""
    for make in (
        *(Sign, partial(Sign, dither=0), Sort, partial(Quantiser, 5), NonNegative, Simplex, OneHot),
        *(partial(TopK, 3), partial(TopK, 3, exchange=True)),
        *(partial(VectorQuantiser, _codewords()), partial(BlackBox, torch.floor, candidates=8)),
    ):
        ends = []
        for below in (True, False):
            model, batch = _around(make()), _rows(48)
            model[0].requires_grad_(below)
            training = BlockADMM(lr=0.02, beta=0.03, prox=prox, probe_every=0).bind(model, LOSS)
            found = [float(training.step(batch)["loss"]) for _ in range(40)]
            assert found[-1] < 0.9 * found[0]
            ends.append(found[-1])
        assert ends[0] < 0.9 * ends[1], (model[1], ends)


def test_all_of_them_train_in_one_network() -> None:
    model, batch = _every_layer(), _rows()
    start = {name: one.detach().clone() for name, one in model.named_parameters()}
    training = BlockADMM(lr=0.02, beta=0.03).bind(model, LOSS)
    found = [float(training.step(batch)["loss"]) for _ in range(60)]
    assert min(found[-5:]) < 0.9 * found[0]
    assert not [name for name, one in model.named_parameters() if torch.equal(one, start[name])]


def _written_out(model: nn.Sequential, batch: Batch, beta: list[float], prox: str, duals: bool) -> list[list[Tensor]]:
    """The gradients of the sums of the blocks' losses, from the last block down, of a model of linear layers with
    layers without a derivative between them. With duals: of the second sweep, the weights being still."""
    linear, between = list(model)[::2], list(model)[1::2]
    f = [linear[0](batch.x).detach()]  # what each block but the last gives, and so f[t - 1] is the input of block t
    for layer, one in zip(linear[1:], between, strict=True):
        f += [one(f[-1]).detach()]
        f += [] if layer is linear[-1] else [layer(f[-1]).detach()]
    d, u = ([torch.zeros_like(one) for one in f] for _ in range(2))
    for _ in range(2 if duals else 1):
        found: list[list[Tensor]] = []
        for t in reversed(range(len(model))):
            x = (f[t - 1] + d[t - 1] if t > 0 else batch.x).detach().requires_grad_()
            reach = None if t == len(f) else d[t] - u[t]
            if t % 2 == 0:
                out = model[t](x)
                total = LOSS(out, batch.y) * len(x) if reach is None else -(beta[t] * reach * out).sum()
                *weights, g = torch.autograd.grad(total, [*model[t].parameters(), x])
                found.append(weights)
                move = u[t - 1] - g / beta[t - 1] if t > 0 else None
            else:
                v = f[t - 1] + u[t - 1]
                if prox == "linear":
                    a = model[t].prox_input_linear(v, -beta[t] * reach, beta[t - 1])
                else:
                    a = model[t].prox_input(v, f[t] + reach, beta[t - 1], beta[t])
                move = a - f[t - 1]
            if t > 0:
                d[t - 1] = move
        inputs = [batch.x, *(one + two for one, two in zip(f, d, strict=True))]
        now = [model[t](inputs[t]).detach() for t in range(len(f))]
        u = [two + (new - (one + three)) for one, two, three, new in zip(f, u, d, now, strict=True)]
        d, f = [one + two - new for one, two, new in zip(f, d, now, strict=True)], now
    return found


@pytest.mark.parametrize("prox", ["linear", "exact"])
@pytest.mark.parametrize("duals", [False, True])
@pytest.mark.parametrize("exchange", [False, True])
def test_the_step_is_the_written_out_one(prox: Any, duals: bool, exchange: bool) -> None:
    """Linear, Sign, Linear, TopK, Linear: forward, targets from the last block down, a gradient a block."""
    model, batch = nn.Sequential(*_around(Sign()), TopK(2, exchange=exchange), _linear(3, 3, 4)), _rows()
    beta = [0.02, 0.03, 0.05, 0.01]
    wanted = _written_out(model, batch, beta, prox, duals)
    more: dict[str, Any] = {"sweeps": 2, "dual_step": 1.0} if duals else {}
    training = _bound(BlockADMM(beta=tuple(beta), prox=prox, optimizer=Kept, **more), model)
    training.step(batch)
    for block, weights in zip((4, 2, 0), wanted, strict=True):
        given = _given(training, block, 1 if duals else 0)
        assert all(_close(one, other / len(batch)) for one, other in zip(given, weights, strict=True)), block


@pytest.mark.parametrize("clip", [0.5, 1.0])
def test_with_a_large_penalty_a_dithered_sign_is_the_straight_through_estimator(clip: float) -> None:
    model, batch = _around(Sign(dither=clip)), _rows()
    a = model[0](batch.x)
    out = a.detach().clamp(-clip, clip) / clip
    passed = out + (a.clamp(-clip, clip) - a.clamp(-clip, clip).detach()) / clip
    signed = passed + (model[1](a) - passed).detach()
    wanted = torch.autograd.grad(LOSS(model[2](signed), batch.y), list(model[0].parameters()))
    training = _bound(BlockADMM(beta=1e6, optimizer=Kept), model)
    training.step(batch)
    assert all(_close(one, other, 1e-6) for one, other in zip(_given(training, 0), wanted, strict=True))


def test_with_a_large_penalty_sorting_is_backpropagation() -> None:
    errors = []
    for beta in (1e2, 1e6):
        model, batch = _around(Sort()), _rows()
        wanted = torch.autograd.grad(LOSS(model(batch.x), batch.y), list(model[0].parameters()))
        training = _bound(BlockADMM(beta=beta, optimizer=Kept), model)
        training.step(batch)
        pairs = zip(_given(training, 0), wanted, strict=True)
        errors.append(max(float((one - other).norm() / other.norm()) for one, other in pairs))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-8


@pytest.mark.parametrize("beta", [1e-2, 1e2])
@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_with_any_penalty_the_kept_entries_are_backpropagation(by: str, beta: float) -> None:
    model, batch = _around(TopK(2, by=by)), _rows()
    wanted = torch.autograd.grad(LOSS(model(batch.x), batch.y), list(model[0].parameters()))
    training = _bound(BlockADMM(beta=beta, optimizer=Kept), model)
    training.step(batch)
    assert all(_close(one, other) for one, other in zip(_given(training, 0), wanted, strict=True))


RECIPES = {
    "linear": BlockADMM(lr=0.02, beta=0.03, probe_every=2),
    "exact": BlockADMM(lr=0.02, beta=0.03, prox="exact", local_steps=2, probe_every=2),
    "sweeps": BlockADMM(lr=0.02, beta=0.3, sweeps=3, alpha_beta=0.5, dual_step=0.5, probe_every=2),
    "jacobi": BlockADMM(lr=0.02, beta=0.3, sweeps=2, order="jacobi", probe_every=0),
    "pipelined": BlockADMM(lr=0.02, beta=0.3, order="pipelined", probe_every=0),
    "kept": BlockADMM(lr=0.02, beta=0.3, mode="batch", dual_step=0.5, probe_every=2),
}


def _after(group: Group, recipe: BlockADMM, stop: int | None = None) -> dict[str, Tensor]:
    """The weights after some steps; with `stop`, by another Training that goes on from the state at that step."""
    model = _every_layer()
    training = _bound(recipe, model, group)
    for step in range(42 if recipe.order == "pipelined" else 4):
        if step == stop:
            state, held = training.state_dict(), {name: one.clone() for name, one in model.state_dict().items()}
            model = _every_layer()
            model.load_state_dict(held)
            training = _bound(recipe, model, group)
            training.load_state_dict(state)
        training.step(_rows(12, seed=step % 2))
    training.sync()
    return {name: one.detach().clone() for name, one in model.state_dict().items()}


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_and_a_resumed_run_are_one_process_bit_for_bit(name: str) -> None:
    recipe, torch_state = RECIPES[name], torch.get_rng_state()
    start, alone = _every_layer().state_dict(), _after(Solo(), recipe)
    assert not torch.equal(alone["0.weight"], start["0.weight"]) or name in ("exact", "jacobi")  # too far up so far
    resumed = _after(Solo(), recipe, stop=3)
    assert all(torch.equal(resumed[key], one) for key, one in alone.items())
    for found in threads(3, partial(_after, recipe=recipe)):
        assert all(torch.equal(found[key], one) for key, one in alone.items())
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("prox", ["linear", "exact"])
def test_a_codebook_learns(prox: Any) -> None:
    model, batch = _around(VectorQuantiser(_codewords())), _rows(48)
    model.requires_grad_(False)
    model[1].requires_grad_(True)
    training = BlockADMM(lr=0.2, beta=0.03, prox=prox, local_steps=2).bind(model, LOSS)
    found = [float(training.step(batch)["loss"]) for _ in range(20)]
    assert found[-1] < 0.95 * found[0]  # what the assignments of rows to codewords leave to gain
