"""The published algorithm: its contraction, its floor, its cost in the width, and its narrow home."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jacobian_cases import randn
from piecework import losses
from piecework.methods.gauss_newton.faithful import infinite_kernel
from piecework.models import mlp, two_layer_relu
from piecework.training import BadInput, Batch, CannotTrain
from plain_gauss_newton import bind, metrics

FEATURES = 10
faithful = partial(bind, faithful=True)


def _sphere(num: int, *, seed: int = 0) -> Batch:
    """Samples of length 1 and signs without any structure, float64."""
    x = randn(num, FEATURES, seed=seed)
    return Batch(x / x.norm(dim=1, keepdim=True), randn(num, 1, seed=seed + 1).sign())


def _wide(width: int, seed: int = 0) -> nn.Sequential:
    return two_layer_relu(FEATURES, width, seed=seed, dtype=torch.float64)


def _run(num: int, width: int, seed: int, steps: int, **settings: Any) -> list[dict[str, float]]:
    batch = _sphere(num, seed=seed)
    training = faithful(_wide(width, seed), seed=seed, **settings)
    return [metrics(training, batch) for _ in range(steps)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("num", "width"), [(24, 120), (24, 500), (24, 2000), (9, 45), (9, 2000)])
def test_each_step_halves_the_residual(num: int, width: int, seed: int) -> None:
    told = _run(num, width, seed, 6)
    assert max(one["contraction"] for one in told) <= 0.5
    for before, after in pairwise(told):
        assert after["contraction"] == pytest.approx(math.sqrt(after["loss"] / before["loss"]), rel=1e-9)
    assert all(one["linear_residual"] <= one["inner_tolerance"] for one in told)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_floor_of_the_contraction_is_the_paper_s_tolerance(seed: int) -> None:
    """Where the network no longer changes its kernel, |r_{t+1}| / |r_t| is what the descent leaves: just below eps0."""
    batch = _sphere(24, seed=seed)
    eps0 = math.sqrt(float(torch.linalg.eigvalsh(infinite_kernel(batch.x))[0]) / 24) / 6
    told = _run(24, 4000, seed, 6)  # from the eighth on, rounding
    assert all(one["inner_tolerance"] == pytest.approx(eps0, rel=1e-12) for one in told)
    late = told[2:]
    for one in late:
        assert one["contraction"] == pytest.approx(one["linear_residual"], rel=0.02)
    just_below = [one for one in late if one["linear_residual"] > 0.7 * eps0]
    assert just_below
    for one in just_below:
        assert 0.7 * eps0 < one["contraction"] < 1.02 * eps0


def test_the_kernel_is_that_of_a_very_wide_network() -> None:
    batch = _sphere(5)
    model = _wide(200_000)
    active = (batch.x @ model[0].weight.detach().t() > 0).double()
    found = (batch.x @ batch.x.t()) * (active @ active.t()) / 200_000
    torch.testing.assert_close(infinite_kernel(batch.x), found, rtol=0, atol=5e-3)


def test_only_the_hidden_layer_moves_and_the_step_is_that_of_the_kernel() -> None:
    """W - J^T g with J J^T g = r to eps0: against the dense undamped step."""
    batch, model = _sphere(5), _wide(500)
    before, signs = model[0].weight.detach().clone(), model[2].signs.clone()
    active = (batch.x @ before.t() > 0).double()
    j = (active * signs / math.sqrt(500))[:, :, None] * batch.x[:, None, :]
    k = torch.einsum("imd,jmd->ij", j, j)
    r = (model(batch.x) - batch.y).detach()[:, 0]
    exact = torch.einsum("imd,i->md", j, torch.linalg.solve(k, r))
    told = metrics(faithful(model), batch)
    moved = before - model[0].weight.detach()
    left = r - torch.einsum("imd,md->i", j, moved)
    assert float(left.norm() / r.norm()) == pytest.approx(told["linear_residual"], rel=1e-6)
    assert float((moved - exact).norm() / exact.norm()) < 10 * told["inner_tolerance"]
    assert torch.equal(model[2].signs, signs)


def test_the_sketch_is_fresh_in_each_step_and_of_the_seed() -> None:
    ends = {seed: _run(9, 2000, 0, 1, sketch_rows=100.0)[0]["linear_residual"] for seed in (0,)}
    batch = _sphere(9)
    other = metrics(faithful(_wide(2000), seed=5, sketch_rows=100.0), batch)["linear_residual"]
    assert other != ends[0]
    late = faithful(_wide(2000), sketch_rows=100.0)
    late.load_state_dict({"step": 1})
    assert metrics(late, batch)["linear_residual"] != ends[0]
    assert late.state_dict() == {"step": 2}


def test_the_cost_of_a_step_is_nearly_linear_in_the_width() -> None:
    """Counted, not timed: 16 times the width is 16 times the operations, but for the logarithm of the transform."""

    def operations(width: int) -> float:
        batch, training = _sphere(9), faithful(_wide(width), sketch_rows=100.0)
        with FlopCounterMode(display=False) as counted:
            training.step(batch)
        return float(counted.get_total_flops())

    assert 10 < operations(32_000) / operations(2_000) < 26


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        mlp(FEATURES, [24], 1, dtype=torch.float64),
        nn.Sequential(nn.Linear(FEATURES, 24), nn.ReLU(), _wide(24)[2]),
        nn.Sequential(_wide(24)[0], nn.Tanh(), _wide(24)[2]),
        nn.Linear(FEATURES, 1),
    ],
    ids=["trained output", "bias", "tanh", "linear"],
)
def test_another_network_is_refused(model: nn.Module) -> None:
    with pytest.raises(CannotTrain, match=r"trains the published network only.*leave faithful out"):
        faithful(model)


@pytest.mark.parametrize("name", ["logistic", "hinge"])
def test_another_loss_is_refused(name: str) -> None:
    with pytest.raises(CannotTrain, match=f"has the squared loss, not {name}"):
        faithful(_wide(24), losses.named(name))


def test_samples_of_another_length_are_refused() -> None:
    batch = _sphere(9)
    with pytest.raises(BadInput, match=r"needs samples of length 1.*divide each row"):
        faithful(_wide(45)).step(Batch(1.1 * batch.x, batch.y))


def test_parallel_samples_are_refused() -> None:
    batch = _sphere(9)
    x = torch.cat([batch.x, batch.x[:1]])
    with pytest.raises(BadInput, match=r"two of them are parallel.*drop duplicates"):
        faithful(_wide(45)).step(Batch(x, torch.ones(10, 1, dtype=torch.float64)))
