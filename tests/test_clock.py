"""The virtual clock: times by hand, the numbers of the papers, no deadlock, and the same run each time."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework import Batch, Gossip, data, losses
from piecework.clock import ClockGroup, Link, Noise, on_a_clock
from piecework.clock.scenario import PROGRAMS, Scenario, _partner, seconds_a_step
from piecework.methods.gossip.push_sum import PushSum
from piecework.models import mlp
from piecework.training import BadInput, PeerLost

pytestmark = pytest.mark.timeout(60)

LINK = Link(latency_s=0.5, bytes_per_s=10.0)


def post(box: Any, peer: int, length: int) -> None:
    box.post(peer, box.draft(), length)


def test_messages_of_a_sender_follow_each_other_and_so_do_those_to_a_receiver() -> None:
    def work(group: ClockGroup) -> list[float]:
        box = group.mailbox(40)
        if group.rank < 2:
            box.listen([1 - group.rank])
            group.compute(1.0 if group.rank == 0 else 2.0)
            for _ in range(2):
                post(box, 2, 20)
            return [group.seconds()]
        box.listen([0, 1])
        came: list[float] = []
        while len(came) < 4:
            box.wait([0, 1])
            came += [group.seconds()] * len(box.take())
        return came

    sender, _, receiver = on_a_clock(3, work, link=LINK)
    assert sender == [1.0]  # a post never blocks
    assert receiver == [3.5, 5.5, 7.5, 9.5]  # 1 + .5 + 2, and two seconds each on the receiver's link


def test_a_collective_begins_when_the_last_has_come() -> None:
    def work(group: ClockGroup) -> tuple[float, float, float]:
        group.compute(float(group.rank))
        ones = torch.ones(10, dtype=torch.uint8).to(torch.float64)
        group.sum_(ones)
        after_sum = group.seconds()
        gathered = group.gather(torch.tensor([group.rank]))
        assert [int(one) for one in gathered] == [0, 1, 2]
        return after_sum, group.seconds() - after_sum, float(ones[0])

    for found in on_a_clock(3, work, link=LINK):
        # 2 (n - 1) rounds of a third of 80 bytes; n - 1 rounds of 8 bytes
        assert found == pytest.approx((2 + 4 * (0.5 + 80 / 3 / 10), 2 * (0.5 + 0.8), 3.0))


def test_an_exchange_takes_its_time_and_buckets_travel_during_the_computation() -> None:
    def work(group: ClockGroup) -> list[float]:
        mine, theirs = torch.full((5,), float(group.rank), dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        pending = group.exchange({1 - group.rank: mine}, {1 - group.rank: theirs})
        group.compute(1.0)
        pending.wait()
        assert float(theirs[0]) == 1 - group.rank
        met = group.seconds()
        group.compute(6.0)
        group.sum_in_buckets([4.0, 0.0], [20.0, 20.0])
        return [met, group.seconds() - met]

    # 40 bytes in 4.5 s; a bucket takes 2 (.5 + 1) = 3 s: the first from 2 s to 5 s, the second from 6 s to 9 s
    assert on_a_clock(2, work, link=LINK) == [[4.5, 9.0], [4.5, 9.0]]


def test_where_nobody_can_go_on_all_are_told_at_once_who_waits_for_what() -> None:
    def work(group: ClockGroup) -> None:
        if group.rank == 0:
            group.any(False)
        elif group.rank == 1:
            box = group.mailbox(8)
            box.listen([0])
            box.wait([0])

    with pytest.raises(
        PeerLost, match="rank 0 waits in any; rank 1 waits in the mailbox, for rank 0; rank 2 has ended"
    ):
        on_a_clock(3, work)


def test_an_error_of_one_rank_comes_out_before_its_consequences() -> None:
    def work(group: ClockGroup) -> None:
        if group.rank == 1:
            raise ZeroDivisionError
        group.any(False)

    with pytest.raises(ZeroDivisionError):
        on_a_clock(3, work)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 12])
def test_partners_are_each_others_and_everybody_meets_everybody(size: int) -> None:
    met: set[tuple[int, int]] = set()
    for step in range(max(1, size - 1 + size % 2)):
        for rank in range(size):
            peer = _partner(rank, size, step)
            if peer is not None:
                assert _partner(peer, size, step) == rank != peer
                met.add((rank, peer))
    assert len(met) == size * (size - 1)


# Milliseconds by the cost model alone: 32 ranks, 102.2 MB, 271 ms of computation, four buckets, latency 50 us.
BY_GBIT = {
    1: (1723, 1858, 1089, 1089, 818, 409),
    10: (311, 433, 353, 353, 271, 271),
    100: (276, 290, 279, 279, 271, 271),
}
COLUMNS = [
    "averaged gradients, overlapped (DDP)",
    "averaged gradients, afterwards",
    "D-PSGD, pairs",
    "gossip, overlap 0",
    "gossip, overlap 1",
    "gossip, overlap 2, every 2",
]


@pytest.mark.parametrize("gbit", BY_GBIT)
def test_without_noise_it_agrees_with_the_cost_model_to_two_per_cent(gbit: int) -> None:
    scenario = Scenario(
        ranks=32, model_bytes=102.2e6, step_s=0.271, bytes_per_s=gbit * 1e9 / 8, latency_s=50e-6, steps=40
    )
    for name, milliseconds in zip(COLUMNS, BY_GBIT[gbit], strict=True):
        found = 1000 * seconds_a_step(PROGRAMS[name], scenario)
        assert found == pytest.approx(milliseconds, rel=0.02), name


def test_a_switch_that_all_share_bounds_what_they_send_together() -> None:
    """Four ranks send 20 bytes at once: 2 s on links of their own, and 4 x 20 / 10 s through the switch."""

    def work(group: ClockGroup) -> float:
        mine, theirs = torch.zeros(20, dtype=torch.uint8), torch.zeros(20, dtype=torch.uint8)
        after, before = (group.rank + 1) % 4, (group.rank - 1) % 4
        group.exchange({after: mine}, {before: theirs}).wait()
        return group.seconds()

    assert on_a_clock(4, work, link=LINK) == [2.5] * 4
    shared = Link(latency_s=0.5, bytes_per_s=10.0, switch_bytes_per_s=10.0)
    assert sorted(on_a_clock(4, work, link=shared)) == [2.5, 4.5, 6.5, 8.5]
    assert LINK.all_reduce_s(40, 4) == pytest.approx(6 * (0.5 + 1.0))
    assert shared.all_reduce_s(40, 4) == pytest.approx(6 * (0.5 + 4 * 1.0))


def test_messages_that_wait_at_their_sender_hold_nobody_else_up() -> None:
    def work(group: ClockGroup) -> float:
        box = group.mailbox(40)
        if group.rank == 0:
            for _ in range(3):  # to rank 2; the last leaves at 4 s
                post(box, 2, 20)
        elif group.rank == 1:
            group.compute(1.0)
            post(box, 3, 20)
        elif group.rank == 3:
            box.listen([1])
            box.wait([1])
        return group.seconds()

    for switch in (math.inf, 1000.0):
        link = Link(latency_s=0.5, bytes_per_s=10.0, switch_bytes_per_s=switch)
        assert on_a_clock(4, work, link=link)[3] == 3.5


def test_steps_of_the_warm_up_are_taken_and_not_counted_and_overhead_is_added_to_each() -> None:
    plain = Scenario(ranks=3, model_bytes=1e6, step_s=0.1, bytes_per_s=1e7, steps=5)
    longer = replace(plain, warm_up=4, overhead_s=0.02)
    first, later = (seconds_a_step(PROGRAMS["no messages"], one) for one in (plain, longer))
    assert (first, later) == (pytest.approx(0.1), pytest.approx(0.12))
    # A link that a message keeps busy for longer than a step: the first step, with nothing to wait for, does not count.
    slow = replace(plain, bytes_per_s=5e6)
    assert seconds_a_step(PROGRAMS["gossip, overlap 1"], slow) < 0.19
    assert seconds_a_step(PROGRAMS["gossip, overlap 1"], replace(slow, warm_up=4)) == pytest.approx(0.2, rel=0.01)


def test_pairs_that_average_when_they_come_hide_an_answer_within_a_step() -> None:
    """Two ranks: a message and its answer take 0.2 s together, behind a step of 0.3 s, or are waited for."""
    hidden = Scenario(ranks=2, model_bytes=1e6, step_s=0.3, bytes_per_s=1e7, steps=10)
    assert seconds_a_step(PROGRAMS["AD-PSGD"], hidden) == pytest.approx(0.3)
    waited = replace(hidden, step_s=0.05, warm_up=2)
    assert seconds_a_step(PROGRAMS["AD-PSGD"], waited) == pytest.approx(0.2, rel=0.01)


def test_one_rank_needs_no_messages_and_numbers_that_mean_nothing_are_refused() -> None:
    scenario = Scenario(ranks=1, model_bytes=1e6, step_s=0.1, bytes_per_s=1e6, steps=3)
    for name, program in PROGRAMS.items():
        assert seconds_a_step(program, scenario) == pytest.approx(0.1), name
    with pytest.raises(BadInput, match="step_s must be above 0"):
        Scenario(ranks=2, model_bytes=1e6, step_s=0.0)
    with pytest.raises(BadInput, match="bytes_per_s"):
        Link(bytes_per_s=0)


def test_noise_is_drawn_from_the_seed_the_rank_and_the_step() -> None:
    noise = Noise(stalls=0.25, seed=3)
    stalls = [noise.stalled(rank, step) for rank in range(20) for step in range(50)]
    assert stalls == [noise.stalled(rank, step) for rank in range(20) for step in range(50)]
    assert 0.2 < sum(stalls) / len(stalls) < 0.3
    spread = [Noise(spread=0.5).seconds(2.0, 0, step) for step in range(2000)]
    assert torch.tensor(spread).mean() == pytest.approx(2.0, rel=0.05)
    assert Noise(slow_rank=1, slowness=3.0).seconds(1.0, 1, 0) == 3.0


def mixed(group: ClockGroup, noise: Noise, slow: float, steps: int, **settings: Any) -> tuple[float, Tensor, int]:
    """The sum of the weights, the mean, and the age of the oldest message that this rank used."""
    own = torch.arange(3, dtype=torch.float64) + group.rank
    push_sum, oldest = PushSum([own], group, **settings), 0
    for step in range(steps):
        group.compute(noise.seconds(slow if group.rank == 0 else 1.0, group.rank, step))
        push_sum.mix()
        oldest = max([oldest, *push_sum.ages])
    (mean,), _, weight = push_sum.average()
    return weight, mean, oldest


def test_a_thousand_schedules_end_lose_no_mass_and_use_nothing_too_late() -> None:
    draw = random.Random(0)
    for trial in range(1000):
        size, overlap = draw.randint(2, 5), draw.randint(0, 3)
        graph = draw.choice(["exponential", "ring", "complete", "mixed-radix"])
        settings = {"graph": graph, "overlap": overlap, "every": draw.randint(1, 3), "on_time": draw.random() < 0.5}
        noise, slow = Noise(spread=draw.choice([0.0, 1.0]), seed=trial), draw.choice([1.0, 50.0])
        link = Link(draw.choice([0.0, 0.1, 3.0]), draw.choice([1e3, 1e5]))
        work = partial(mixed, noise=noise, slow=slow, steps=draw.randint(1, 8), **settings)
        for weight, mean, oldest in on_a_clock(size, work, link=link):
            assert weight == pytest.approx(size, abs=1e-12)
            torch.testing.assert_close(mean, torch.arange(3, dtype=torch.float64) + (size - 1) / 2, rtol=0, atol=1e-12)
            assert oldest <= overlap


LOSS = losses.Softmax()


def batch(step: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return Batch(torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator))


def trained(group: ClockGroup, recipe: Gossip, steps: int, stop: int | None = None) -> tuple[list[float], Tensor]:
    """Ages of the messages, and the weights at the end; stopped and gone on with from its state on the way."""
    noise, ages = Noise(spread=0.7, seed=1), []
    training = recipe.bind(mlp(5, [4], 3, seed=0), LOSS, group=group)
    for step in range(steps):
        group.compute(noise.seconds(1.0, group.rank, step))
        metrics = training.step(batch(step, group.rank))
        ages.append(float(metrics.get("late", -1.0)))
        if step + 1 == stop:
            state = training.state_dict()
            training = recipe.bind(mlp(5, [4], 3, seed=7), LOSS, group=group)
            training.load_state_dict(state)
        elif stop is None and step == 10:
            training.state_dict()  # a checkpoint: it takes the same time, and the same messages are waited for
            recipe.bind(mlp(5, [4], 3, seed=7), LOSS, group=group)
    training.sync()
    return ages, nn.utils.parameters_to_vector(training.model.parameters()).detach()


@pytest.mark.parametrize(
    "recipe",
    [
        Gossip(overlap=2, lr=0.1),
        Gossip(overlap=3, every=2, lr=0.1, wire="bfloat16"),
        Gossip(overlap=2, lr=0.1, tracking=True, slow_every=7, slow_momentum=0.5),
    ],
)
def test_messages_used_as_they_come_are_the_same_each_time_and_after_a_stop(recipe: Gossip) -> None:
    link = Link(latency_s=0.2, bytes_per_s=300.0)
    first = on_a_clock(4, lambda group: trained(group, recipe, 20), link=link)
    again = on_a_clock(4, lambda group: trained(group, recipe, 20), link=link)
    stopped = on_a_clock(4, lambda group: trained(group, recipe, 20, stop=11), link=link)
    assert len({age for ages, _ in first for age in ages}) > 2  # some early, some late
    for one, other, resumed in zip(first, again, stopped, strict=True):
        assert one[0] == other[0] == resumed[0]
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[1], resumed[1])


def test_fit_runs_on_a_clock() -> None:
    def work(group: ClockGroup) -> float:
        set_ = data.load("wine")
        training = piecework.SGD(lr=0.01).bind(mlp(13, [5], 3, seed=0), LOSS, group=group)
        history = piecework.fit(training, set_, loss=LOSS, steps=4, batch_size=8)
        return float(history.rows[-1]["train"]["loss"])

    found = on_a_clock(3, work, link=LINK)
    assert found[0] == found[1] == found[2]
