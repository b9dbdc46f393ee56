"""L-BFGS on all rows: torch's iterations, without its second pass, on any number of ranks, resumable to the bit."""

from __future__ import annotations

import io
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piecework.batches import share
from piecework.group import Group, Solo
from piecework.losses import Logistic, Loss, Softmax, Squared
from piecework.methods import LBFGS
from piecework.models import mlp
from piecework.nn import Sign, Standardise
from piecework.testing import threads
from piecework.training import BadInput, Batch, CannotTrain


def _rows(num: int = 53, *, outputs: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 5, generator=generator, dtype=torch.float64)
    turn = torch.randn(5, outputs, generator=generator, dtype=torch.float64)
    return Batch(x, torch.sin(x @ turn))


def _network(seed: int = 1, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return mlp(5, [7], 2, activation="tanh", seed=seed, dtype=dtype)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).clone()


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_the_iterations_of_torch(dtype: torch.dtype) -> None:
    rows, ours, theirs = _rows(), _network(dtype=dtype), _network(dtype=dtype)
    batch = Batch(rows.x.to(dtype), rows.y.to(dtype))
    training = LBFGS(history=4).bind(ours, Squared(), group=Solo())
    found = [training.step(batch) for _ in range(12)][-1]

    plain = torch.optim.LBFGS(
        theirs.parameters(),
        max_iter=12,
        max_eval=1000,
        tolerance_grad=0,
        tolerance_change=1e-30,
        history_size=4,
        line_search_fn="strong_wolfe",
    )
    passes, scale = 0, 2.0**30 if dtype == torch.float64 else 2.0**10

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        plain.zero_grad()
        loss = scale * Squared().total(theirs(batch.x), batch.y) / len(batch)
        loss.backward()
        return loss

    plain.step(closure)
    torch.testing.assert_close(_weights(ours), _weights(theirs), rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-3)
    if dtype == torch.float64:
        assert int(found["evaluations"]) == passes
        assert float(found["loss"]) == pytest.approx(float(Squared()(theirs(batch.x), batch.y).detach()), rel=1e-12)


def test_a_step_ends_where_its_metrics_say() -> None:
    batch, model = _rows(), _network()
    training = LBFGS().bind(model, Squared(), group=Solo())
    for _ in range(3):
        metrics = training.step(batch)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    loss = Squared()(model(batch.x), batch.y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-10)
    assert float(metrics["stalled"]) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_finds_the_least_squares_solution() -> None:
    batch, model = _rows(outputs=1), nn.Linear(5, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    training = LBFGS().bind(model, Squared(), group=Solo())
    for _ in range(40):
        training.step(batch)
    table = torch.cat([batch.x, torch.ones(len(batch), 1, dtype=torch.float64)], 1)
    exact = torch.linalg.lstsq(table, batch.y).solution.reshape(-1)
    torch.testing.assert_close(_weights(model), exact, rtol=0, atol=1e-7)


def test_at_the_minimum_it_stalls_and_passes_stop() -> None:
    batch, model = _rows(outputs=1), nn.Linear(5, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    training = LBFGS().bind(model, Squared(), group=Solo())
    metrics = [training.step(batch) for _ in range(60)]
    assert float(metrics[-1]["stalled"]) == 1
    assert float(metrics[-1]["evaluations"]) == float(metrics[-2]["evaluations"])
    losses = [float(one["loss"]) for one in metrics]
    assert losses == sorted(losses, reverse=True)
    other = _rows(outputs=1, seed=9)
    assert float(training.step(other)["stalled"]) == 0


@pytest.mark.parametrize("stop", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stopped_and_resumed_it_is_one_run_to_the_bit(stop: int, dtype: torch.dtype) -> None:
    rows = _rows()
    batch = Batch(rows.x.to(dtype), rows.y.to(dtype))
    whole = LBFGS(history=3).bind(_network(dtype=dtype), Squared(), group=Solo())
    first = LBFGS(history=3).bind(_network(dtype=dtype), Squared(), group=Solo())
    wanted = [whole.step(batch) for _ in range(15)]
    for _ in range(stop):
        first.step(batch)
    state = _through_a_file(first.state_dict())
    for _ in range(2):
        first.step(batch)  # what comes after must not reach the state that was taken
    second = LBFGS(history=3).bind(_network(seed=5, dtype=dtype), Squared(), group=Solo())
    again = LBFGS(history=3).bind(_network(dtype=dtype), Squared(), group=Solo())
    for _ in range(stop):
        again.step(batch)
    second.model.load_state_dict(again.model.state_dict())
    second.load_state_dict(state)
    found = [second.step(batch) for _ in range(15 - stop)]
    assert torch.equal(_weights(second.model), _weights(whole.model))
    assert found == wanted[stop:]


def _on_ranks(group: Group, batch: Batch, cuts: list[int], steps: int) -> tuple[Tensor, list[float], int]:
    rows = slice(cuts[group.rank], cuts[group.rank + 1])
    model = _network(seed=1 + group.rank)
    training = LBFGS().bind(model, Squared(), group=group)
    own = Batch(batch.x[rows], batch.y[rows])
    metrics = [training.step(own) for _ in range(steps)]
    return _weights(model), [float(one["loss"]) for one in metrics], int(metrics[-1]["evaluations"])


@pytest.mark.parametrize("cuts", [[0, 20, 53], [0, 53, 53], [0, 5, 22, 53], [0, 0, 53, 53]])
def test_ranks_with_uneven_or_no_rows_take_the_steps_of_one(cuts: list[int]) -> None:
    batch = _rows()
    alone, losses, passes = _on_ranks(Solo(), batch, [0, 53], 8)
    for weights, others, counted in threads(len(cuts) - 1, partial(_on_ranks, batch=batch, cuts=cuts, steps=8)):
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-10)
        assert others == pytest.approx(losses, rel=1e-10)
        assert counted == passes


def test_an_evaluation_is_one_message_of_the_models_size() -> None:
    batch = _rows()

    def work(group: Group) -> tuple[int, int, int, int]:
        rows = share(len(batch), group.rank, group.size)
        model = _network()
        training = LBFGS().bind(model, Squared(), group=group)
        start, rounds = group.bytes_sent, group.rounds
        metrics = [training.step(Batch(batch.x[rows], batch.y[rows])) for _ in range(1)]
        size = sum(parameter.numel() for parameter in model.parameters())
        return group.bytes_sent - start, group.rounds - rounds, int(metrics[-1]["evaluations"]), size

    for sent, rounds, passes, size in threads(2, work):
        assert rounds == passes
        assert sent == passes * 8 * (size + 3)


def test_rows_pass_in_tiles_and_the_tile_changes_nothing() -> None:
    batch, seen = _rows(), []
    found = []
    for tile in (53, 7, 1000):
        model = _network()
        model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
        training = LBFGS(tile=tile).bind(model, Squared(), group=Solo())
        for _ in range(6):
            training.step(batch)
        assert max(seen) == min(tile, 53)
        seen.clear()
        found.append(_weights(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)
    assert torch.equal(found[2], found[0])


def test_raw_pixels_and_classes_will_do() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (61, 24), generator=generator, dtype=torch.uint8)
    for loss, y, outputs in (
        (Softmax(), (x[:, 0] // 86).long(), 3),
        (Logistic(), (x[:, 0] > 128).long(), 1),
    ):
        scaling = Standardise(x.double().mean(0), x.double().std(0))
        model = nn.Sequential(scaling, mlp(24, [5], outputs, dtype=torch.float64))
        training = LBFGS().bind(model, loss, group=Solo())
        metrics = [training.step(Batch(x, y)) for _ in range(25)]
        assert float(metrics[-1]["loss"]) < 0.1 * float(metrics[0]["loss"])


class _Cliff(Squared):
    """Squared, but not a number where an output is above a bound."""

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        return super().total(torch.where(z > 1.2, math.nan, z), y)


def test_a_trial_that_is_not_a_number_is_stepped_back_from() -> None:
    batch = Batch(torch.ones(3, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64))
    model = nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-20.0)
    training = LBFGS().bind(model, _Cliff(), group=Solo())
    losses = [float(training.step(batch)["loss"]) for _ in range(12)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 1e-8


def test_a_start_that_is_not_a_number_stays_and_says_so() -> None:
    batch, model = _rows(), _network()
    with torch.no_grad():
        next(model.parameters()).fill_(math.inf)
    before = _weights(model)
    training = LBFGS().bind(model, Squared(), group=Solo())
    for _ in range(2):
        metrics = training.step(batch)
        assert float(metrics["stalled"]) == 1
        assert not math.isfinite(float(metrics["loss"]))
    assert torch.equal(_weights(model), before)


def test_weights_that_others_moved_are_looked_at_afresh() -> None:
    batch, model = _rows(), _network()
    training = LBFGS().bind(model, Squared(), group=Solo())
    training.step(batch)
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    moved = float(Squared()(model(batch.x), batch.y).detach())
    assert float(training.step(batch)["loss"]) <= moved
    assert float(Squared()(model(batch.x), batch.y).detach()) <= moved


def test_frozen_weights_stay() -> None:
    batch, model = _rows(), _network()
    first = next(model.parameters()).requires_grad_(False)
    before = first.clone()
    training = LBFGS().bind(model, Squared(), group=Solo())
    losses = [float(training.step(batch)["loss"]) for _ in range(4)]
    assert torch.equal(first, before)
    assert losses[-1] < losses[0]


def _mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("model", "loss", "words"),
    [
        (nn.Flatten(), Squared(), "nothing to train"),
        (nn.Sequential(nn.Linear(5, 2), nn.Dropout(0.5)), Squared(), "layer 1 draws random numbers"),
        (nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2)), Squared(), "layer 1 normalises over the batch"),
        (nn.Sequential(nn.Linear(5, 4), Sign(), nn.Linear(4, 2)), Squared(), r"layer 1 \(Sign\)"),
        (nn.LazyLinear(2), Squared(), "no shape yet"),
        (_mixed(), Squared(), "one dtype"),
    ],
)
def test_what_it_cannot_train_is_refused_in_a_sentence(model: nn.Module, loss: Loss, words: str) -> None:
    with pytest.raises(CannotTrain, match=words):
        LBFGS().bind(model, loss, group=Solo())


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 4), Sign(), nn.Linear(4, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(x)
        return z


def test_a_layer_without_a_derivative_is_named_on_all_ranks_at_the_first_step() -> None:
    batch = _rows()

    def work(group: Group) -> str:
        rows = slice(0, 53 if group.rank == 0 else 0)
        with pytest.raises(CannotTrain, match="no derivative") as refusal:
            LBFGS().bind(_Wrapped(), Squared(), group=group).step(Batch(batch.x[rows], batch.y[rows]))
        return str(refusal.value)

    assert "inner.0.weight" in threads(2, work)[0]


def test_settings_that_mean_nothing_are_refused() -> None:
    for setting in ("history", "max_line_search", "tile"):
        with pytest.raises(BadInput, match=setting):
            LBFGS(**{setting: 0})


def test_no_rows_at_all_and_foreign_states_are_refused() -> None:
    batch = _rows()
    with pytest.raises(BadInput, match="no rows"):
        LBFGS().bind(_network(), Squared(), group=Solo()).step(Batch(batch.x[:0], batch.y[:0]))
    other = LBFGS().bind(mlp(5, [3], 2, dtype=torch.float64), Squared(), group=Solo())
    other.step(batch)
    with pytest.raises(BadInput, match="trainable numbers"):
        LBFGS().bind(_network(), Squared(), group=Solo()).load_state_dict(other.state_dict())
