"""Local on real processes and sockets."""

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
