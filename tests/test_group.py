"""Groups: every verb on ranks in memory, what they count, and how they fail. Real processes are in tests/ranks."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.group import Ranks, Solo, current, launched
from piecework.testing import Faults, threads
from piecework.training import BadInput, PeerLost

pytestmark = pytest.mark.timeout(30)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


def draw(rank, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(11 + rank), dtype=torch.float64).to(dtype)


# --- the verbs ---------------------------------------------------------------------------------------------------


def test_sums_are_equal_on_all_ranks_and_added_in_rank_order():
    parts = [draw(rank, 24, dtype=torch.float32) for rank in range(5)]
    total = parts[0] + parts[1] + parts[2] + parts[3] + parts[4]

    def fn(group):
        time.sleep(0.01 * ((group.rank * 3) % 5))  # ranks arrive in another order
        mine = parts[group.rank].clone()
        group.sum_(mine)
        return mine

    assert all(torch.equal(found, total) for found in threads(5, fn, timeout=10))


def test_a_sum_takes_tensors_of_many_dtypes_shapes_and_strides_at_once():
    def fn(group):
        strided = draw(group.rank, 5, 3).t()
        scalar = torch.tensor(group.rank, dtype=torch.float64)
        counts = torch.full((3,), group.rank)
        weight = torch.nn.Parameter(torch.full((2, 2), float(group.rank), dtype=torch.float64))
        empty = torch.empty(0, 4)
        group.sum_(strided, counts, scalar, weight, empty)
        return strided, scalar, counts, weight.detach(), (group.bytes_sent, group.rounds)

    for strided, scalar, counts, weight, counted in threads(3, fn, timeout=10):
        torch.testing.assert_close(strided, (draw(0, 5, 3) + draw(1, 5, 3) + draw(2, 5, 3)).t())
        assert scalar == 3
        assert counts.tolist() == [3, 3, 3]
        assert (weight == 3).all()
        assert counted == ((15 + 1 + 4) * 8 + 3 * 8, 2)  # one message of float64, one of int64, none of nothing


@given(
    rows=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    width=st.sampled_from([None, 0, 1, 3]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40, deadline=None)
def test_gather_gives_every_rank_all_tensors_whatever_their_first_dimension(rows, width, dtype):
    parts = [draw(rank, *((num,) if width is None else (num, width))).to(dtype) for rank, num in enumerate(rows)]

    def fn(group):
        return group.gather(parts[group.rank]), group.bytes_sent, group.rounds

    payload = any(part.numel() for part in parts)
    for rank, (found, num_bytes, rounds) in enumerate(threads(len(rows), fn, timeout=10)):
        assert [part.dtype for part in found] == [dtype] * len(rows)
        assert all(torch.equal(part, other) for part, other in zip(found, parts, strict=True))
        assert num_bytes == 16 + parts[rank].numel() * parts[rank].element_size()
        assert rounds == (2 if payload else 1)


def test_gathered_tensors_belong_to_whoever_gathered_them():
    def fn(group):
        mine = torch.full((), group.rank)
        found = group.gather(mine)
        group.any(False)
        found[1 - group.rank] += 10
        group.any(False)
        return found, mine

    assert threads(2, fn, timeout=10) == [([0, 11], 0), ([10, 1], 1)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_overwrites_with_the_source_and_only_the_source_sends_bytes(dtype):
    def fn(group):
        strided = draw(group.rank, 5, 3, dtype=dtype).t()
        group.broadcast_(strided, src=2)
        return strided, group.bytes_sent, group.rounds

    for rank, (found, num_bytes, rounds) in enumerate(threads(3, fn, timeout=10)):
        assert torch.equal(found, draw(2, 5, 3, dtype=dtype).t())
        assert num_bytes == (15 * found.element_size() if rank == 2 else 0)
        assert rounds == 1


@given(flags=st.lists(st.booleans(), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_is_true_everywhere_when_one_rank_says_so(flags):
    assert threads(len(flags), lambda group: group.any(flags[group.rank]), timeout=10) == [any(flags)] * len(flags)


def test_an_exchange_fills_buffers_at_wait_and_keeps_the_order_of_messages():
    def fn(group):
        after, before = (group.rank + 1) % 3, (group.rank - 1) % 3
        first, second = torch.full((2, 3), -1.0).t(), torch.full((3,), -1.0)
        one = group.exchange({after: torch.full((2, 3), 10.0 + group.rank).t()}, {before: first})
        two = group.exchange({after: torch.full((3,), 20.0 + group.rank)}, {before: second})
        group.any(False)
        early = first.clone()
        two.wait()
        one.wait()
        one.wait()  # nothing is left to do
        group.exchange({}, {}).wait()
        return early, first, second, group.bytes_sent, group.rounds

    for rank, (early, first, second, num_bytes, rounds) in enumerate(threads(3, fn, timeout=10)):
        assert (early == -1).all()
        assert (first == 10 + (rank - 1) % 3).all()
        assert (second == 20 + (rank - 1) % 3).all()
        assert (num_bytes, rounds) == (24 + 1 + 12, 3)


def test_a_stage_may_only_send_and_another_only_receive():
    def fn(group):
        buffer = torch.zeros(3)
        group.exchange({1: torch.ones(3)} if group.rank == 0 else {}, {0: buffer} if group.rank == 1 else {}).wait()
        return buffer.sum().item(), group.bytes_sent

    assert threads(3, fn, timeout=10) == [(0.0, 12), (3.0, 0), (0.0, 0)]


def verbs_of_one(group):
    tensor = draw(0, 3)
    group.sum_(tensor)
    group.broadcast_(tensor)
    (found,) = group.gather(tensor)
    assert torch.equal(found, draw(0, 3))
    assert torch.equal(tensor, found)
    assert group.any(True)
    assert not group.any(False)
    group.exchange({}, {}).wait()
    with pytest.raises(ValueError, match=r"peer|itself"):
        group.exchange({0: tensor}, {})
    return group.bytes_sent, group.rounds


def test_a_group_of_one_costs_nothing():
    assert verbs_of_one(Solo()) == (0, 0)
    assert threads(1, verbs_of_one, timeout=10) == [(0, 0)]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_ranks_in_different_verbs_are_told_both():
    def fn(group):
        group.any(False)
        if group.rank == 0:
            group.sum_(torch.ones(3))
        else:
            group.broadcast_(torch.ones(3), src=1)

    with pytest.raises(ValueError, match=r"rank 0 in sum_, rank 1 in broadcast_ from rank 1"):
        threads(2, fn, timeout=10)


def test_a_rank_in_an_exchange_is_told_to_those_who_wait_for_it_in_a_sum():
    def fn(group):
        if group.rank == 0:
            group.sum_(torch.ones(3))
        else:
            group.exchange({}, {0: torch.ones(3)}).wait()

    outcomes = threads(2, fn, timeout=10, wait=0.3, outcomes=True)
    assert any("(in exchange)" in str(error) or "(in sum_)" in str(error) for error in outcomes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda group: group.sum_(torch.ones(3 + group.rank)), r"sum_: rank 0 .*\(3,\) float32.* rank 1 .*\(4,\)"),
        (lambda group: group.sum_(*[torch.ones(3)] * (1 + group.rank)), "must agree"),
        (lambda group: group.broadcast_(torch.ones(3 + group.rank)), "broadcast_: rank 0"),
        (lambda group: group.gather(torch.ones(2, 3 + group.rank)), "only the first may differ"),
        (lambda group: group.gather(torch.ones(1) if group.rank else torch.tensor(1.0)), "number of dimensions"),
        (lambda group: group.broadcast_(torch.ones(1), src=2), "no rank 2 in a group of 2"),
        (lambda group: group.exchange({group.rank: torch.ones(1)}, {}), "names itself"),
        (lambda group: group.exchange({}, {-1: torch.ones(1)}), "no rank -1"),
    ],
)
def test_tensors_and_peers_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        threads(2, call, timeout=10)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16])
def test_a_dtype_that_backends_cannot_add_is_refused_with_a_way_out(dtype):
    with pytest.raises(TypeError, match=f"{dtype}.*convert"):
        threads(2, lambda group: group.sum_(torch.ones(3, dtype=dtype)), timeout=10)


def test_a_message_that_does_not_fit_its_buffer_is_refused_on_both_ends():
    def fn(group):
        peer = 1 - group.rank
        group.exchange({peer: torch.ones(4)}, {peer: torch.zeros(3)}).wait()

    outcomes = threads(2, fn, timeout=10, outcomes=True)
    assert all(isinstance(error, ValueError) and "one dtype and size" in str(error) for error in outcomes)


def test_a_message_changed_before_wait_is_an_error():
    def fn(group):
        sent = torch.ones(3)
        pending = group.exchange({1: sent} if group.rank == 0 else {}, {0: torch.zeros(3)} if group.rank else {})
        sent += 1
        pending.wait()

    with pytest.raises(ValueError, match="rank 0 changed what it sends to rank 1"):
        threads(2, fn, timeout=10)


# --- ranks that are lost -----------------------------------------------------------------------------------------


def test_the_error_of_one_rank_comes_out_and_the_others_lose_it_at_once():
    def fn(group):
        group.step = 4
        if group.rank == 1:
            raise BadInput("row 7 is not a number")
        group.sum_(torch.ones(3))

    started = time.monotonic()
    with pytest.raises(BadInput, match="row 7") as caught:
        threads(3, fn, timeout=20)
    assert caught.value.__notes__ == ["on rank 1 of 3"]
    for rank, error in enumerate(threads(3, fn, timeout=20, outcomes=True)):
        assert isinstance(error, BadInput if rank == 1 else PeerLost)
        if rank != 1:
            assert (error.rank, error.peer, error.verb, error.step) == (rank, 1, "sum_", 4)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("verb", ["sum_", "exchange"])
def test_a_rank_that_does_not_come_is_lost_after_the_wait_and_hears_so_when_it_comes(verb):
    faults = Faults().delay(rank=2, step=0, seconds=1.2)

    def fn(group):
        group.any(False)
        faults.check(group.rank, 0)
        if verb == "sum_":
            group.sum_(torch.ones(3))
        else:
            after, before = (group.rank + 1) % 3, (group.rank - 1) % 3
            group.exchange({after: torch.ones(1)}, {before: torch.ones(1)}).wait()

    lost = threads(3, fn, timeout=20, wait=0.5, outcomes=True)
    assert all(isinstance(error, PeerLost) for error in lost)
    assert [error.peer for error in lost] == [2, 2, None]
    assert lost[0].timeout == 0.5
    assert "had given up" in str(lost[2])


def test_two_ranks_that_both_send_first_and_receive_later_wait_for_ever_as_on_gloo():
    def fn(group):
        peer = 1 - group.rank
        group.exchange({peer: torch.ones(3)}, {}).wait()
        group.exchange({}, {peer: torch.ones(3)}).wait()

    with pytest.raises(PeerLost, match="exchange"):
        threads(2, fn, timeout=10, wait=0.2)


def test_a_rank_that_has_finished_is_lost_to_those_who_go_on():
    def fn(group):
        for _ in range(2 - group.rank):
            group.any(False)
        return group.rank

    lost, finished = threads(2, fn, timeout=10, outcomes=True)
    assert isinstance(lost, PeerLost)
    assert "rank 1 has finished" in str(lost)
    assert finished == 1


def test_a_message_nobody_has_met_dies_with_its_sender():
    def fn(group):
        if group.rank == 0:
            group.exchange({1: torch.ones(3)}, {})  # never waited for
            return
        for _ in range(1000):
            if all(thread.name != "rank-0" for thread in threading.enumerate()):
                break
            time.sleep(0.01)
        group.exchange({}, {0: torch.ones(3)}).wait()

    with pytest.raises(PeerLost, match="lost rank 0 in exchange"):
        threads(2, fn, timeout=10)


def test_a_rank_that_does_not_end_is_named(monkeypatch):
    monkeypatch.setattr("piecework.testing.ranks._GRACE", 0.1)
    stop = threading.Event()
    with pytest.raises(TimeoutError, match=r"rank 1 was still running after 0\.2 s"):
        threads(2, lambda group: group.rank == 0 or stop.wait(20), timeout=0.2)
    stop.set()


def test_threads_leave_torch_as_it_was():
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    threads(3, lambda group: group.sum_(draw(group.rank, 5)), timeout=10)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank-")]


# --- the default group -------------------------------------------------------------------------------------------


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert isinstance(current(), Solo)
    with launched() as group:
        assert isinstance(group, Solo)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launched() as group:
        assert isinstance(group, Solo)
    assert not dist.is_initialized()


def test_ranks_without_a_process_group_say_how_to_start_one():
    with pytest.raises(BadInput, match="torchrun"):
        Ranks()


def test_an_incomplete_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(BadInput, match="MASTER_ADDR"), launched(timeout=2):
        pass
    assert not dist.is_initialized()


def test_the_default_group_is_one_object_for_as_long_as_it_lives():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = current()
        assert isinstance(group, Ranks)
        assert current() is group
        assert group.timeout == 1800.0
        assert verbs_of_one(group) == (0, 0)
        with launched() as same:
            assert same is group
        assert dist.is_initialized()
        with pytest.raises(BadInput, match="positive"):
            Ranks(timeout=0)
        with pytest.raises(BadInput, match="not a member"):
            Ranks(dist.GroupMember.NON_GROUP_MEMBER)
    finally:
        dist.destroy_process_group()
    assert isinstance(current(), Solo)
