"""Gossip: its limits, its bits, its settings, and an optimiser of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework import BadInput, Batch, CannotTrain, Gossip, losses
from piecework.group import Group, Solo
from piecework.methods.gossip.outer import SlowMomentum
from piecework.models import mlp
from piecework.testing import threads
from piecework.testing.check import classes

LOSS = losses.Softmax()
ROWS = classes(120).train


def network(**settings: Any) -> nn.Sequential:
    return mlp(5, [7], 3, activation="tanh", seed=1, dtype=torch.float64, **settings)


def batch(step: int, rank: int, size: int = 6) -> Batch:
    rows = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(97 * step + rank))[:size]
    return Batch(ROWS.x[rows], ROWS.y[rows])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([one.detach().reshape(-1) for one in model.state_dict().values()]).clone()


def trained(group: Group, recipe: Gossip, steps: int = 20, **more: Any) -> Tensor:
    training = recipe.bind(network(), LOSS, group=group)
    for step in range(steps):
        training.step(batch(step, group.rank))
    training.sync()
    return flat(training.model)


def all_reduced(size: int, make: Callable[..., torch.optim.Optimizer], steps: int = 20) -> Tensor:
    """Data-parallel training in one process: the mean of the ranks' gradients."""
    model = network()
    optimizer = make(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(size):
            rows = batch(step, rank)
            (LOSS(model(rows.x), rows.y) / size).backward()
        optimizer.step()
    return flat(model)


@pytest.mark.parametrize("settings", [{"momentum": 0.0}, {"momentum": 0.9}, {"nesterov": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_complete_graph_without_overlap_is_data_parallel_training(size: int, settings: dict[str, Any]) -> None:
    recipe = Gossip(graph="complete", overlap=0, lr=0.1, **settings)
    plain = partial(torch.optim.SGD, **{"lr": 0.1, "momentum": 0.9, **settings})
    expected = all_reduced(size, plain, steps=100)
    for found in threads(size, partial(trained, recipe=recipe, steps=100)):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_with_adam_it_is_not() -> None:
    recipe = Gossip(graph="complete", overlap=0, rule="adam", lr=0.03)
    expected = all_reduced(3, partial(torch.optim.Adam, lr=0.03))
    assert not torch.allclose(threads(3, partial(trained, recipe=recipe))[0], expected, atol=1e-3)


@pytest.mark.parametrize(
    "recipe", [Gossip(lr=0.1), Gossip(lr=0.1, overlap=0, tracking=True), Gossip(rule="adam", step_on="z", lr=0.01)]
)
def test_one_rank_is_the_plain_optimiser_bit_for_bit(recipe: Gossip) -> None:
    model = network()
    optimizer = recipe.make_optimizer(model.parameters())
    for step in range(20):
        optimizer.zero_grad()
        rows = batch(step, 0)
        LOSS(model(rows.x), rows.y).backward()
        optimizer.step()
    if recipe.tracking:  # g + (g - g before) - ... rounds
        assert torch.allclose(trained(Solo(), recipe), flat(model), atol=1e-12)
    else:
        assert torch.equal(trained(Solo(), recipe), flat(model))


def test_periodic_averaging_is_slow_momentum_with_nothing_kept() -> None:
    """Without messages in between (a send every 1000 steps): local steps, and an average every five."""

    def by_hand() -> Tensor:
        models = [network() for _ in range(3)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
        for step in range(20):
            for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                optimizer.zero_grad()
                rows = batch(step, rank)
                LOSS(model(rows.x), rows.y).backward()
                optimizer.step()
            if step % 5 == 4:
                with torch.no_grad():
                    for same in zip(*(model.parameters() for model in models), strict=True):
                        mean = torch.stack(list(same)).mean(0)
                        for one in same:
                            one.copy_(mean)
        return flat(models[0])

    recipe = Gossip(graph=lambda rank, round, size: {}, overlap=0, slow_every=5, lr=0.1, momentum=0.0)
    for found in threads(3, partial(trained, recipe=recipe)):
        assert torch.allclose(found, by_hand(), atol=1e-12)


def test_a_rate_of_zero_moves_by_mixing_alone() -> None:
    start, mean = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0])
    slow = SlowMomentum([start], momentum=0.5, lr=0.5)
    (moved,) = slow.moved([mean], 0.0)
    assert torch.equal(moved, torch.tensor([1.5, 4.0]))
    (small,) = SlowMomentum([start], momentum=0.5, lr=0.5).moved([mean], 1e-6)
    torch.testing.assert_close(small, moved)


def test_an_outer_step_each_step_is_large_batch_momentum() -> None:
    recipe = Gossip(overlap=0, slow_every=1, slow_momentum=0.7, lr=0.1, momentum=0.0)
    expected = all_reduced(3, partial(torch.optim.SGD, lr=0.1, momentum=0.7))
    assert torch.allclose(threads(3, partial(trained, recipe=recipe))[0], expected, atol=1e-12)


def test_lookahead_is_slow_momentum_on_one_rank() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slow = flat(model)
    for step in range(20):
        optimizer.zero_grad()
        rows = batch(step, 0)
        LOSS(model(rows.x), rows.y).backward()
        optimizer.step()
        if step % 4 == 3:
            slow = slow + 0.5 * (flat(model) - slow)
            torch.nn.utils.vector_to_parameters(slow.clone(), model.parameters())
    recipe = Gossip(slow_every=4, slow_lr=0.5, lr=0.1, momentum=0.0)
    assert torch.allclose(trained(Solo(), recipe), flat(model), atol=1e-12)


def quadratics(group: Group, steps: int, **settings: Any) -> Tensor:
    """Rank i wants the point i; the uniform mean is what all together want."""
    goal = torch.tensor([float(group.rank), 2.0 * group.rank**2], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    gossip = Gossip(**settings).attach(model, optimizer, group=group)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + 0.05 * step)
        optimizer.zero_grad()
        (0.5 * (model.weight[0] - goal).square().sum()).backward()
        optimizer.step()
    own = model.weight.detach()[0].clone()
    gossip.sync()
    gossip.detach()
    return own


def uneven(rank: int, round: int, size: int) -> dict[int, float]:
    return {(rank + 1) % size: 0.15 + 0.15 * rank, **({0: 0.2} if rank == 2 else {})}


def test_uneven_graphs_lead_to_the_uniform_mean_and_biased_ones_elsewhere() -> None:
    goal = torch.tensor([1.5, 7.0], dtype=torch.float64)  # of 0..3 and 2 * squares
    exact = {"graph": uneven, "overlap": 0}
    assert all((own - goal).abs().max() < 0.15 for own in threads(4, partial(quadratics, steps=1500, **exact)))
    biased = {**exact, "push_weight": False}
    assert all((own - goal).abs().max() > 0.25 for own in threads(4, partial(quadratics, steps=1500, **biased)))


def test_tracking_reaches_the_mean_at_a_constant_rate_where_plain_gossip_does_not() -> None:
    def apart(group: Group, tracking: bool) -> float:
        goal = torch.tensor([float(group.rank), 2.0 * group.rank**2], dtype=torch.float64)
        model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Gossip(graph=uneven, overlap=1, on_time=True, tracking=tracking).attach(model, optimizer, group=group)
        for _ in range(800):
            optimizer.zero_grad()
            (0.5 * (model.weight[0] - goal).square().sum()).backward()
            optimizer.step()
        return float((model.weight.detach()[0] - torch.tensor([1.5, 7.0])).abs().max())

    assert max(threads(4, partial(apart, tracking=True))) < 1e-8
    assert min(threads(4, partial(apart, tracking=False))) > 1e-2


@pytest.mark.parametrize(
    "recipe",
    [
        Gossip(overlap=0, lr=0.1),
        Gossip(overlap=2, on_time=True, lr=0.1),
        Gossip(overlap=3, every=2, on_time=True, graph=uneven, lr=0.1, wire="bfloat16"),
        Gossip(overlap=1, on_time=True, tracking=True, slow_every=4, slow_momentum=0.5, lr=0.1),
        Gossip(overlap=1, on_time=True, rule="adam", step_on="z", lr=0.01),
    ],
)
def test_stop_and_resume_with_mass_under_way_is_one_run_bit_for_bit(recipe: Gossip) -> None:
    def whole(group: Group) -> Tensor:
        return trained(group, recipe, steps=17)

    def in_two(group: Group) -> Tensor:
        first = recipe.bind(network(), LOSS, group=group)
        for step in range(7):
            first.step(batch(step, group.rank))
        first.sync()
        state = first.state_dict()
        second = recipe.bind(network(), LOSS, group=group)
        second.load_state_dict(state)
        for step in range(7, 17):
            second.step(batch(step, group.rank))
        second.sync()
        return flat(second.model)

    for one, other in zip(threads(4, whole), threads(4, in_two), strict=True):
        assert torch.equal(one, other)


def test_running_statistics_are_averaged_for_the_deployed_network_and_stay_the_ranks_own() -> None:
    def work(group: Group) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        training = Gossip(overlap=0).bind(model, LOSS, group=group)
        for step in range(3):
            training.step(batch(step, group.rank))
        own = model[1].running_mean.clone()  # type: ignore[union-attr, operator]
        training.sync()
        deployed = model[1].running_mean.clone()  # type: ignore[union-attr, operator]
        training._peers.resume()  # type: ignore[attr-defined]
        return [own, deployed, model[1].running_mean.clone()]  # type: ignore[union-attr, operator]

    found = threads(3, work)
    mean = torch.stack([own for own, _, _ in found]).mean(0)
    for own, deployed, again in found:
        assert torch.allclose(deployed, mean)
        assert torch.equal(own, again)
        assert not torch.equal(own, deployed)


def attached(group: Group, recipe: Gossip, peeks: bool) -> Tensor:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    gossip = recipe.attach(model, optimizer, group=group)
    for step in range(20):
        rows = batch(step, group.rank)
        optimizer.zero_grad()
        LOSS(model(rows.x), rows.y).backward()
        optimizer.step()
        if peeks and step % 3 == 0:
            with gossip.average() as average:
                average(rows.x)
    gossip.sync()
    gossip.detach()
    return flat(model)


def test_an_optimiser_of_ones_own_gossips_as_a_bound_one_does() -> None:
    recipe = Gossip(overlap=1, on_time=True)
    bound = threads(3, partial(trained, recipe=Gossip(overlap=1, on_time=True, lr=0.1)))
    for peeks in (False, True):
        for one, other in zip(bound, threads(3, partial(attached, recipe=recipe, peeks=peeks)), strict=True):
            assert torch.equal(one, other)


def test_the_deployed_state_loads_into_the_bare_module() -> None:
    training = Gossip().bind(network(), LOSS, group=Solo())
    training.step(batch(0, 0))
    training.sync()
    network().load_state_dict(training.model.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"graph": "star"}, "exponential, ring, complete, mixed-radix"),
        ({"overlap": -1}, "overlap must be at least 0"),
        ({"every": 0}, "every must be at least 1"),
        ({"slow_momentum": 0.5}, "give slow_every"),
        ({"slow_every": 3, "slow_momentum": 1.0}, r"in \[0, 1\)"),
        ({"nesterov": True, "momentum": 0.0}, "momentum above 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"schedule": "cosine"}, "schedule_steps"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Gossip(**settings)


def test_settings_that_are_not_used_warn() -> None:
    with pytest.warns(UserWarning, match="lr is of the rule"):
        Gossip(lr=0.1, optimizer=torch.optim.Adam)
    model = network()
    with pytest.warns(UserWarning, match="lr is not used by attach"):
        Gossip(lr=0.1).attach(model, torch.optim.Adam(model.parameters()), group=Solo())


def test_ranks_that_were_started_otherwise_are_refused_on_all_ranks() -> None:
    def other_settings(group: Group) -> str:
        with pytest.raises(BadInput, match=r"rank 2 was started with lr 0\.2, rank 0 with 0\.1") as caught:
            Gossip(lr=0.2 if group.rank == 2 else 0.1).bind(network(), LOSS, group=group)
        return str(caught.value)

    def other_models(group: Group) -> str:
        model = mlp(5, [7 + group.rank], 3, seed=1)
        with pytest.raises(BadInput, match=r"rank 1 has a model with 0.weight \(8, 5\)") as caught:
            Gossip().bind(model, LOSS, group=group)
        return str(caught.value)

    assert len(set(threads(3, other_settings))) == 1
    assert len(set(threads(3, other_models))) == 1


def test_an_optimiser_of_another_model_is_refused() -> None:
    with pytest.raises(CannotTrain, match="those of the model"):
        Gossip().attach(network(), torch.optim.SGD(network().parameters(), lr=0.1), group=Solo())


def test_a_graph_that_does_not_join_the_ranks_is_refused() -> None:
    def work(group: Group) -> None:
        with pytest.raises(BadInput, match="join"):
            Gossip(graph=lambda rank, round, size: {rank ^ 1: 0.5}).bind(network(), LOSS, group=group)

    threads(4, work)


def test_rows_carry_what_gossip_reports() -> None:
    def work(group: Group) -> dict[str, Any]:
        set_ = classes()
        training = Gossip(lr=0.1).bind(network(), LOSS, group=group)
        return piecework.fit(training, set_, loss=LOSS, group=group, steps=6, batch_size=8).rows[-1]

    row = threads(3, work)[0]
    assert {"push_weight", "blocked_seconds", "consensus_distance", "weight_sum", "lr"} <= row.keys()
    assert row["weight_sum"] == pytest.approx(3)
    assert row["bytes_sent"] > 0
