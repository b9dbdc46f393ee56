"""Local on real processes and sockets."""

import os
import signal
import time
from functools import partial

import pytest
import torch
from torch import nn

from piecework import Batch, Local, PeerLost, losses
from piecework.group import Solo
from piecework.models import mlp
from piecework.testing import Faults, Killed, processes

pytestmark = pytest.mark.timeout(60)


def trained(group, steps=200, faults=None, **more):
    plain = mlp(5, [7, 7], 3, activation="tanh", seed=0, dtype=torch.float64)
    model = nn.Sequential(plain[0], plain[1], nn.Dropout(0.3), *plain[2:])
    training = Local(blocks=3, lr=0.02, seed=2, probe_every=50, **more).bind(model, losses.Softmax(), group=group)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if faults is not None:
            faults.check(group.rank, step)
        x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        try:
            training.step(Batch(x, torch.randint(3, (7,), generator=generator)))
        except PeerLost as lost:
            return {"lost": str(lost), "timeout": lost.timeout}
    training.sync()
    return list(model.state_dict().values())


@pytest.mark.parametrize("more", [{}, {"coupling": "overlap", "staleness": 1, "buffers": 1}], ids=["greedy", "late"])
def test_three_processes_give_the_bits_of_one_after_two_hundred_batches(more):
    alone = trained(Solo(), **more)
    for found in processes(3, partial(trained, **more), timeout=50):
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_a_killed_process_is_a_lost_peer_on_both_others():
    run = partial(trained, faults=Faults().kill(rank=1, step=40), steps=5000)
    outcomes = processes(3, run, timeout=50, wait=10.0, outcomes=True)
    assert isinstance(outcomes[1], Killed)
    for survivor in (outcomes[0], outcomes[2]):
        assert "lost" in survivor["lost"]


def one_stops(group):
    """Rank 1 of three stops without ending; whoever has waited for it long enough wakes it for its end."""
    pid = int(group.gather(torch.tensor(os.getpid()))[1])
    model = mlp(5, [7, 7], 3, activation="tanh", seed=0)
    training = Local(blocks=3, probe_every=0).bind(model, losses.Softmax(), group=group)
    started, batch = time.monotonic(), Batch(torch.randn(7, 5), torch.arange(7) % 3)
    try:
        for step in range(1000):
            if group.rank == 1 and step == 20:
                os.kill(os.getpid(), signal.SIGSTOP)
            training.step(batch)
    except PeerLost as lost:
        if group.rank == 0:
            time.sleep(1.0)
            os.kill(pid, signal.SIGKILL)
        return {"peer": lost.peer, "seconds": time.monotonic() - started}
    return {}


def test_a_stopped_process_is_a_lost_peer_after_the_timeout():
    outcomes = processes(3, one_stops, timeout=50, wait=3.0, outcomes=True)
    assert isinstance(outcomes[1], Killed)
    for survivor in (outcomes[0], outcomes[2]):
        assert survivor["peer"] == 1
        assert survivor["seconds"] < 30


def runs_ahead(group, buffers, path):
    """Rank 0 writes down what step it is in; rank 1 reads that where it has long ceased to follow."""
    training = Local(blocks=2, buffers=buffers, probe_every=0).bind(mlp(5, [7], 3), losses.Softmax(), group=group)
    batch, found = Batch(torch.ones(7, 5), torch.arange(7) % 3), 0
    for step in range(12):
        if group.rank == 0:
            path.write_text(str(step))
        elif step == 3:
            time.sleep(2.0)
            found = int(path.read_text()) - step
        training.step(batch)
    training.sync()
    return found


@pytest.mark.parametrize("buffers", [1, 3])
def test_a_process_is_no_further_ahead_than_there_are_buffers(buffers, tmp_path):
    found = processes(2, partial(runs_ahead, buffers=buffers, path=tmp_path / "step"), timeout=50)[1]
    assert 1 <= found <= buffers
