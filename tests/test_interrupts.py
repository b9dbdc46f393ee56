from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from piecework.checkpoint import RunFolder
from piecework.group import Group, Solo
from piecework.testing import processes, threads
from piecework.testing.check import same, weights
from piecework.training import Batch, Metrics, PeerLost
from plain_sgd import PlainSGD, PlainTraining
from runs import SOFTMAX, network, train


class _Interrupted(PlainTraining):
    """Somebody presses Ctrl-C in the middle of step 3."""

    def step(self, batch: Batch) -> Metrics:
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(batch)


def test_ctrl_c_ends_the_step_saves_and_is_raised_again(tmp_path: Path) -> None:
    whole, expected = train(steps=9)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(training=_Interrupted(PlainSGD(lr=0.3), network(), SOFTMAX, Solo()), steps=9, run=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler
    run = RunFolder(tmp_path / "run")
    assert run.summary()["stopped_by"] == "interrupted"
    assert run.load().fit["step"] == 3
    history, resumed = train(steps=9, run=tmp_path / "run", resume=True)
    assert same(weights(resumed.model), weights(expected.model))
    assert history.rows[-1]["test"] == whole.rows[-1]["test"]


def test_ctrl_c_without_a_run_folder_is_raised_at_once() -> None:
    training = _Interrupted(PlainSGD(lr=0.3), network(), SOFTMAX, Solo())
    with pytest.raises(KeyboardInterrupt):
        train(training=training, steps=9)
    assert training.steps == 2


def test_ctrl_c_while_a_row_is_shown_saves_too(tmp_path: Path) -> None:
    def show(row: Mapping[str, Any]) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(steps=9, run=tmp_path / "run", on_row=show)
    assert RunFolder(tmp_path / "run").load().fit["step"] == 6


def _interrupted_on_rank_1(group: Group, folder: str) -> tuple[int, list[int], bool]:
    """Steps taken until the interrupt; rows after it was resumed; whether that gave the weights of an unbroken run."""
    kind = _Interrupted if group.rank == 1 else PlainTraining
    broken = kind(PlainSGD(lr=0.3), network(), SOFTMAX, group)
    with pytest.raises(KeyboardInterrupt):
        train(training=broken, group=group, steps=9, evaluate_every=4, run=folder)
    assert json.loads((Path(folder) / "summary.json").read_text())["stopped_by"] == "interrupted"
    history, resumed = train(group=group, steps=9, evaluate_every=4, run=folder, resume=True)
    _, whole = train(group=group, steps=9)
    return broken.steps, history["step"], same(weights(resumed.model), weights(whole.model))


def test_ctrl_c_on_one_rank_stops_all_at_the_next_evaluation_and_all_resume(tmp_path: Path) -> None:
    ends = processes(2, partial(_interrupted_on_rank_1, folder=str(tmp_path / "run")))
    assert ends == [(4, [4, 8, 9], True)] * 2
    assert len(RunFolder(tmp_path / "run").load().ranks) == 2


class _Losing(PlainTraining):
    def step(self, batch: Batch) -> Metrics:
        if self.steps == 4:
            raise PeerLost(rank=0, peer=1, verb="sum_", timeout=3.0)
        return super().step(batch)


def test_a_lost_peer_is_told_with_the_step() -> None:
    with pytest.raises(PeerLost, match="rank 0 lost rank 1 in sum_ at step 5") as loss:
        train(training=_Losing(PlainSGD(), network(), SOFTMAX, Solo()), steps=9)
    assert loss.value.step == 5


def test_the_group_is_told_the_step() -> None:
    def work(group: Group) -> int | None:
        train(group=group, steps=5)
        return group.step  # type: ignore[attr-defined, no-any-return]

    assert threads(2, work) == [5, 5]
