"""The mailbox on real processes and sockets: order, death, silence, and a quiet end."""

import os
import signal
import threading
import time
from functools import partial

import pytest
import torch

from piecework.testing import Killed, processes, threads
from piecework.training import PeerLost

pytestmark = pytest.mark.timeout(90)


def post(box, peer, *numbers):
    draft = box.draft()
    words = torch.tensor(numbers, dtype=torch.int64).view(torch.uint8)
    draft[: len(words)] = words
    box.post(peer, draft, len(words))


def read(letter):
    return letter.peer, letter.content.view(torch.int64).tolist()


def everybody_writes_to_everybody(group):
    """What each rank got, by source, and what was counted."""
    box = group.mailbox(800)
    others = [peer for peer in range(group.size) if peer != group.rank]
    box.listen(others)
    for number in range(20):
        for peer in others:
            post(box, peer, group.rank, *range(number + 1))
    found = {peer: [] for peer in others}
    while any(len(messages) < 20 for messages in found.values()):
        box.wait([peer for peer, messages in found.items() if len(messages) < 20])
        for letter in box.take():
            peer, numbers = read(letter)
            assert numbers[0] == peer
            found[peer].append(len(numbers) - 1)
            box.recycle(letter)
    counts = group.bytes_sent, group.rounds
    assert not box.returned()
    box.close()
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("piecework-from")]
    return {"found": found, "counts": counts, "threads": names}


def test_messages_of_each_peer_arrive_in_the_order_of_posting_and_nothing_is_left_running():
    in_memory = threads(3, everybody_writes_to_everybody)
    began = time.monotonic()
    real = processes(3, everybody_writes_to_everybody, timeout=60)
    assert time.monotonic() - began < 45
    for mine, theirs in zip(real, in_memory, strict=True):
        assert mine["found"] == theirs["found"]
        assert all(lengths == list(range(1, 21)) for lengths in mine["found"].values())
        assert mine["counts"][1] - 1 == theirs["counts"][1]  # meeting takes a round on real ranks
        assert not mine["threads"]


def one_is_killed(group):
    box = group.mailbox(80)
    others = [peer for peer in range(group.size) if peer != group.rank]
    box.listen(others)
    if group.rank == 1:
        post(box, 0, 7)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    while 1 not in box.gone:
        box.wait([1])
        for letter in box.take():
            assert read(letter) == (1, [7])
    noticed = time.monotonic() - started
    post(box, 1, 5)
    while not (back := box.returned()):
        time.sleep(0.01)
    (peer,) = [one for one in others if one != 1]
    post(box, peer, group.rank)
    while not (letters := box.take()):
        box.wait([peer])
    return {"seconds": noticed, "back": read(back[0]), "from the living": read(letters[0])}


def test_a_killed_peer_is_gone_at_once_its_mail_comes_back_and_the_others_go_on():
    outcomes = processes(3, one_is_killed, timeout=60, wait=30.0, outcomes=True)
    assert isinstance(outcomes[1], Killed)
    for rank, other in ((0, 2), (2, 0)):
        assert outcomes[rank]["seconds"] < 10
        assert outcomes[rank]["back"] == (1, [5])
        assert outcomes[rank]["from the living"] == (other, [other])


def one_hangs(group):
    """Rank 2 stops. Rank 0 waits for it, rank 1 for rank 0, which is alive as long as it waits itself."""
    box = group.mailbox(80)
    box.listen([peer for peer in range(group.size) if peer != group.rank])
    pid = torch.tensor(os.getpid())
    stopped = int(group.gather(pid)[2])
    if group.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
        return {}
    started = time.monotonic()
    try:
        while True:
            box.wait([2 if group.rank == 0 else 0])
            if 0 in box.gone:
                return {"mistook": "the end of rank 0 for a death"}
    except PeerLost as lost:
        time.sleep(0.5)
        if group.rank == 1:
            os.kill(stopped, signal.SIGKILL)
        return {"peer": lost.peer, "seconds": time.monotonic() - started, "text": str(lost)}


def test_a_peer_that_hangs_is_named_on_all_ranks_after_the_timeout():
    outcomes = processes(3, one_hangs, timeout=60, wait=2.0, outcomes=True)
    for outcome in outcomes[:2]:
        assert outcome["peer"] == 2, outcome
        assert 1.5 < outcome["seconds"] < 8.0
        assert "no sign of life" in outcome["text"]


def one_is_slow(group, seconds):
    box = group.mailbox(80)
    other = 1 - group.rank
    box.listen([other])
    if group.rank == 1:
        time.sleep(seconds)
        post(box, 0, 1)
        box.close()
        return 0.0
    started = time.monotonic()
    while not box.take():
        box.wait([other])
    waited = time.monotonic() - started
    box.close()
    return waited


def test_a_peer_that_is_slow_and_alive_is_waited_for_beyond_the_timeout():
    assert processes(2, partial(one_is_slow, seconds=3.0), timeout=60, wait=1.0)[0] > 2.0


def one_ends_long_before_the_other(group):
    box = group.mailbox(80)
    box.listen([1 - group.rank])
    if group.rank == 1:
        time.sleep(7.0)  # longer than a mailbox waits for the others to close theirs
    box.close()
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("piecework-from")]


def test_no_thread_is_left_waiting_for_a_peer_that_takes_its_time():
    assert processes(2, one_ends_long_before_the_other, timeout=60) == [[], []]


def one_does_not_listen_yet(group):
    """A peer that takes nothing holds up what is posted to another for a part of the timeout, once."""
    box = group.mailbox(8_000_000)
    seconds = []
    if group.rank == 0:
        for number in range(3):
            post(box, 1, *range(10**6))
            post(box, 2, number)
    elif group.rank == 2:
        box.listen([0])
        began = time.monotonic()
        found = []
        while len(found) < 3:
            box.wait([0])
            found.extend(read(letter) for letter in box.take())
            seconds.append(time.monotonic() - began)
        assert found == [(0, [number]) for number in range(3)]
    group.any(False)
    if group.rank == 1:
        box.listen([0])
        while len(seconds) < 3:
            box.wait([0])
            seconds.extend(letter.content.numel() for letter in box.take())
    box.close()
    return seconds


def test_a_peer_that_does_not_take_its_mail_does_not_hold_up_the_others_for_long():
    _, late, soon = processes(3, one_does_not_listen_yet, timeout=60, wait=20.0)
    assert late == [8_000_000] * 3
    assert soon[-1] < 5.5  # one patience of 2 s, and not one for each message that waits
