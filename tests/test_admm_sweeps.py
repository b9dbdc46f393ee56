"""A run of sweeps: the deployed loss never rises, a run resumes to the bit, and other rows start it afresh."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from chains import bind, chain, curved, deployed_loss, flat, quarters, randn, sweeps
from piecework import losses
from piecework.group import Group
from piecework.nn import HardSigmoid, Sign
from piecework.testing import threads
from piecework.training import Batch

LOSSES = {"squared": 4, "softmax": 4, "hinge": 4, "logistic": 1}
ACTIVATIONS = ["relu", "leaky-relu", "hard-sigmoid", "tanh", "sigmoid", "sign", "identity"]


def _problem(loss: str) -> tuple[Any, Batch, tuple[int, ...]]:
    outputs = LOSSES[loss]
    return losses.named(loss), quarters(classes=max(2, outputs)), (5, 9, 7, outputs)


def _resumed(training: Any, model: nn.Module, loss: Any, **settings: Any) -> Any:
    """A fresh training with what a checkpoint holds of another: the model's state, and its own through a file."""
    file = io.BytesIO()
    torch.save({"model": training.model.state_dict(), "training": training.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    fresh = bind(model, loss, **settings)
    fresh.load_state_dict(saved["training"])
    return fresh


@pytest.mark.parametrize("acceleration", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_deployed_loss_never_rises(loss: str, acceleration: bool) -> None:
    kind, batch, widths = _problem(loss)
    model = chain(*widths)
    training = bind(model, kind, acceleration=acceleration, tile=64)
    before = float("inf")
    for _ in range(15):
        (metrics,) = sweeps(training, batch, 1)
        now = deployed_loss(model, kind, batch)
        assert now <= before * (1 + 1e-13)
        assert metrics["accepted"] == (now < before)
        assert metrics["loss"] == pytest.approx(now, rel=1e-11)
        before = now


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_deployed_loss_never_rises_whatever_the_activation(activation: str) -> None:
    batch = curved()
    rows = sweeps(bind(chain(5, 9, 7, 2, activation=activation), tile=64), batch, 10)
    values = [row["loss"] for row in rows]
    assert all(after <= before * (1 + 1e-13) for before, after in pairwise(values))


def test_the_penalised_refit_of_the_output_layer_is_the_first_gain() -> None:
    batch = curved()
    model = chain(5, 9, 2)
    before = deployed_loss(model, losses.named("squared"), batch)
    (first,) = sweeps(bind(model, output_ridge=0.0), batch, 1)
    assert first["loss"] < before
    again = bind(model, output_ridge=0.0)
    (second,) = sweeps(again, batch, 1)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-11)  # without a ridge, refitting is idempotent


@pytest.mark.parametrize("mode", ["resynchronised", "taylor2016"])
def test_no_gradient_of_the_network_is_computed(mode: str) -> None:
    model = chain(5, 9, 7, 4)
    training = bind(model, losses.named("softmax"), mode=mode)
    for _ in range(3):
        metrics = training.step(quarters())
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in model.parameters())
    assert not any(value.requires_grad for value in metrics.values())


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"acceleration": False}, {"multiplier": True}])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_resumes_to_the_bit(loss: str, settings: dict[str, Any]) -> None:
    kind, batch, widths = _problem(loss)
    whole = bind(chain(*widths), kind, tile=64, **settings)
    expected = sweeps(whole, batch, 6)
    half = bind(chain(*widths), kind, tile=64, **settings)
    rows = sweeps(half, batch, 3)
    resumed = _resumed(half, chain(*widths, seed=9), kind, tile=64, **settings)
    same_rows = Batch(batch.x.clone(), batch.y.clone())  # a new process has them at another address
    rows += sweeps(resumed, same_rows, 3)
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert rows == expected


@pytest.mark.parametrize("stop", [1, 4])
def test_a_sign_network_resumes_to_the_bit(stop: int) -> None:
    batch = quarters()
    whole = bind(chain(5, 9, 7, 4, activation="sign"))
    sweeps(whole, batch, 8)
    half = bind(chain(5, 9, 7, 4, activation="sign"))
    sweeps(half, batch, stop)
    resumed = _resumed(half, chain(5, 9, 7, 4, activation="sign", seed=9), losses.named("squared"))
    sweeps(resumed, batch, 8 - stop)
    assert torch.equal(flat(resumed.model), flat(whole.model))


def test_ranks_resume_to_the_bit_with_their_own_multipliers() -> None:
    def work(group: Group, stop: int | None) -> torch.Tensor:
        part = [(0, 11), (11, 90), (90, 211)][group.rank]
        batch, settings = quarters(), {"group": group, "multiplier": True}
        mine = Batch(batch.x[slice(*part)], batch.y[slice(*part)])
        training = bind(chain(5, 9, 4), losses.named("softmax"), **settings)
        if stop is not None:
            sweeps(training, mine, stop)
            assert training.state_dict()["dual"].shape == (part[1] - part[0], 4)
            training = _resumed(training, chain(5, 9, 4), losses.named("softmax"), **settings)
        sweeps(training, mine, 6 - (stop or 0))
        return flat(training.model)

    whole = threads(3, lambda group: work(group, None))
    resumed = threads(3, lambda group: work(group, 3))
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_a_state_can_be_taken_and_left() -> None:
    """Taking a state alters nothing, and the state does not move with the run it was taken from."""
    batch = curved()
    training = bind(chain(5, 9, 2))
    sweeps(training, batch, 3)
    weights, state = flat(training.model), training.state_dict()
    kept = [t.clone() for t in (state["gram"], *state["momentum"])]
    sweeps(training, batch, 3)
    assert all(torch.equal(t, k) for t, k in zip((state["gram"], *state["momentum"]), kept, strict=True))
    other = bind(chain(5, 9, 2))
    sweeps(other, batch, 3)
    assert torch.equal(flat(other.model), weights)


# -- the multiplier ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_the_multiplier_is_a_row_of_outputs_a_sample_and_the_only_state_of_that_size(loss: str) -> None:
    kind, batch, widths = _problem(loss)
    training = bind(chain(*widths), kind, multiplier=True, tile=64)
    sweeps(training, batch, 3)
    state = training.state_dict()
    assert state["dual"].shape == (len(batch), widths[-1])
    assert bool(state["dual"].any())
    assert bind(chain(*widths), kind).state_dict()["dual"].numel() == 0
    if loss == "softmax":  # dual is minus a gradient of the loss: between -1 and 1, each row sums to zero
        assert float(state["dual"].abs().max()) <= 1
        assert float(state["dual"].sum(1).abs().max()) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_with_the_multiplier_the_network_learns_too(loss: str) -> None:
    kind, batch, widths = _problem(loss)
    rows = sweeps(bind(chain(*widths), kind, multiplier=True), batch, 20)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


@pytest.mark.parametrize("activation", ["relu", "sign"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_multiplier_stands_still_in_the_first_step_and_moves_once_in_the_next(loss: str, activation: str) -> None:
    kind, batch, widths = _problem(loss)
    training = bind(chain(*widths, activation=activation), kind, multiplier=True, tile=64)
    training.step(batch)
    assert not training.state_dict()["dual"].any()
    with torch.no_grad():
        outputs = training.model(batch.x)
    training.step(batch)
    y = kind.targets(batch.y, widths[-1], torch.float64)
    moved = 2 * training.method.beta * (kind.prox(outputs, y, training.method.beta) - outputs)
    torch.testing.assert_close(training.state_dict()["dual"], moved, rtol=0, atol=1e-10)


# -- other rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"multiplier": True}])
def test_other_rows_start_the_run_afresh(settings: dict[str, Any]) -> None:
    kind = losses.named("softmax")
    first, second = quarters(211), quarters(97, seed=5)
    model = chain(5, 9, 4)
    training = bind(model, kind, **settings)
    sweeps(training, first, 3)
    twin = chain(5, 9, 4)
    twin.load_state_dict(model.state_dict())
    fresh = bind(twin, kind, **settings)
    rows, expected = sweeps(training, second, 3), sweeps(fresh, second, 3)
    assert rows == expected
    assert torch.equal(flat(model), flat(twin))


def test_a_new_batch_object_with_the_same_rows_goes_on() -> None:
    batch = quarters()
    one, other = bind(chain(5, 9, 4)), bind(chain(5, 9, 4))
    sweeps(one, batch, 4)
    for _ in range(4):
        other.step(Batch(batch.x, batch.y))
    assert torch.equal(flat(one.model), flat(other.model))


@pytest.mark.parametrize("settings", [{}, {"multiplier": True}])
def test_other_rows_on_one_rank_start_all_ranks_afresh(settings: dict[str, Any]) -> None:
    def work(group: Group) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        model, twin = chain(5, 9, 4), chain(5, 9, 4)
        training = bind(model, group=group, **settings)
        mine = quarters(60, seed=group.rank)
        sweeps(training, mine, 2)
        twin.load_state_dict(model.state_dict())
        mine = quarters(33, seed=7) if group.rank == 1 else mine
        return sweeps(training, mine, 3), sweeps(bind(twin, group=group, **settings), mine, 3)

    for rows, expected in threads(2, work, timeout=30):
        assert rows[0].pop("passes") == expected[0].pop("passes") + 1  # the pass that brought the news
        assert rows == expected


def test_a_stalled_run_costs_nothing_and_other_rows_wake_it() -> None:
    batch = Batch(randn(5, 5), randn(5, 2, seed=1))
    training = bind(chain(5, 24, 2), output_ridge=0.0)
    rows = sweeps(training, batch, 40)
    if rows[-1]["stalled"]:
        assert rows[-1]["passes"] == 0
    training.step(curved())
    (metrics,) = sweeps(training, curved(), 1)
    assert metrics["passes"] > 0


def test_weights_set_by_hand_are_taken_up_by_the_next_run() -> None:
    batch = curved()
    model = chain(5, 9, 2)
    training = bind(model)
    sweeps(training, batch, 1)
    with torch.no_grad():
        model[0].weight.add_(0.1)
    sweeps(training, batch, 1)
    assert model[0].weight.shape == (9, 5)
    assert deployed_loss(model, losses.named("squared"), batch) < 10


# -- odd networks ------------------------------------------------------------------------------------------------------


def test_networks_without_biases_train() -> None:
    batch = curved()
    model = nn.Sequential(
        nn.Linear(5, 9, bias=False, dtype=torch.float64), nn.ReLU(), nn.Linear(9, 2, bias=False, dtype=torch.float64)
    )
    with torch.no_grad():
        model[0].weight.copy_(randn(9, 5) / 2)
    rows = sweeps(bind(model, tile=64), batch, 8)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[-1]["loss"] == pytest.approx(deployed_loss(model, losses.named("squared"), batch), rel=1e-11)
    mixed = nn.Sequential(model[0], nn.ReLU(), chain(9, 2)[0])
    assert sweeps(bind(mixed), batch, 5)[-1]["loss"] < rows[0]["loss"]


def test_linear_layers_in_a_row_train_as_if_an_identity_stood_between_them() -> None:
    batch = curved()
    bare = nn.Sequential(*chain(5, 7, 9), nn.ReLU(), *chain(9, 2))
    plain = nn.Sequential(bare[0], bare[2], bare[3], bare[4])
    spelled = nn.Sequential(*chain(5, 7, 9), nn.ReLU(), *chain(9, 2))
    spelled[1] = nn.Identity()
    sweeps(bind(plain), batch, 4)
    sweeps(bind(spelled), batch, 4)
    assert torch.equal(flat(plain), flat(spelled))


@pytest.mark.parametrize("mode", ["resynchronised", "taylor2016"])
def test_one_activation_module_may_stand_in_many_places(mode: str) -> None:
    batch, act = curved(), nn.ReLU()
    apart = chain(5, 7, 8, 2)
    shared = nn.Sequential(*(act if isinstance(layer, nn.ReLU) else layer for layer in chain(5, 7, 8, 2)))
    sweeps(bind(apart, mode=mode), batch, 4)
    last = sweeps(bind(shared, mode=mode), batch, 4)[-1]
    assert torch.equal(flat(shared), flat(apart))
    assert last["loss"] == pytest.approx(deployed_loss(shared, losses.named("squared"), batch), rel=1e-10)


def test_activations_may_differ_from_layer_to_layer() -> None:
    batch = quarters()
    layers = []
    for l, activation in enumerate([nn.ReLU(), nn.Tanh(), HardSigmoid(), nn.LeakyReLU(0.2), nn.Hardtanh()]):
        layers += [*chain(5 if l == 0 else 8, 8, seed=l), activation]
    model = nn.Sequential(*layers, *chain(8, 4, seed=9))
    rows = sweeps(bind(model, tile=64), batch, 12)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_a_sign_in_the_middle_searches_the_steps_below_it_and_solves_those_above() -> None:
    batch = quarters()
    model = nn.Sequential(*chain(5, 9), Sign(), *chain(9, 8, seed=2), nn.ReLU(), *chain(8, 4, seed=3))
    rows = sweeps(bind(model, tile=64), batch, 12)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert {"step_1", "step_2"} <= rows[-1].keys()


def test_a_sign_network_costs_one_pass_more_to_begin_with() -> None:
    """The size of a' - h(z) is measured before the first backward pass, and then by each pass for the next."""
    batch = quarters()
    rows = sweeps(bind(chain(5, 9, 4, activation="sign")), batch, 6)
    assert rows[0]["passes"] == 1
    assert rows[1]["passes"] == 2 + rows[1]["trials"]
    assert all(row["passes"] == 1 + row["trials"] for row in rows[2:])


@pytest.mark.filterwarnings("ignore:.*rank")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output_ridge", [0.1, 0.0])
def test_constant_and_repeated_features_are_solved(loss: str, output_ridge: float) -> None:
    kind, batch, widths = _problem(loss)
    twice = torch.cat([batch.x, batch.x[:, :2], torch.ones(len(batch), 2, dtype=torch.float64), 0 * batch.x[:, :1]], 1)
    model = chain(10, 9, widths[-1])
    rows = sweeps(bind(model, kind, ridge=0.0, output_ridge=output_ridge), Batch(twice, batch.y), 8)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert rows[-1]["loss"] < rows[0]["loss"]
    one = chain(10, widths[-1])
    sweeps(bind(one, kind, output_ridge=output_ridge), Batch(twice, batch.y), 3)
    assert all(torch.isfinite(p).all() for p in one.parameters())


def test_more_units_than_rows_are_solved() -> None:
    batch = curved(11)
    rows = sweeps(bind(chain(5, 40, 30, 2)), batch, 10)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
