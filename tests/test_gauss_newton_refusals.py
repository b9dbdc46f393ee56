"""What Gauss-Newton refuses, and what it does with bad data: a sentence each, with the way out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jacobian_cases import randn
from piecework import losses
from piecework.group import Group
from piecework.methods.gauss_newton.choice import SOLVERS
from piecework.testing import threads
from piecework.training import BadInput, Batch, CannotTrain, DidNotSolve
from plain_gauss_newton import SQUARED, bind, flat, metrics, named, network, rows


class _Drawing(nn.Module):
    """Noise from a hand-made layer: nothing but a second pass can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + 0.1 * torch.randn(len(x), 1, generator=self.generator, dtype=x.dtype)  # type: ignore[no-any-return]


class _Coupled(nn.Module):
    """Centred outputs: each depends on the other rows of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.net(x)
        return z - z.mean(0)


def _frozen() -> nn.Module:
    return network().requires_grad_(False)


def _mixed() -> nn.Module:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = network(), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.scale.double()  # type: ignore[no-any-return]

    return Mixed()


def _with(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(network(5), layer(), nn.Linear(5, 1)).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (_with(lambda: nn.Dropout(0.1)), "layer 1 draws random numbers.*remove it"),
    "batch norm": (_with(lambda: nn.BatchNorm1d(5)), "layer 1 normalises over the batch.*use LayerNorm"),
    "noise": (_Drawing, "two forward passes differ.*remove them"),
    "coupled rows": (_Coupled, "rows that do not depend on each other"),
    "all frozen": (_frozen, "found nothing to train.*requires_grad_"),
    "two dtypes": (_mixed, "torch.float32 on cpu, torch.float64 on cpu; convert the model"),
}


class _Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


class _Centring(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("layer", [_Noise, _Centring])
def test_a_sequence_is_probed_in_bind(layer: Callable[[], nn.Module]) -> None:
    model = _with(layer)()
    state = torch.get_rng_state()
    with pytest.raises(CannotTrain, match="gauss-newton needs"):
        bind(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_does_not_suit_is_refused(name: str) -> None:
    """In bind, or at the first batch where only a forward pass can tell; the weights are as they were."""
    make, match = MODELS[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CannotTrain, match=f"gauss-newton.*{match}") as error:
        bind(model).step(rows(24))
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.0), lambda: nn.LayerNorm(5)])
def test_a_dropout_of_nothing_and_norms_of_a_row_are_trained(layer: Callable[[], nn.Module]) -> None:
    told = [metrics(training, rows(24)) for training in [bind(_with(layer)())] for _ in range(3)]
    assert told[-1]["loss"] < told[0]["loss"]


def test_a_loss_without_curvature_is_refused() -> None:
    with pytest.raises(CannotTrain, match=r"needs a loss with curvature, and the hinge loss lacks residual.*squared"):
        bind(network(), losses.named("hinge"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"damping": 0.0}, "damping must be positive, got 0.0"),
        ({"damping": float("nan")}, "damping must be positive"),
        ({"inner_tolerance": -1.0}, "inner_tolerance must be positive"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"sketch_rows": 0.0}, "sketch_rows must be positive"),
        ({"inner_iterations": 0}, "inner_iterations must be at least 1, got 0"),
        ({"max_retries": 0}, "max_retries must be at least 1"),
        ({"tile": 0}, "tile must be at least 1"),
        ({"sample_rows": 0}, "sample_rows must be at least 1"),
        ({"sample_rows": 5, "sample_steps": 0}, "sample_steps must be at least 1"),
        ({"memory": 0.0}, "memory is a number of GiB, more than 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=f"gauss-newton: {match}"):
        bind(network(), **settings)


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("settings", [{}, {"sample_rows": 24}])
def test_data_that_are_not_finite_are_a_sentence_at_the_start(bad: float, where: str, settings: dict[str, Any]) -> None:
    batch = rows(24)
    getattr(batch, where)[7, 0] = bad
    model = network()
    before = flat(model)
    with pytest.raises((DidNotSolve, CannotTrain), match="not finite"):
        bind(model, **settings).step(batch)
    assert torch.equal(flat(model), before)


def test_a_start_that_overflows_is_a_sentence() -> None:
    batch = rows(24)
    with pytest.raises(DidNotSolve, match=r"loss at the start is not finite.*scale the features"):
        bind(network()).step(Batch(batch.x, 1e200 * batch.y))


def test_data_that_turn_bad_midway_are_a_sentence_and_leave_the_weights() -> None:
    batch, model = rows(24), network()
    training = bind(model)
    training.step(batch)
    before = flat(model)
    worse = Batch(batch.x, batch.y.clone())
    worse.y[3, 0] = float("nan")
    with pytest.raises(DidNotSolve, match="not finite"):
        training.step(worse)
    assert torch.equal(flat(model), before)
    assert metrics(training, batch)["stalled"] == 0


def test_no_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="at least one row"):
        bind(network()).step(Batch(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)))


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
def test_a_singular_system_is_solved(solver: str) -> None:
    """Every row three times, a constant and a dead feature, and a damping of nearly nothing: the loss still falls."""
    few = rows(11)
    x = torch.cat([few.x, torch.ones(11, 1, dtype=torch.float64), torch.zeros(11, 1, dtype=torch.float64)], 1)
    batch = Batch(x.repeat(3, 1), few.y.repeat(3, 1))
    training = bind(network(features=5), solver=solver, damping=1e-15)
    told = [metrics(training, batch) for _ in range(6)]
    assert all(torch.tensor([one["loss"] for one in told]).isfinite())
    assert [one["loss"] for one in told] == sorted((one["loss"] for one in told), reverse=True)
    assert told[-1]["loss"] < 0.5 * float(SQUARED(network(features=5)(batch.x), batch.y).detach())
    assert bool(flat(training.model).isfinite().all())


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
def test_features_of_zeros_are_fitted_by_the_bias(solver: str) -> None:
    batch = Batch(torch.zeros(11, 3, dtype=torch.float64), randn(11, 1))
    training = bind(network(hidden=()), solver=solver)
    told = [metrics(training, batch) for _ in range(6)]
    assert told[-1]["loss"] == pytest.approx(float(batch.y.var(correction=0)), rel=1e-6)


def test_a_parameter_that_the_outputs_do_not_see_is_named_and_left() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.idle = network(), nn.Linear(3, 1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    model = Aside()
    before = model.idle.weight.clone()
    training = bind(model)
    with pytest.warns(UserWarning, match="do not depend on idle.weight, idle.bias: gauss-newton leaves it"):
        training.step(rows(24))
    assert torch.equal(model.idle.weight, before)


def test_a_state_of_another_method_is_refused() -> None:
    with pytest.raises(BadInput, match="not of gauss-newton"):
        bind(network()).load_state_dict({"step": 3})


def test_classes_that_are_sure_stay_finite() -> None:
    """Outputs so large that the probabilities underflow: no step is lost to 0 / 0."""
    batch, model = rows(24, "softmax"), network(3)
    with torch.no_grad():
        model[-1].weight.mul_(1e3)
    told = [metrics(training, batch) for training in [bind(model, named("softmax"))] for _ in range(8)]
    assert all(torch.tensor([one["loss"] for one in told]).isfinite())
    assert told[-1]["loss"] < 0.5 * told[0]["loss"]
    assert bool(flat(model).isfinite().all())


class _Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class _Attention(nn.Module):
    """Positions of a sample see each other; samples do not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.mT, -1) @ x


@pytest.mark.parametrize("kind", ["flattened positions", "attention", "a domain of its own"])
def test_rows_that_are_made_up_refuse_nothing_that_trains(kind: str) -> None:
    first, x, y = nn.Linear(3, 5), randn(24, 4, 3), rows(24).y
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(20, 1)).double()
    if kind == "attention":  # at each position an output
        model, y = nn.Sequential(first, _Attention(), nn.Linear(5, 1)).double(), y.expand(24, 4)
    elif kind == "a domain of its own":
        nn.init.constant_(first.weight, 0.3)
        nn.init.constant_(first.bias, 0.3)
        model, x = nn.Sequential(first, _Root(), nn.Linear(5, 1)).double(), randn(24, 3).abs()
    training = bind(model)
    before = [metrics(training, Batch(x, y))["loss"] for _ in range(3)]
    assert before[2] < before[0]


def test_outputs_that_cancel_are_no_coupling() -> None:
    """Residuals of an equation that is nearly solved: rounding is then large beside them."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.register_buffer("start", flat(self.net))

        def forward(self, x: Tensor) -> Tensor:
            tilt = 1 + len(x) * torch.finfo(x.dtype).eps  # as a product of another shape may round
            return 1e3 * self.net(x) * tilt - 1e3 * torch.func.functional_call(self.net, self._there(), (x,))

        def _there(self) -> dict[str, Tensor]:
            parts = self.start.split([p.numel() for p in self.net.parameters()])
            return {n: v.view_as(p) * (1 + 1e-9) for (n, p), v in zip(self.net.named_parameters(), parts, strict=True)}

    bind(Cancelling(), damping=1.0).step(rows(24))


def test_the_first_and_last_of_very_many_rows_are_looked_at() -> None:
    num = 2**24 + 4
    batch = Batch(randn(1, 3).expand(num, 3), rows(1).y.expand(num, 1))
    assert bind(network())._objective.plan(batch).num_outputs == 1


def test_ranks_are_probed_with_the_weights_of_rank_0() -> None:
    def work(group: Group) -> float:
        model = network()
        if group.rank:
            nn.init.constant_(model[0].weight, math.nan)
        return metrics(bind(model, group=group), rows(24))["loss"]

    first, second = threads(2, work)
    assert first == second
