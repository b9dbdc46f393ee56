"""Push-sum alone: what is conserved, what is exact, and how late a message may be."""

from __future__ import annotations

import random
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from piecework.group import Group
from piecework.methods.gossip.graphs import NAMED, Links, joins, prime_factors
from piecework.methods.gossip.push_sum import PushSum
from piecework.testing import threads
from piecework.training import BadInput


def start(rank: int) -> list[Tensor]:
    stream = torch.Generator().manual_seed(40 + rank)
    return [torch.randn(shape, generator=stream, dtype=torch.float64) for shape in ((3, 5), (24,), ())]


def spread(group: Group, tensors: list[Tensor], mean: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(tensors, mean, strict=True))


def mean_of(size: int) -> list[Tensor]:
    return [torch.stack(same).mean(0) for same in zip(*map(start, range(size)), strict=True)]


def mixed(group: Group, rounds: int, **settings: object) -> tuple[list[Tensor], float, float]:
    tensors = start(group.rank)
    push_sum = PushSum(tensors, group, **settings)  # type: ignore[arg-type]
    for _ in range(rounds):
        push_sum.mix()
    return tensors, push_sum.weight, push_sum.average()[2]


def irregular(rank: int, round: int, size: int) -> dict[int, float]:
    """Shares that no two ranks have alike: rows of the mixing matrix are far from summing to one."""
    out = {(rank + 1) % size: 0.2 + 0.1 * rank / size}
    return out | ({0: 0.3} if rank == 2 and round % 2 else {})


@pytest.mark.parametrize("graph", NAMED)
def test_shares_leave_something_and_join_all_ranks(graph: str) -> None:
    for size in range(1, 65):
        for round in range(7):
            for rank in range(size):
                shares = NAMED[graph](rank, round, size)
                assert sum(shares.values()) < 1
                assert rank not in shares
        assert joins(graph, size)


def test_hops_are_powers_of_two_for_any_number_of_ranks() -> None:
    for size in range(2, 1025):
        length = next(power for power in range(12) if 2**power >= size)
        for round in (0, 1, length - 1, length, 5 * length + 2):
            assert NAMED["exponential"](size - 1, round, size) == {(size - 1 + 2 ** (round % length)) % size: 0.5}


def test_prime_factors_multiply_to_their_number() -> None:
    for number in range(1, 500):
        assert np.prod(prime_factors(number), dtype=int) == number


def test_a_graph_that_gives_everything_away_is_refused() -> None:
    with pytest.raises(BadInput, match="leave something"):
        Links(lambda rank, round, size: {(rank + 1) % size: 1.0}, 0, 3).out(0)


def test_a_graph_in_two_parts_does_not_join() -> None:
    assert not joins(lambda rank, round, size: {rank ^ 1: 0.5}, 4)


@pytest.mark.parametrize(
    ("size", "graph", "rounds"),
    [
        *((2**power, "exponential", power) for power in range(1, 5)),
        *((size, "mixed-radix", len(prime_factors(size))) for size in (3, 5, 6, 12, 15, 24)),
        *((size, "complete", 1) for size in (2, 3, 7)),
    ],
)
def test_averages_are_exact_after_a_period_and_weights_stay_one(size: int, graph: str, rounds: int) -> None:
    mean = mean_of(size)
    for tensors, weight, total in threads(size, partial(mixed, rounds=rounds, graph=graph)):
        assert spread(None, tensors, mean) < 1e-13  # type: ignore[arg-type]
        assert weight == 1.0
        assert total == size


def test_any_columns_that_sum_to_one_lead_to_the_mean() -> None:
    mean = mean_of(5)
    for tensors, weight, total in threads(5, partial(mixed, rounds=150, graph=irregular)):
        assert spread(None, tensors, mean) < 1e-9  # type: ignore[arg-type]
        assert weight != 1.0
        assert total == pytest.approx(5, abs=1e-12)


def test_without_the_weight_they_lead_elsewhere() -> None:
    mean = mean_of(5)
    for tensors, weight, _ in threads(5, partial(mixed, rounds=150, graph=irregular, biased=True)):
        assert weight == 1.0
        assert spread(None, tensors, mean) > 0.1  # type: ignore[arg-type]


@pytest.mark.parametrize("delay", [1, 2, 4])
def test_with_a_constant_delay_the_weight_is_two_over_two_plus_delay(delay: int) -> None:
    for _, weight, total in threads(4, partial(mixed, rounds=300, graph="exponential", overlap=delay, on_time=True)):
        assert weight == pytest.approx(2 / (2 + delay), abs=1e-9)
        assert total == pytest.approx(4, abs=1e-11)


def dense(size: int, rounds: int, graph: object, delay: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with matrices: numerators and weights of all ranks, and a queue of what is under way."""
    x = np.stack([torch.cat([one.reshape(-1) for one in start(rank)]).numpy() for rank in range(size)])
    w, queue = np.ones(size), []
    for step in range(rounds):
        links = [Links(graph, rank, size) for rank in range(size)]  # type: ignore[arg-type]
        out = np.zeros((size, size))
        if step % every == 0:
            for rank in range(size):
                for peer, share in links[rank].out(step // every).items():
                    out[peer, rank] = share
        queue.append((out @ x, out @ w))
        kept = 1 - out.sum(0)
        x, w = kept[:, None] * x, kept * w
        if len(queue) > delay:
            more_x, more_w = queue.pop(0)
            x, w = x + more_x, w + more_w
    return x / w[:, None], w


@pytest.mark.parametrize(("delay", "every"), [(0, 1), (0, 3), (1, 1), (3, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("graph", ["exponential", "ring", "mixed-radix", irregular])
def test_it_is_what_dense_matrices_say(graph: object, delay: int, every: int) -> None:
    z, w = dense(5, 31, graph, delay, every)
    found = threads(5, partial(mixed, rounds=31, graph=graph, overlap=delay, every=every, on_time=True))
    for rank, (tensors, weight, _) in enumerate(found):
        assert np.allclose(torch.cat([one.reshape(-1) for one in tensors]).numpy(), z[rank], atol=1e-10)
        assert weight == pytest.approx(w[rank], abs=1e-12)


def with_pauses(group: Group, rounds: int, seed: int, **settings: object) -> tuple[float, float, float]:
    """Conservation in a run whose ranks dawdle at random: how far the sums are from those of the start."""
    tensors, pauses = start(group.rank), random.Random(1000 * seed + group.rank)
    push_sum = PushSum(tensors, group, **settings)  # type: ignore[arg-type]
    worst = 0.0
    for _ in range(rounds):
        if pauses.random() < 0.2:
            time.sleep(pauses.random() * 2e-3)
        push_sum.mix()
        worst = max([worst, *push_sum.ages])
    means, _, total = push_sum.average()
    return spread(group, means, mean_of(group.size)), total, worst


@settings(max_examples=20, deadline=None)
@given(
    size=st.sampled_from([2, 3, 5]),
    graph=st.sampled_from([*NAMED, irregular]),
    overlap=st.integers(0, 4),
    every=st.integers(1, 3),
    on_time=st.booleans(),
    wire=st.sampled_from([None, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_mass_is_conserved_counting_what_is_under_way(
    size: int, graph: object, overlap: int, every: int, on_time: bool, wire: torch.dtype | None, seed: int
) -> None:
    if size == 2 and graph is irregular:
        graph = "ring"
    settings = {"graph": graph, "overlap": overlap, "every": every, "on_time": on_time, "wire": wire}
    for apart, total, late in threads(size, partial(with_pauses, rounds=25, seed=seed, **settings)):
        assert apart < 1e-10
        assert total == pytest.approx(size, abs=1e-12)
        assert late <= overlap


def one_dawdles(group: Group, **settings: object) -> tuple[list[int], float]:
    push_sum = PushSum(start(group.rank), group, **settings)  # type: ignore[arg-type]
    ages = []
    for _ in range(30):
        time.sleep(5e-3 if group.rank == 1 else 1e-4)
        push_sum.mix()
        ages += push_sum.ages
    return ages, push_sum.blocked_seconds


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_no_message_is_used_later_than_allowed_where_one_rank_is_fifty_times_slower(overlap: int) -> None:
    found = threads(4, partial(one_dawdles, graph="exponential", overlap=overlap))
    assert max(age for ages, _ in found for age in ages) <= overlap
    # The others were held back to its pace: 30 steps of 5 ms, less what they may be ahead.
    assert found[2][1] > 0.05


def test_a_narrow_wire_halves_the_message_and_loses_nothing() -> None:
    def lengths(group: Group) -> tuple[int, float]:
        tensors = [torch.randn(1000, generator=torch.Generator().manual_seed(group.rank))]
        total = tensors[0].double().clone()
        group.sum_(total)
        before = group.bytes_sent
        push_sum = PushSum(tensors, group, "ring", wire=torch.bfloat16)
        push_sum.mix()
        sent = group.bytes_sent - before
        held = tensors[0].double() * push_sum.weight
        group.sum_(held)
        return sent, float((held - total).abs().max())

    for sent, lost in threads(3, lengths):
        assert sent < 2000 + 200
        assert lost < 1e-5
