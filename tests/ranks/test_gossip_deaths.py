"""Gossip when ranks die, hang, or are started otherwise."""

from functools import partial

import pytest
from torch import nn

import piecework
from piecework import Gossip, data, losses
from piecework.models import mlp
from piecework.nn import Standardise
from piecework.testing import Faults, Killed, processes, threads

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
