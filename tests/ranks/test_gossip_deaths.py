"""Gossip when ranks die, hang, or are started otherwise."""

import os
import signal
import time
from functools import partial

import pytest
import torch
from torch import nn

import piecework
from piecework import Gossip, data, losses
from piecework.models import mlp
from piecework.nn import Standardise
from piecework.testing import Faults, Killed, processes, threads
from piecework.training import PeerLost

pytestmark = pytest.mark.timeout(120)

LOSS = losses.Softmax()


def digits(group, faults, recipe, steps):
    """A run of `fit` in which ranks may die; what the rows of a survivor say."""
    set_ = data.load("digits")
    model = nn.Sequential(Standardise(set_.mean, set_.scale), mlp(64, [30], 10, seed=0))
    training = recipe.bind(model, LOSS, group=group)
    ahead, name = training.step, group.rank

    def step(batch):
        faults.check(name, training._step)
        return ahead(batch)

    training.step = step
    history = piecework.fit(training, set_, loss=LOSS, steps=steps, batch_size=16, evaluate_every=20)
    last = history.rows[-1]
    return {
        "weights": [row["weight_sum"] for row in history.rows],
        "loss": last["train"]["loss"],
        "score": last["test"]["score"],
        "step": last["step"],
        "size": training.group.size,
        "first weight": float(next(iter(model.parameters())).detach().sum()),
    }


RECIPE = Gossip(overlap=1, lr=0.03)


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize(("rank", "step"), [(1, 30), (0, 47), (2, 0)])
def test_a_dead_thread_is_survived_its_mass_made_good(overlap, rank, step):
    run = partial(digits, recipe=Gossip(overlap=overlap, lr=0.03), steps=80)
    calm = threads(4, partial(run, faults=Faults()), timeout=100)
    outcomes = threads(4, partial(run, faults=Faults().kill(rank=rank, step=step)), timeout=100, outcomes=True)
    assert isinstance(outcomes.pop(rank), Killed)
    for found in outcomes:
        assert not isinstance(found, BaseException), found
        assert found["step"] == 80
        assert found["size"] == 3
        assert found["weights"][-1] == pytest.approx(3, abs=1e-9)
        assert found["first weight"] == outcomes[0]["first weight"]
        assert abs(found["score"] - calm[0]["score"]) < 0.05


def test_two_deaths_at_different_times_are_survived():
    faults = Faults().kill(rank=1, step=25).kill(rank=4, step=26).kill(rank=2, step=60)
    outcomes = threads(6, partial(digits, faults=faults, recipe=RECIPE, steps=100), timeout=100, outcomes=True)
    alive = [found for found in outcomes if isinstance(found, dict)]
    assert len(alive) == 3, outcomes
    assert all(found["weights"][-1] == pytest.approx(3, abs=1e-9) for found in alive)


def test_kill_9_of_one_of_eight_processes_is_survived():
    run = partial(digits, recipe=RECIPE, steps=100)
    outcomes = processes(8, partial(run, faults=Faults().kill(rank=3, step=33)), timeout=100, wait=20.0, outcomes=True)
    assert isinstance(outcomes.pop(3), Killed)
    for found in outcomes:
        assert not isinstance(found, BaseException), found
        assert (found["step"], found["size"]) == (100, 7)
        assert found["weights"][-1] == pytest.approx(7, abs=1e-9)
        assert found["first weight"] == outcomes[0]["first weight"]
        assert found["score"] > 0.85


def stops(group, steps, verb):
    """Rank 1 hangs in a step, while the others mix (verb False) or wait for it in an evaluation."""
    training = RECIPE.bind(mlp(64, [8], 10, seed=0), LOSS, group=group)
    pids = [int(pid) for pid in group.gather(torch.tensor(os.getpid()))]
    batch = piecework.Batch(torch.randn(8, 64), torch.arange(8))
    began = time.monotonic()
    try:
        for step in range(10_000):
            if step == steps and group.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            if step == steps and verb:
                training.sync()
            training.step(batch)
    except PeerLost as lost:
        if group.rank == 0:
            time.sleep(1.0)  # the others are to find out by themselves
            os.kill(pids[1], signal.SIGCONT)
        return {"peer": lost.peer, "seconds": time.monotonic() - began, "said": str(lost)}


@pytest.mark.parametrize("verb", [False, True], ids=["mixing", "in an evaluation"])
def test_a_rank_that_hangs_is_an_error_within_the_timeout_on_all(verb):
    found = processes(3, partial(stops, steps=20, verb=verb), timeout=60, wait=2.0)
    for rank in (0, 2):
        assert found[rank]["peer"] in (1, None)
        assert found[rank]["seconds"] < 12
    assert any(found[rank]["peer"] == 1 for rank in (0, 2)), found
    assert found[1]["seconds"] < 20  # it comes back, and learns that the others have given up
