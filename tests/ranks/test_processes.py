"""Real processes on real sockets. Slow to start, so each launch asks several questions."""

import os
import socket
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from piecework.group import Ranks, Solo, current, launched
from piecework.testing import Faults, Killed, processes, threads
from piecework.training import BadInput, PeerLost

pytestmark = pytest.mark.timeout(60)


def every_verb(group):
    """All verbs on odd shapes, many dtypes and strided tensors; what comes out, and what was counted."""
    rank, size = group.rank, group.size
    stream = torch.Generator().manual_seed(7 + rank)
    found = {}

    grid = torch.randn(5, 3, generator=stream, dtype=torch.float64).t()
    mass = torch.randn((), generator=stream, dtype=torch.float64)
    counts = torch.arange(4) + rank
    wave = torch.complex(torch.ones(2), torch.full((2,), float(rank)))
    group.sum_(grid, counts, mass, wave)
    lone = torch.full((24,), rank, dtype=torch.bfloat16)
    group.sum_(lone)
    group.sum_(torch.empty(0, 3))
    found |= {"grid": grid, "mass": mass, "counts": counts, "wave": torch.view_as_real(wave), "lone": lone}

    weight = torch.nn.Parameter(torch.full((3, 2), float(rank)))
    group.sum_(weight)
    mask = torch.tensor([rank == 1, True, False])
    group.broadcast_(mask, src=1)
    strided = torch.full((3, 5), rank, dtype=torch.int64).t()
    group.broadcast_(strided, src=size - 1)
    found |= {"weight": weight.detach(), "mask": mask, "strided": strided}

    found["rows"] = group.gather(torch.full((3, 2 * rank), float(rank)).t())  # rank 0 has no row
    found["scalars"] = group.gather(torch.tensor(rank, dtype=torch.int16))
    found["flags"] = group.gather(torch.tensor([True] * (rank + 1)))
    found["none"] = group.gather(torch.empty(0, 4))
    found["any"] = [group.any(rank == 1), group.any(False)]

    after, before = (rank + 1) % size, (rank - 1) % size
    seen, kept = torch.zeros(3, 2).t(), torch.zeros(3, dtype=torch.bool)
    first = group.exchange({after: torch.full((3, 2), float(rank)).t()}, {before: seen})
    second = group.exchange({before: torch.tensor([True, False, rank == 0])}, {after: kept})
    first.wait()
    second.wait()
    second.wait()
    alone = torch.zeros(1)
    group.exchange({1: torch.ones(1)} if rank == 0 else {}, {0: alone} if rank == 1 else {}).wait()
    found |= {"seen": seen, "kept": kept, "alone": alone}
    return {**found, "bytes_sent": group.bytes_sent, "rounds": group.rounds}


def same(mine, theirs):
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    if isinstance(mine, torch.Tensor):
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.allclose(mine, theirs)
    return mine == theirs


def every_verb_and_surroundings(group):
    assert isinstance(group, Ranks)
    assert current() is group
    with launched() as again:  # a process group that exists is used and left alone
        assert again is group
    assert dist.is_initialized()
    assert torch.get_num_threads() == 1
    with pytest.raises(TypeError, match="int16"):
        group.sum_(torch.ones(2, dtype=torch.int16))
    with pytest.raises(ValueError, match="itself"):
        group.exchange({group.rank: torch.ones(1)}, {})
    with pytest.raises(ValueError, match="differ in dtype"):
        group.gather(torch.ones(2, 3 if group.rank else 4))
    pair = dist.new_group([0, 2])
    if group.rank != 1:
        a_part_of_the_ranks_is_a_group(Ranks(pair, timeout=20.0))
    group.bytes_sent = group.rounds = 0
    return every_verb(group)


def a_part_of_the_ranks_is_a_group(group):
    """Ranks and peers count within the group: 0 and 1 here are 0 and 2 in the whole."""
    mine, theirs, shared = torch.full((3,), float(group.rank)), torch.zeros(3), torch.full((3,), float(group.rank))
    group.exchange({1 - group.rank: mine}, {1 - group.rank: theirs}).wait()
    group.broadcast_(shared, src=1)
    assert (group.size, group.timeout) == (2, 20.0)
    assert (theirs == 1 - group.rank).all()
    assert (shared == 1).all()
    assert [int(rank) for rank in group.gather(torch.tensor(group.rank))] == [0, 1]


def test_processes_agree_with_threads_in_every_verb_and_count():
    expected = threads(3, every_verb)
    found = processes(3, every_verb_and_surroundings, timeout=50)
    for mine, theirs in zip(found, expected, strict=True):
        different = [name for name in mine if not same(mine[name], theirs[name])]
        assert mine.keys() == theirs.keys()
        assert not different
    for name in ("grid", "mass", "wave", "lone"):  # the same bits on every rank
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:])


def steps_in_company(group, faults, verb):
    """Steps until a peer is lost; what the error knows and how long it took, or the number of steps."""
    total = torch.ones(24, dtype=torch.float64)
    for step in range(4):
        group.step = step
        started = time.monotonic()
        faults.check(group.rank, step)
        try:
            if verb == "sum_":
                group.sum_(total)
            else:
                after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
                group.exchange({after: total}, {before: total.clone()}).wait()
        except PeerLost as lost:
            seconds = time.monotonic() - started
            with pytest.raises(PeerLost, match="earlier"):
                group.any(True)
            return {"peer": lost.peer, "step": lost.step, "verb": lost.verb, "seconds": seconds, "text": str(lost)}
    return {"steps": 4}


@pytest.mark.parametrize(("verb", "size"), [("sum_", 4), ("exchange", 3)])
def test_a_killed_process_is_a_lost_peer_on_all_others_within_the_timeout(verb, size):
    # In a ring of four the rank opposite to the dead one has no connection to it, and learns of it from the others.
    faults = Faults().kill(rank=1, step=2)
    run = partial(steps_in_company, faults=faults, verb=verb)
    outcomes = processes(size, run, timeout=50, wait=10.0, outcomes=True)
    dead = outcomes.pop(1)
    assert isinstance(dead, Killed)
    assert "SIGKILL" in str(dead)
    for survivor in outcomes:
        assert survivor["seconds"] < 10.0
        assert (survivor["peer"], survivor["step"], survivor["verb"]) == (1, 2, verb), survivor["text"]


def test_a_process_that_does_not_come_is_lost_at_the_timeout_and_told_so_when_it_does():
    faults = Faults().delay(rank=2, step=1, seconds=3.0)
    outcomes = processes(3, partial(steps_in_company, faults=faults, verb="sum_"), timeout=50, wait=1.5)
    for survivor in outcomes[:2]:
        assert (survivor["peer"], survivor["step"]) == (2, 1), survivor["text"]
        assert survivor["seconds"] > 1.4
    assert outcomes[2]["peer"] is None
    assert "had given up" in outcomes[2]["text"]


def fails_on_one_rank(group, error):
    if group.rank == 1:
        raise error
    group.sum_(torch.ones(3))


def test_the_error_of_one_process_comes_out_with_its_traceback():
    run = partial(fails_on_one_rank, error=BadInput("row 3 of column 5 is not a number"))
    with pytest.raises(BadInput, match="row 3 of column 5") as caught:
        processes(2, run, timeout=50)
    notes = "\n".join(caught.value.__notes__)
    assert "rank 1" in notes
    assert "in fails_on_one_rank" in notes


def returns_itself_on_a_group_of_one(group):
    assert isinstance(group, Solo)
    time.sleep(30 if "SLEEP" in os.environ else 0)
    return group


def test_a_result_that_is_not_plain_data_is_refused():
    with pytest.raises(TypeError, match="must return tensors"):
        processes(1, returns_itself_on_a_group_of_one, timeout=50)


def test_a_process_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setenv("SLEEP", "1")
    with pytest.raises(TimeoutError, match="rank 0 was still running after 2 s"):
        processes(1, returns_itself_on_a_group_of_one, timeout=2)


def test_a_local_function_is_refused_before_any_process_starts():
    with pytest.raises(TypeError, match="import"):
        processes(2, lambda group: None)


def test_ranks_that_do_not_come_to_the_start_are_lost(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeerLost, match="rank 1 lost a peer in the start"), launched(timeout=1):
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_something_else_has_is_an_error_within_the_timeout(monkeypatch, rank):
    with socket.create_server(("127.0.0.1", 0)) as other:
        seat = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (seat | {"MASTER_PORT": str(other.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        said = ("in use; set another MASTER_PORT", "does not answer as the store of ranks does")[rank]
        with pytest.raises((BadInput, PeerLost), match=said), launched(timeout=1):
            pass
    assert not dist.is_initialized()
