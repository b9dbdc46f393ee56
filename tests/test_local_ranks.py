"""Blocks on ranks: the bits of one process, whatever the timing; what is sent; and what happens when a rank is lost."""

from __future__ import annotations

import io
import random
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from local_cases import LOSS, network, noisy, rows, same, weights
from piecework import BadInput, Batch, Local, PeerLost
from piecework.group import Group, Solo
from piecework.models import mlp
from piecework.testing import Faults, Killed, threads

RECIPES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "overlap": {"coupling": "overlap"},
    "chunk": {"coupling": "chunk", "reach": 2},
    "chunk of all": {"coupling": "chunk", "reach": 4},
    "interlock": {"coupling": "interlock", "reach": 2},
    "interlock of three": {"coupling": "interlock", "reach": 3},
    "late": {"coupling": "interlock", "reach": 3, "staleness": 1},
    "later": {"coupling": "overlap", "staleness": 2},
    "annealed": {"anneal": (3, 9), "every_head": True},
    "annealed, late": {"anneal": (3, 9), "staleness": 1},
    "infopro": {"heads": "infopro", "head_width": 5},
}


def _trained(group: Group, **more: Any) -> tuple[list[Tensor], dict[str, float]]:
    model = noisy()
    training = Local(**{"blocks": 4, "lr": 0.02, "seed": 5, "probe_every": 4, **more}).bind(model, LOSS, group=group)
    metrics = {}
    for seed, n in enumerate((24, 24, 5, 24, 24, 24, 7, 24, 24, 24, 24, 24)):
        metrics |= training.step(rows(n, seed=seed))
        if seed in (3, 6):
            training.sync()
    training.sync()
    return weights(model), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_blocks_on_ranks_are_one_process_bit_for_bit(name: str) -> None:
    alone, figures = _trained(Solo(), **RECIPES[name])
    for size in (2, 3, 4):
        told: dict[str, float] = {}
        for found, own in threads(size, partial(_trained, **RECIPES[name])):
            assert same(found, alone)
            told |= own
        assert told == figures


class _Sleepy(nn.Module):
    """Takes its time, each time another."""

    def __init__(self, longest: float) -> None:
        super().__init__()
        self.longest = longest

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(random.random() * self.longest)
        return x


def _sleepy(longest: float) -> nn.Sequential:
    found: list[nn.Module] = []
    for layer in network(depth=3):
        found += [layer, nn.Dropout(0.3), _Sleepy(longest)] if isinstance(layer, nn.Tanh) else [layer]
    return nn.Sequential(*found)


@pytest.mark.parametrize("more", [{}, {"coupling": "chunk", "reach": 2, "buffers": 1}], ids=str)
def test_two_hundred_batches_in_a_pipeline_are_the_loop_of_one_process(more: dict[str, Any]) -> None:
    def work(group: Group, longest: float) -> list[Tensor]:
        model = _sleepy(longest)
        training = Local(blocks=3, lr=0.02, probe_every=0, seed=2, **more).bind(model, LOSS, group=group)
        for seed in range(200):
            training.step(rows(7, seed=seed))
        training.sync()
        return weights(model)

    alone = work(Solo(), 0.0)
    assert all(same(found, alone) for found in threads(3, partial(work, longest=2e-3)))


@pytest.mark.parametrize("name", RECIPES)
def test_one_buffer_never_deadlocks(name: str) -> None:
    def work(group: Group) -> int:
        training = Local(blocks=4, buffers=1, probe_every=5, **RECIPES[name]).bind(noisy(), LOSS, group=group)
        most = 0
        for seed in range(30):
            time.sleep(random.random() * 1e-3)
            training.step(rows(5, seed=seed))
            most = max(most, len(training._links._up))
        training.sync()
        return most

    assert max(threads(4, work, timeout=30)) == 1


def test_a_rank_runs_ahead_of_the_next_by_as_many_batches_as_there_are_buffers() -> None:
    ahead = threading.Event()

    def work(group: Group) -> int:
        training = Local(blocks=2, buffers=3, probe_every=0).bind(network(depth=2), LOSS, group=group)
        for step in range(6):
            if group.rank == 1 and step == 1:  # in the first one the ranks compare what they were given
                assert ahead.wait(20)
            training.step(rows(seed=step))
            if group.rank == 0 and step == 3:
                ahead.set()
        under_way = len(training._links._up)
        training.sync()
        return under_way

    assert threads(2, work, timeout=30)[0] <= 3


def test_every_byte_on_a_link_is_counted() -> None:
    def work(group: Group, more: dict[str, Any]) -> int:
        training = Local(blocks=3, probe_every=0, **more).bind(network(depth=3), LOSS, group=group)
        training.step(rows())
        before = group.bytes_sent
        for seed in range(5):
            training.step(rows(seed=seed))
        sent = group.bytes_sent - before
        training.sync()
        return sent // 5

    tensor = 24 * 7 * 8
    for more, sent in (
        ({}, [1, 1, 0]),
        ({"coupling": "overlap"}, [1, 2, 1]),
        ({"coupling": "interlock", "reach": 3}, [1, 2, 1]),
        ({"coupling": "chunk", "reach": 2}, [1, 2, 0]),
    ):
        assert threads(3, partial(work, more=more)) == [tensor * one for one in sent]


def test_the_loss_is_told_by_the_rank_that_has_it() -> None:
    def work(group: Group) -> list[str]:
        training = Local(blocks=3, probe_every=0).bind(network(depth=3), LOSS, group=group)
        told = sorted(training.step(rows()))
        training.sync()  # a rank that ends earlier takes with it what nobody has received
        return told

    assert threads(3, work) == [["local_loss_0", "lr"], ["local_loss_1", "lr"], ["loss", "lr"]]


@pytest.mark.parametrize("wrong", ["shuffled", "another batch", "never"])
def test_other_labels_on_a_rank_are_found_before_anything_is_deployed(wrong: str) -> None:
    def work(group: Group) -> None:
        training = Local(blocks=2, probe_every=0).bind(network(depth=2), LOSS, group=group)
        for seed in range(8):
            batch, other = rows(seed=seed), rows(seed=9)
            if group.rank == 1 and seed == 5 and wrong != "never":
                batch = Batch(batch.x, batch.y.flip(0) if wrong == "shuffled" else other.y)
            training.step(batch)
        training.sync()

    if wrong == "never":
        threads(2, work)
        return
    outcomes = threads(2, work, outcomes=True)
    assert all(isinstance(one, BadInput) and "rank 1 was given other labels" in str(one) for one in outcomes)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"blocks": 3}, "rank 1 was started with blocks 3, rank 0 with 2"),
        ({"coupling": "overlap"}, "rank 1 was started with coupling 'overlap', rank 0 with 'greedy'"),
        ({"model": network(depth=4)}, "rank 1 has a model with 4.weight"),
        ({"model": network(depth=3, dtype=torch.float32)}, "rank 1 has a model with 0.weight"),
        ({"model": mlp(5, [7, 7], 3, activation="relu", dtype=torch.float64)}, "rank 1 has a model with layer 1 ReLU"),
        ({"rows": 7}, "rank 1 was given a first mini-batch with shape"),
    ],
    ids=str,
)
def test_a_rank_that_was_started_otherwise_is_one_clear_error_on_all(other: dict[str, Any], said: str) -> None:
    def work(group: Group) -> None:
        own = dict(other) if group.rank == 1 else {}
        model, n = own.pop("model", None) or network(depth=3), own.pop("rows", 24)
        training = Local(**{"blocks": 2, "probe_every": 0, **own}).bind(model, LOSS, group=group)
        training.step(rows(n))

    outcomes = threads(2, work, timeout=20, outcomes=True)
    assert all(isinstance(one, BadInput) and said in str(one) for one in outcomes), outcomes


@pytest.mark.parametrize("dead", [0, 1, 2])
@pytest.mark.parametrize("name", ["greedy", "overlap"])
def test_a_killed_rank_is_a_lost_peer_on_all_others(dead: int, name: str) -> None:
    faults = Faults().kill(rank=dead, step=4)

    def work(group: Group) -> None:
        training = Local(blocks=3, probe_every=0, **RECIPES[name]).bind(network(depth=3), LOSS, group=group)
        for step in range(60):
            faults.check(group.rank, step)
            training.step(rows(seed=step))
        training.sync()

    started = time.monotonic()
    outcomes = threads(3, work, timeout=30, wait=10, outcomes=True)
    assert time.monotonic() - started < 10
    assert isinstance(outcomes.pop(dead), Killed)
    assert all(isinstance(one, PeerLost) for one in outcomes), outcomes


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_was_stopped_goes_on_to_the_bit(name: str, size: int) -> None:
    def started(group: Group) -> tuple[Any, nn.Module]:
        model = noisy()
        recipe = Local(**{"blocks": 4, "lr": 0.02, "seed": 5, "probe_every": 1, **RECIPES[name]})
        return recipe.bind(model, LOSS, group=group), model

    def work(group: Group) -> bool:
        whole, model = started(group)
        told = [whole.step(rows(seed=seed)) for seed in range(11)]
        whole.sync()
        first, half = started(group)
        for seed in range(6):
            first.step(rows(seed=seed))
        first.sync()
        file = io.BytesIO()
        torch.save({"state": first.state_dict(), "model": half.state_dict()}, file)
        kept = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        resumed, again = started(group)
        again.load_state_dict(kept["model"])
        resumed.load_state_dict(kept["state"])
        after = [resumed.step(rows(seed=seed)) for seed in range(6, 11)]
        resumed.sync()
        equal = [
            one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
            for one, two in zip(told[6:], after, strict=True)
        ]
        return same(weights(again), weights(model)) and all(equal)

    assert all(threads(size, work))
