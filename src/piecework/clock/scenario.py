"""Ways to train on many ranks, on a virtual clock: how long a step takes, for computations and links that are given.

Gossip is the library's own, with a small model in the place of a large one; of the others only the messages are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..methods.gossip import Gossip
from ..training import BadInput, stream
from .group import ClockGroup, on_a_clock
from .link import Link
from .noise import Noise

FORWARD = 1 / 3
"""Part of a step's computation that is the forward pass."""

_WORDS = 2048
"""Numbers in the small model; the header of gossip's messages adds less than a hundredth to it."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """ranks; model_bytes: of the parameters; step_s: seconds that a rank computes in a step; latency_s, bytes_per_s: of
    each rank's link, in both directions at once; switch_bytes_per_s: of all links together; overhead_s: what a step
    takes besides, of which nothing is hidden; num_buckets: of averaged gradients, equally long; steps: to take and to
    count, after warm_up steps that are taken and not counted."""

    ranks: int
    model_bytes: float
    step_s: float
    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    switch_bytes_per_s: float = math.inf
    overhead_s: float = 0.0
    noise: Noise = field(default_factory=Noise)
    num_buckets: int = 4
    steps: int = 100
    warm_up: int = 0

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("ranks", 1 <= self.ranks <= 1024, "between 1 and 1024"),
            ("model_bytes", 0 < self.model_bytes < math.inf, "above 0"),
            ("step_s", 0 < self.step_s < math.inf, "above 0"),
            ("overhead_s", 0 <= self.overhead_s < math.inf, "0 or more"),
            ("steps", self.steps >= 1, "at least 1"),
            ("warm_up", self.warm_up >= 0, "0 or more"),
            ("num_buckets", self.num_buckets >= 1, "at least 1"),
        ):
            if not ok:
                raise BadInput(f"{name} must be {accepted}, got {getattr(self, name)}")

    def computing(self, rank: int, step: int) -> float:
        return self.noise.seconds(self.step_s, rank, step)


Program = Callable[[ClockGroup, Scenario], float]
"""Takes the steps of one rank; returns the seconds that they took, the start not counted."""


def _timed(group: ClockGroup, scenario: Scenario, take: Callable[[int], None]) -> float:
    """take(step) for all steps; the seconds of those that count, from when all have met after the others."""
    began = group.seconds()
    for step in range(scenario.warm_up + scenario.steps):
        if step == scenario.warm_up > 0:
            group.any(False)
            began = group.seconds()
        take(step)
        if scenario.overhead_s:
            group.compute(scenario.overhead_s)
    return group.seconds() - began


def alone(group: ClockGroup, scenario: Scenario) -> float:
    return _timed(group, scenario, lambda step: group.compute(scenario.computing(group.rank, step)))


def averaged_in_buckets(group: ClockGroup, scenario: Scenario) -> float:
    """DistributedDataParallel: buckets become ready evenly in the backward pass, and travel meanwhile."""
    num = scenario.num_buckets

    def take(step: int) -> None:
        group.compute(scenario.computing(group.rank, step))
        backward = scenario.step_s * scenario.noise.factor(group.rank, step) * (1 - FORWARD)
        ready = [backward * (num - 1 - bucket) / num for bucket in range(num)]
        group.sum_in_buckets(ready, [scenario.model_bytes / num] * num)

    return _timed(group, scenario, take)


def averaged_afterwards(group: ClockGroup, scenario: Scenario, *, every: int = 1) -> float:
    """An all-reduce after every so many steps: of gradients, or of models (local SGD)."""
    content = _content()

    def take(step: int) -> None:
        group.compute(scenario.computing(group.rank, step))
        if (step + 1) % every == 0:
            group.sum_(content)

    return _timed(group, scenario, take)


def pairs(group: ClockGroup, scenario: Scenario, *, meanwhile: bool) -> float:
    """D-PSGD: models exchanged with one other rank, another one each step; after the computation or meanwhile."""
    content, arriving = _content(), _content()

    def take(step: int) -> None:
        peer = _partner(group.rank, group.size, step)
        both = ({peer: content}, {peer: arriving}) if peer is not None else ({}, {})
        seconds = scenario.computing(group.rank, step)
        if not meanwhile:
            group.compute(seconds)
        pending = group.exchange(*both)
        if meanwhile:
            group.compute(seconds)
        pending.wait()

    return _timed(group, scenario, take)


def pairs_when_they_come(group: ClockGroup, scenario: Scenario) -> float:
    """AD-PSGD: after each step an even rank sends its model to a random odd one, which answers with its own at once.
    It takes one more step meanwhile, and no second one."""
    answered = 0.0
    draw = stream(scenario.noise.seed, group.rank)

    def take(step: int) -> None:
        nonlocal answered
        group.compute(scenario.computing(group.rank, step))
        if group.rank % 2 == 0 and group.size > 1:
            group.compute(max(0.0, answered - group.seconds()))
            peer = 1 + 2 * int(torch.randint(group.size // 2, (), generator=draw))
            answered = group.there_and_back(peer, 4 * _WORDS)

    return _timed(group, scenario, take)


def gossip(group: ClockGroup, scenario: Scenario, *, recipe: Gossip) -> float:
    model = nn.Linear(_WORDS, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    recipe.attach(model, optimizer, group=group)

    def take(step: int) -> None:
        group.compute(scenario.computing(group.rank, step))
        optimizer.step()

    return _timed(group, scenario, take)


BASELINE = "averaged gradients, overlapped (DDP)"

PROGRAMS: dict[str, Program] = {
    BASELINE: averaged_in_buckets,
    "averaged gradients, afterwards": averaged_afterwards,
    "local SGD, every 8 steps": partial(averaged_afterwards, every=8),
    "D-PSGD, pairs": partial(pairs, meanwhile=False),
    "AD-PSGD": pairs_when_they_come,
    "gossip, overlap 0": partial(gossip, recipe=Gossip(overlap=0)),
    "gossip, overlap 1": partial(gossip, recipe=Gossip(overlap=1)),
    "gossip, overlap 1, slow momentum every 48": partial(
        gossip, recipe=Gossip(overlap=1, slow_every=48, slow_momentum=0.5)
    ),
    "gossip, overlap 2, every 2": partial(gossip, recipe=Gossip(overlap=2, every=2)),
    "no messages": alone,
}


def seconds_a_step(program: Program, scenario: Scenario) -> float:
    """Mean over steps, until the last rank is through."""
    scale = scenario.model_bytes / (4 * _WORDS)
    link = Link(scenario.latency_s, scenario.bytes_per_s, scale, scenario.switch_bytes_per_s)
    return max(on_a_clock(scenario.ranks, lambda group: program(group, scenario), link=link)) / scenario.steps


def _content() -> Tensor:
    return torch.zeros(_WORDS)


def _partner(rank: int, size: int, step: int) -> int | None:
    """A round of a tournament: all are in pairs where the number of ranks is even, and one rests where it is odd."""
    players = size + size % 2
    last = players - 1
    if last == 0:
        return None
    turn = step % last
    if rank == last:
        peer = turn * (players // 2) % last
    else:
        peer = (turn - rank) % last
        peer = last if peer == rank else peer
    return peer if peer < size else None
