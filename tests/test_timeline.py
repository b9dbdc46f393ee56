"""Who waited for whom, when: by hand, from ranks of which one is slow, and drawn."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import piecework
from piecework import ADMM, SGD, Gossip, Group, Local, data, losses
from piecework.checkpoint import RunFolder
from piecework.cli import main
from piecework.models import mlp
from piecework.testing import processes, threads
from piecework.timeline import FIRST, LAST, Part, Wait, Waits, parts, read, write
from piecework.timeline_figure import shares, window
from piecework.training import BadInput

pytestmark = pytest.mark.timeout(90)


def test_in_a_verb_of_all_the_last_to_come_is_waited_for_and_then_messages_travel() -> None:
    waits = [
        Wait(0, 1, "sum_", (), 1.0, 3.5, 4, 3),
        Wait(1, 1, "sum_", (), 3.0, 3.5, 4, 3),
        Wait(2, 1, "sum_", (), 2.0, 3.4, 4, 3),
        Wait(0, 1, "sum_", (), 4.0, 4.5, 5, 3),  # rank 1 has not noted it, so nobody knows who was last
        Wait(2, 1, "sum_", (), 4.2, 5.0, 5, 3),
        Wait(1, 2, "mailbox", (2, 0), 6.0, 7.0),
    ]
    assert parts(waits) == [
        Part(0, 1, 1, 1.0, 3.0),
        Part(2, 1, 1, 2.0, 3.0),
        Part(0, 1, None, 3.0, 3.5),
        Part(1, 1, None, 3.0, 3.5),
        Part(2, 1, None, 3.0, 3.4),
        Part(0, 1, None, 4.0, 4.5),
        Part(2, 1, None, 4.2, 5.0),
        Part(1, 2, 2, 6.0, 7.0),
    ]
    first = shares(waits)[0]
    assert (first.rank, first.most_for, first.longest, first.longest_step) == (0, 1, 2.0, 1)
    assert (first.waiting, first.messages) == pytest.approx((2 / 6, 1.0 / 6))
    assert window(waits, steps=1) == (6.0, 7.0)


def test_notes_are_bounded_and_only_made_when_asked_for(tmp_path: Path) -> None:
    waits = Waits()
    waits.note("sum_", 1, (), 0.0, 1.0)
    waits.begin(10.0)
    for step in range(FIRST + LAST + 7):
        with waits.waiting("any", step):
            pass
    waits.pause()
    waits.note("sum_", 1, (), 0.0, 1.0)
    told = waits.read()
    assert told["left_out"] == 7
    assert [one[0] for one in told["waits"]] == [*range(FIRST), *range(FIRST + 7, FIRST + LAST + 7)]
    assert all(10.0 <= began <= ended < 20.0 for *_, began, ended, _, _ in told["waits"])
    assert [one[-2:] for one in told["waits"][:2]] == [[2, 1], [3, 1]]  # the first call was not noted, and counted
    write(tmp_path / "file", [told], more=True)
    write(tmp_path / "file", [told], more=True)
    assert len(read(tmp_path / "file").waits) == 2 * (FIRST + LAST)
    assert read(tmp_path / "file").left_out == 14


def test_ranks_keep_the_numbers_that_they_started_with() -> None:
    waits = Waits(2, range(4))
    waits.begin()
    waits.note("mailbox", 1, (1, 3), 0.0, 1.0)
    waits.meet(2, (0, 2, 3))
    waits.note("mailbox", 2, (1, 2), 0.0, 1.0)
    waits.note("sum_", 2, (), 0.0, 1.0)
    told = waits.read()
    assert told["rank"] == 2
    assert [one[2] for one in told["waits"]] == [[1, 3], [2, 3], []]
    assert told["waits"][-1][-2:] == [1, 3]


@pytest.mark.parametrize(
    "line",
    [
        '{"rank": 0}',
        "[]",
        '{"rank": 0, "step": 1, "verb": "x", "peers": [], "began": 2, "ended": 1}',
        '{"rank": 0, "step": 1e999, "verb": "x", "peers": [], "began": 1, "ended": 2}',
        '{"rank": 0, "step": 1, "verb": "x", "peers": [], "began": 1, "ended": 1e999}',
    ],
)
def test_a_damaged_file_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(line + "\n")
    with pytest.raises(BadInput, match="row 1"):
        read(tmp_path / "file")


METHODS: dict[str, Any] = {
    "gossip": Gossip(overlap=0, lr=0.01),
    "sgd": SGD(lr=0.01),
    "admm": ADMM(),
    "local": Local(blocks=3, coupling="chunk", reach=3, lr=0.01, probe_every=0),
}


def slow_rank(group: Group, method: str, folder: str, slow: int) -> int:
    """A run in which one rank takes longer; how many waits its group has kept."""
    set_ = data.load("wine")
    torch.set_num_threads(1)
    loss = losses.Squared() if method == "admm" else losses.Softmax()
    training = METHODS[method].bind(mlp(13, [6, 5], 3, seed=0), loss, group=group)
    step = training.step

    def slowed(batch: Any) -> Any:
        time.sleep(0.03 if group.rank == slow else 0.0)
        return step(batch)

    training.step = slowed
    piecework.fit(training, set_, loss=loss, group=group, steps=12, batch_size=8, evaluate_every=6, run=folder)
    return group.rank


@pytest.mark.parametrize("method", METHODS)
def test_all_are_seen_to_wait_for_the_rank_that_is_slow(method: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    threads(3, partial(slow_rank, method=method, folder=folder, slow=1), timeout=60)
    timeline = RunFolder(folder).waits()
    assert timeline is not None
    waits = timeline.waits
    assert waits
    assert {wait.step for wait in waits} <= set(range(1, 13))
    found = {share.rank: share for share in shares(waits)}
    others = [found[rank] for rank in (0, 2)]
    assert all(share.most_for == 1 and share.part_for > 0.5 for share in others), found
    assert all(share.waiting > 0.3 for share in others), found
    assert found[1].waiting < 0.3 if 1 in found else True


@pytest.mark.parametrize("method", ["gossip", "sgd"])
def test_real_processes_say_the_same_and_are_drawn(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    processes(3, partial(slow_rank, method=method, folder=str(folder), slow=2), timeout=80)
    assert main(["show", "--timeline", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "rank 2 (" in said
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    timeline = RunFolder(folder).waits()
    assert timeline is not None
    found = {share.rank: share for share in shares(timeline.waits)}
    assert found[0].most_for == 2
    assert found[1].most_for == 2
    assert main(["show", "--timeline", str(folder), "--between", "0.1", "0.2", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").exists()
    capsys.readouterr()
    assert main(["show", "--timeline", str(folder), "--between", "2", "1"]) == 2
    assert "the earlier first" in capsys.readouterr().err
    assert main(["show", str(folder), "--between", "1", "2"]) == 2
    assert "--between is for --timeline" in capsys.readouterr().err
