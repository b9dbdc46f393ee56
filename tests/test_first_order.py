"""SGD and Adam: torch's own steps, the same on one rank and on many, resumable to the bit."""

from __future__ import annotations

import io
import os
import signal
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from piecework.group import Group, Solo
from piecework.losses import Logistic, Softmax, Squared
from piecework.methods import METHODS, SGD, Adam
from piecework.methods.schedule import rate
from piecework.models import mlp
from piecework.nn import Sign, Standardise
from piecework.testing import Killed, processes, threads
from piecework.training import BadInput, Batch, CannotTrain, PeerLost

RECIPES = {
    "sgd": SGD(lr=0.05),
    "nesterov": SGD(lr=0.05, nesterov=True, weight_decay=0.01),
    "plain": SGD(lr=0.05, momentum=0.0),
    "adam": Adam(lr=0.01),
    "adamw": Adam(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6),
    "scheduled": Adam(schedule="linear", schedule_steps=11, warmup_steps=3),
}


def _rows(num: int = 96, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 5, generator=generator, dtype=torch.float64)
    return Batch(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def _network(seed: int = 1) -> nn.Sequential:
    return mlp(5, [7], 3, seed=seed, dtype=torch.float64)


def _with_dropout() -> nn.Sequential:
    return nn.Sequential(*_network()[:2], nn.Dropout(0.4), *_network()[2:])


def _part(rows: Batch, step: int, size: int = 24) -> Batch:
    start = step * size % len(rows)
    return Batch(rows.x[start : start + size], rows.y[start : start + size])


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).clone()


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


@pytest.mark.parametrize("name", ["sgd", "nesterov", "plain", "adam", "adamw"])
def test_a_step_is_torchs_own(name: str) -> None:
    rows, model, recipe = _rows(), _network(), RECIPES[name]
    if isinstance(recipe, SGD):
        plain: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            foreach=False,
        )
    else:
        plain = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            foreach=False,
        )
    training = recipe.bind(_network(), Softmax(), group=Solo())
    for step in range(9):
        batch = _part(rows, step)
        plain.zero_grad()
        loss = nn.functional.cross_entropy(model(batch.x), batch.y)
        loss.backward()
        plain.step()
        metrics = training.step(batch)
        assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-9)
    torch.testing.assert_close(_weights(training.model), _weights(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("recipe", [SGD(lr=0.1), Adam(lr=0.01, weight_decay=0.01)], ids=["sgd", "adam"])
def test_it_learns_and_reports_plain_numbers(recipe: SGD | Adam) -> None:
    rows, training = _rows(), recipe.bind(_network(), Softmax(), group=Solo())
    metrics = [training.step(_part(rows, step)) for step in range(120)]
    assert set(metrics[0]) == {"loss", "lr"}
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics[0].values())
    assert float(metrics[-1]["loss"]) < 0.3 * float(metrics[0]["loss"])
    assert (training.data, training.batches, training.deterministic) == ("shard", "mini", True)


class _Reads(TorchDispatchMode):
    """Notes every operation that reads a number back from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "recipe",
    [SGD(lr=0.1), Adam(schedule="cosine", schedule_steps=9, warmup_steps=2, label_smoothing=0.1)],
    ids=["sgd", "adam"],
)
def test_a_step_reads_nothing_back_from_the_device(recipe: SGD | Adam) -> None:
    rows, training = _rows(), recipe.bind(_with_dropout(), Softmax(), group=Solo())
    with _Reads() as reads:
        for step in range(3):
            training.step(_part(rows, step))
    assert reads.found == []


@pytest.mark.parametrize("make", [_network, _with_dropout])
@pytest.mark.parametrize("name", RECIPES)
def test_stopped_and_resumed_it_is_one_run_to_the_bit(name: str, make: Any) -> None:
    rows, recipe = _rows(), RECIPES[name]
    whole, first = (recipe.bind(make(), Softmax(), group=Solo()) for _ in range(2))
    wanted = [whole.step(_part(rows, step)) for step in range(12)]
    for step in range(5):
        first.step(_part(rows, step))
    state, model = _through_a_file(first.state_dict()), _through_a_file(first.model.state_dict())
    kept = first.state_dict()
    first.step(_part(rows, 5))
    for saved in (state, kept):
        second = recipe.bind(make(), Softmax(), group=Solo())
        second.model.load_state_dict(model)
        second.load_state_dict(saved)
        assert [second.step(_part(rows, step)) for step in range(5, 12)] == wanted[5:]
        assert torch.equal(_weights(second.model), _weights(whole.model))


def _on_ranks(group: Group, recipe: SGD | Adam, steps: int, size: int = 12) -> tuple[Tensor, int, int]:
    """The weights after some steps, in each of which the ranks share 24 rows; bytes and rounds of the steps."""
    rows, model = _rows(), _network(seed=1 + group.rank)
    training = recipe.bind(model, Softmax(), group=group)
    sent, rounds = group.bytes_sent, group.rounds
    for step in range(steps):
        batch = _part(rows, step)
        own = slice(group.rank * 24 // group.size, (group.rank + 1) * 24 // group.size)
        training.step(Batch(batch.x[own], batch.y[own]))
    training.sync()
    assert list(training.model.state_dict()) == list(_network().state_dict())
    return _weights(model), group.bytes_sent - sent, group.rounds - rounds


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_take_the_steps_of_one_with_all_their_rows(name: str, size: int) -> None:
    recipe = RECIPES[name]
    alone, sent, rounds = _on_ranks(Solo(), recipe, 7)
    assert sent == rounds == 0
    ranks = threads(size, partial(_on_ranks, recipe=recipe, steps=7))
    for weights, sent, rounds in ranks:
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-12)
        assert torch.equal(weights, ranks[0][0])
        assert (sent, rounds) == ((7 * 8 * len(alone), 7) if size > 1 else (0, 0))


def test_processes_average_like_threads_and_count_the_same_bytes() -> None:
    work = partial(_on_ranks, recipe=Adam(lr=0.01), steps=7)
    in_memory, real = threads(2, work), processes(2, work)
    for (weights, sent, rounds), (others, their_bytes, their_rounds) in zip(in_memory, real, strict=True):
        torch.testing.assert_close(weights, others, rtol=0, atol=1e-12)
        assert (sent, rounds) == (their_bytes, their_rounds)
    assert torch.equal(real[0][0], real[1][0])


def _until_rank_1_is_killed(group: Group) -> str:
    rows, training = _rows(), SGD().bind(_network(), Softmax(), group=group)
    for step in range(9):
        if step == 3 and group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            training.step(rows)
        except PeerLost as lost:
            with pytest.raises(PeerLost, match="broke earlier"):
                training.step(rows)
            return f"rank {lost.rank} lost {lost.peer} in {lost.verb} at step {step}"
    return "nothing happened"


def test_a_killed_rank_is_a_lost_peer_in_the_step_that_misses_it() -> None:
    told, killed = processes(2, _until_rank_1_is_killed, wait=30, outcomes=True)
    assert isinstance(killed, Killed)
    assert told == "rank 0 lost 1 in the gradient average at step 3"


def test_the_rate_rises_and_falls_as_it_is_documented() -> None:
    for schedule in ("linear", "cosine"):
        recipe = SGD(lr=0.5, warmup_steps=4, schedule=schedule, schedule_steps=24)  # type: ignore[arg-type]
        rates = [rate(recipe, step) for step in range(40)]
        assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
        assert rates[4:24] == sorted(rates[4:24], reverse=True)
        assert rates[23:] == pytest.approx([0.005] * 17)
    assert rates[13] == pytest.approx(0.5 * (0.01 + 0.99 * (1 + torch.cos(torch.tensor(torch.pi * 9 / 19)).item()) / 2))
    assert [rate(SGD(lr=2.0), step) for step in (0, 9)] == [2.0, 2.0]


def test_the_schedule_acts_and_is_reported() -> None:
    rows = _rows()
    recipe = SGD(lr=0.1, schedule="cosine", schedule_steps=6)
    training = recipe.bind(_network(), Softmax(), group=Solo())
    rates = [float(training.step(_part(rows, step))["lr"]) for step in range(6)]
    assert rates == [rate(recipe, step) for step in range(6)]


def test_smoothed_labels_are_trained_on_and_the_users_loss_is_reported() -> None:
    rows, found = _rows(), {}
    for smoothing in (0.0, 0.2):
        model = _network()
        training = SGD(lr=0.1, label_smoothing=smoothing).bind(model, Softmax(), group=Solo())
        found[smoothing] = (float(training.step(rows)["loss"]), _weights(model))
    assert found[0.0][0] == found[0.2][0]
    model = _network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(model(rows.x), rows.y, label_smoothing=0.2).backward()
    plain.step()
    torch.testing.assert_close(found[0.2][1], _weights(model), rtol=0, atol=1e-12)


def test_dropout_draws_from_seed_rank_and_step_and_from_nothing_else() -> None:
    rows = _rows(24)

    def losses(seed: int, noise: int) -> list[float]:
        torch.manual_seed(noise)
        training = SGD(lr=1e-9, seed=seed).bind(_with_dropout(), Softmax(), group=Solo())
        return [float(training.step(rows)["loss"]) for _ in range(3)]

    with torch.random.fork_rng(devices=[]):
        first = losses(0, 5)
        assert losses(0, 6) == first
        assert losses(1, 5) != first
        assert len(set(first)) == 3
        before = torch.get_rng_state()
        SGD().bind(_with_dropout(), Softmax(), group=Solo()).step(rows)
        assert torch.equal(torch.get_rng_state(), before)

    def work(group: Group) -> float:
        return float(SGD().bind(_with_dropout(), Softmax(), group=group).step(rows)["loss"])

    ranks = threads(3, work)
    assert len(set(ranks)) == 3
    assert threads(3, work) == ranks


class _Noisy(nn.Module):
    """Draws from the global generator in a way that nobody can see from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _network()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(x + 0.1 * torch.randn_like(x))
        return z


def test_a_users_own_module_may_draw_too() -> None:
    rows, found = _rows(24), []
    for noise in (5, 6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise)
            found.append(float(Adam().bind(_Noisy(), Softmax(), group=Solo()).step(rows)["loss"]))
    assert found[0] == found[1]


def test_running_statistics_become_those_of_rank_0_and_do_not_act_on_the_training() -> None:
    rows = _rows()

    def work(group: Group, often: bool) -> tuple[Tensor, list[Tensor]]:
        model = nn.Sequential(_network()[0], nn.BatchNorm1d(7, dtype=torch.float64), *_network()[1:])
        training = SGD(lr=0.05).bind(model, Softmax(), group=group)
        for step in range(4):
            batch = _part(rows, 2 * step + group.rank, 12)
            training.step(batch)
            if often:
                training.sync()
        training.sync()
        return _weights(model), [buffer.clone() for buffer in model.buffers()]

    found = [*threads(2, partial(work, often=False)), *threads(2, partial(work, often=True))]
    for weights, buffers in found[1:]:
        assert torch.equal(weights, found[0][0])
        assert all(torch.equal(one, other) for one, other in zip(buffers, found[0][1], strict=True))


def test_sync_sends_nothing_where_no_buffer_has_changed() -> None:
    def work(group: Group) -> int:
        scaling = Standardise(torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
        training = SGD().bind(nn.Sequential(scaling, _network()), Softmax(), group=group)
        training.step(_rows(24))
        before = group.rounds
        training.sync()
        return group.rounds - before

    assert threads(2, work) == [0, 0]


def test_raw_pixels_will_do() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (61, 24), generator=generator, dtype=torch.uint8)
    scaling = Standardise(x.float().mean(0), x.float().std(0))
    training = Adam(lr=0.01).bind(nn.Sequential(scaling, mlp(24, [5], 1)), Logistic(), group=Solo())
    losses = [float(training.step(Batch(x, (x[:, 0] > 128).long()))["loss"]) for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]


def test_a_module_put_in_training_mode_trains_and_frozen_weights_stay() -> None:
    model = _with_dropout().eval()
    first = next(model.parameters()).requires_grad_(False)
    before = first.clone()
    Adam().bind(model, Softmax(), group=Solo()).step(_rows())
    assert model.training
    assert torch.equal(first, before)


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = _network(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.used(x)
        return z


@pytest.mark.parametrize("recipe", [SGD(), Adam()], ids=["sgd", "adam"])
def test_what_it_cannot_train_is_refused_in_a_sentence(recipe: SGD | Adam) -> None:
    twice = Sign()
    for model, words in (
        (nn.Flatten(), "nothing to train"),
        (nn.Sequential(nn.Linear(5, 4), Sign(), nn.Linear(4, 2)), r"layer 1 \(Sign\)"),
        (nn.Sequential(twice, nn.Linear(5, 4), twice, nn.Linear(4, 2)), r"layer 2 \(Sign\)"),
        (nn.LazyLinear(3), "no shape yet"),
    ):
        with pytest.raises(CannotTrain, match=words):
            recipe.bind(model, Softmax(), group=Solo())
    features = nn.Sequential(nn.Linear(5, 4).requires_grad_(False), Sign(), nn.Linear(4, 3))
    recipe.bind(features, Softmax(), group=Solo()).step(Batch(_rows().x.float(), _rows().y))
    with pytest.raises(CannotTrain, match=r"idle\.weight"):
        recipe.bind(_Unused(), Softmax(), group=Solo()).step(_rows())
    with pytest.raises(BadInput, match="no rows"):
        recipe.bind(_network(), Softmax(), group=Solo()).step(Batch(_rows().x[:0], _rows().y[:0]))


def test_label_smoothing_needs_a_loss_that_has_it() -> None:
    with pytest.raises(CannotTrain, match="squared loss has no smoothed labels"):
        Adam(label_smoothing=0.1).bind(_network(), Squared(), group=Solo())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"schedule": "cosine"}, "needs schedule_steps"),
        ({"schedule": "cosine", "schedule_steps": 5, "warmup_steps": 5}, "above warmup_steps"),
        ({"schedule_steps": 5}, "does nothing with a constant schedule"),
        ({"schedule": "sawtooth"}, "sawtooth"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    for recipe in (SGD, Adam):
        with pytest.raises(BadInput, match=words):
            recipe(**settings)


def test_settings_of_one_optimiser_are_looked_at_too() -> None:
    for settings, words in (({"momentum": 1.0}, "momentum"), ({"momentum": 0.0, "nesterov": True}, "nesterov")):
        with pytest.raises(BadInput, match=words):
            SGD(**settings)  # type: ignore[arg-type]
    for settings, words in (({"betas": (0.9, 1.0)}, "betas"), ({"eps": 0.0}, "eps")):
        with pytest.raises(BadInput, match=words):
            Adam(**settings)  # type: ignore[arg-type]


def test_a_foreign_state_is_refused() -> None:
    other = Adam().bind(mlp(5, [3], 3, dtype=torch.float64), Softmax(), group=Solo())
    other.step(_rows())
    with pytest.raises(BadInput, match="does not fit a parameter of shape"):
        Adam().bind(_network(), Softmax(), group=Solo()).load_state_dict(other.state_dict())
    deeper = Adam().bind(mlp(5, [7, 7], 3, dtype=torch.float64), Softmax(), group=Solo())
    with pytest.raises(BadInput, match="6 parameters"):
        Adam().bind(_network(), Softmax(), group=Solo()).load_state_dict(deeper.state_dict())


def test_every_name_on_the_command_line_is_a_recipe_that_binds() -> None:
    assert {"sgd", "adam", "lbfgs", "cg"} <= set(METHODS)
    for recipe in METHODS.values():
        factors = getattr(recipe, "auto_factors", None)
        network = _network() if factors is None else mlp(5, [24], 3, factors=factors)
        training = recipe().bind(network, Softmax(), group=Solo())
        assert training.batches in ("mini", "full")
