"""Ranks that leave in order, and ranks that join: no mass is lost, and averages say so."""

import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
from torch import nn

from piecework import BadInput, Gossip
from piecework.methods.gossip.push_sum import PushSum
from piecework.ranks import Ranks, joining
from piecework.ranks.meeting import named
from piecework.ranks.survivors import surviving
from piecework.testing import processes, threads
from piecework.training import PeerLost

pytestmark = pytest.mark.timeout(120)


def start(name, dtype=torch.float64):
    return torch.randn(5, generator=torch.Generator().manual_seed(name)).to(dtype)


def mean(names):
    return torch.stack([start(name) for name in names]).mean(0)


def mixing(group, leaves, overlap=1, on_time=False, graph="exponential", dtype=torch.float64, wire=None, steps=12):
    """Ranks that only mix; those in `leaves` go after so many steps. What a rank that stays has found."""
    own = start(group.rank, dtype)
    push_sum = PushSum([own], surviving(group), graph, overlap=overlap, on_time=on_time, wire=wire)
    if isinstance(push_sum.group, type(surviving(group))) and push_sum.group.size > 1:
        push_sum.group.evidence = push_sum.dead
    for step in range(steps):
        if leaves.get(group.rank) == step:
            push_sum.leave()
            return {"left": own}
        push_sum.mix()
    (average,), _, weight = push_sum.average()
    for _ in range(steps):
        push_sum.mix()
    (later,), _, _ = push_sum.average()
    return {"average": average, "later": later, "weight": weight, "size": push_sum.group.size}


@pytest.mark.parametrize("graph", ["exponential", "ring", "complete"])
@pytest.mark.parametrize(("overlap", "on_time"), [(0, False), (1, False), (1, True), (3, True)])
@pytest.mark.parametrize("leaves", [{1: 5}, {0: 0}, {3: 7, 1: 7}, {0: 3, 2: 4, 3: 9}], ids=str)
def test_the_mean_is_kept_when_ranks_leave(graph, overlap, on_time, leaves):
    found = threads(4, partial(mixing, leaves=leaves, overlap=overlap, on_time=on_time, graph=graph), timeout=60)
    stay = [one for rank, one in enumerate(found) if rank not in leaves]
    for one in stay:
        assert one["size"] == len(stay)
        assert one["weight"] == pytest.approx(len(stay), abs=1e-12)
        torch.testing.assert_close(one["average"], mean(range(4)), rtol=0, atol=1e-12)
        torch.testing.assert_close(one["later"], mean(range(4)), rtol=0, atol=1e-12)


def test_a_narrow_wire_loses_nothing_either():
    run = partial(mixing, leaves={2: 4}, dtype=torch.float32, wire=torch.bfloat16)
    for one in (one for rank, one in enumerate(threads(4, run)) if rank != 2):
        torch.testing.assert_close(one["average"], mean(range(4)).float(), rtol=0, atol=1e-6)


def test_a_rank_alone_may_leave_and_so_may_all():
    assert "left" in threads(1, partial(mixing, leaves={0: 2}))[0]
    assert all("left" in one for one in threads(3, partial(mixing, leaves={0: 2, 1: 2, 2: 2})))


def line(seed):
    return nn.Linear(3, 2, dtype=torch.float64) if seed is None else _seeded(seed)


def _seeded(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 2, dtype=torch.float64)


def train(gossip, model, optimizer, steps, seed, until=lambda: False):
    """A loop of a user's own; says how many steps it took."""
    rows = torch.randn(64, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = rows @ torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 1.0]], dtype=torch.float64)
    for step in range(steps):
        if until():
            return step
        optimizer.zero_grad()
        (model(rows) - wanted).square().mean().backward()
        optimizer.step()
    return steps


def attached(group, **settings):
    model = line(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return Gossip(**settings).attach(model, optimizer, group=group), model, optimizer


def one_goes_at_sigterm(group):
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    gossip, model, optimizer = attached(group, overlap=1)
    if group.rank == 2:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

        def slow_or_asked():
            time.sleep(0.01)
            return asked.is_set()

        steps = train(gossip, model, optimizer, 10_000, 2, until=slow_or_asked)
        began = time.monotonic()
        gossip.leave()
        return {"steps": steps, "took": time.monotonic() - began}
    train(gossip, model, optimizer, 300, group.rank)
    gossip.sync()
    return {
        "error": float(sum(parameter.grad.abs().sum() for parameter in model.parameters())),
        "weights": gossip._peers.words["weight_sum"],
        "size": gossip.group.size,
        "model": model.weight.detach().clone(),
    }


def test_a_process_told_to_end_hands_over_and_the_others_go_on():
    found = processes(4, one_goes_at_sigterm, timeout=90, wait=20.0)
    assert found.pop(2)["took"] < 10
    for one in found:
        assert (one["size"], one["weights"]) == (3, pytest.approx(3, abs=1e-9))
        assert torch.equal(one["model"], found[0]["model"])
        assert one["error"] < 1e-2


def three_and_one_more(group, settings, other_settings):
    """Ranks 0 to 2 train; rank 3 comes later, by the address of the store alone."""
    if group.rank < 3:
        three = Ranks.met(named(group.store, "three"), group.rank, 3, timeout=20.0)
        gossip, model, optimizer = attached(three, **settings)
        train(gossip, model, optimizer, 20, group.rank)
        until = time.monotonic() + 40
        while time.monotonic() < until:
            came = gossip.admit()
            train(gossip, model, optimizer, 5, group.rank)
            if came or (other_settings and gossip.group._answered):
                break
        found = _finish(gossip, model, optimizer, group.rank)
        three.leave()
        return found
    time.sleep(1.0)
    with joining(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=40) as newcomer:
        try:
            gossip, model, optimizer = attached(newcomer, **settings | other_settings)
        except BadInput as error:
            return {"refused": str(error)}
        first = {"weight": gossip._peers.push_sum.weight, "first step": gossip._peers.push_sum.step}
        train(gossip, model, optimizer, 5, group.rank)
        return _finish(gossip, model, optimizer, group.rank) | first


def _finish(gossip, model, optimizer, seed):
    gossip.sync()
    weights = gossip._peers.words["weight_sum"]
    train(gossip, model, optimizer, 60, seed)
    gossip.sync()
    return {
        "weights": [weights, gossip._peers.words["weight_sum"]],
        "size": gossip.group.size,
        "model": model.weight.detach().clone(),
        "step": gossip._peers.push_sum.step,
        "own weight": gossip._peers.push_sum.weight,
    }


@pytest.mark.parametrize(
    "settings", [{"overlap": 0}, {"overlap": 1}, {"overlap": 1, "slow_every": 8, "slow_momentum": 0.5}], ids=str
)
def test_a_process_joins_with_no_weight_and_is_one_of_them_soon(settings):
    found = processes(4, partial(three_and_one_more, settings=settings, other_settings={}), timeout=90, wait=20.0)
    newcomer = found[3]
    assert newcomer["weight"] == 0.0
    for one in found:
        assert one["size"] == 4
        assert one["weights"] == pytest.approx([4, 4], abs=1e-9)
        assert torch.equal(one["model"], found[0]["model"])
        assert one["own weight"] > 0.1
    assert newcomer["step"] == found[0]["step"] == newcomer["first step"] + 65


def test_a_newcomer_with_other_settings_is_refused_and_the_others_do_not_notice():
    run = partial(three_and_one_more, settings={"overlap": 1}, other_settings={"overlap": 2})
    found = processes(4, run, timeout=90, wait=20.0)
    assert "the ranks at work refuse this one: it was started with overlap 2, they with 1" in found[3]["refused"]
    assert all(one["size"] == 3 and one["weights"] == pytest.approx([3, 3], abs=1e-9) for one in found[:3])


def nobody_lets_in(group):
    attached(group, overlap=1)
    if group.rank == 0:
        late = pytest.raises(PeerLost, match=r"they have not called admit\(\)")
        with joining(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=1.0) as newcomer, late:
            attached(newcomer, overlap=1)
    group.any(False)
    return True


def test_whoever_is_not_let_in_is_told_so():
    assert processes(2, nobody_lets_in, timeout=60) == [True, True]
    with (
        pytest.raises(BadInput, match=r"no store of ranks answers at 127\.0\.0\.1:9"),
        joining("127.0.0.1", 9, timeout=1),
    ):
        pass
