"""Faults on a schedule, with ranks in memory; a real SIGKILL is in tests/ranks."""

import time

import pytest
import torch

from piecework.testing import Faults, Killed, threads
from piecework.training import PeerLost


def test_a_killed_thread_is_a_lost_peer_on_all_others_even_where_it_catches_every_exception():
    faults = Faults().kill(rank=1, step=2)

    def fn(group):
        for step in range(4):
            group.step = step
            try:
                faults.check(group.rank, step)
            except Exception:
                continue
            group.sum_(torch.ones(3))

    outcomes = threads(3, fn, timeout=10, outcomes=True)
    assert isinstance(outcomes[1], Killed)
    assert [(error.peer, error.step) for error in (outcomes[0], outcomes[2])] == [(1, 2), (1, 2)]
    with pytest.raises(PeerLost):
        threads(3, fn, timeout=10)


def test_a_kill_nobody_notices_is_still_an_error():
    with pytest.raises(RuntimeError, match="rank 0 was killed at step 5, and no other rank noticed"):
        threads(2, lambda group: Faults().kill(rank=0, step=5).check(group.rank, 5), timeout=10)


def test_a_schedule_raises_and_delays_where_it_says_and_is_never_changed():
    none = Faults()
    faults = (
        none.raise_at(rank=0, step=1, error=KeyError("w")).raise_at(rank=0, step=2).delay(rank=1, step=1, seconds=0.1)
    )
    none.check(0, 1)
    faults.check(0, 0)
    faults.check(1, 2)
    with pytest.raises(KeyError, match="w"):
        faults.check(0, 1)
    with pytest.raises(RuntimeError, match="on schedule"):
        faults.check(0, 2)
    started = time.monotonic()
    faults.check(1, 1)
    assert time.monotonic() - started >= 0.1


def test_a_kill_outside_of_ranks_spares_the_process():
    with pytest.raises(RuntimeError, match="inside threads"):
        Faults().kill(rank=0, step=0).check(0, 0)
