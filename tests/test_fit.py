from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piecework.checkpoint import RunFolder
from piecework.group import Group, Solo
from piecework.history import History
from piecework.limits import Limits, limits
from piecework.testing import threads
from piecework.testing.check import classes, same, weights
from piecework.training import BadInput, Batch, Metrics
from plain_sgd import PlainSGD, PlainTraining
from runs import SOFTMAX, Wandering, network, train


def test_a_row_says_where_the_run_is_and_what_the_deployed_network_is_worth() -> None:
    data = classes()
    history, training = train(data=data, epochs=2)
    assert [row["step"] for row in history.rows] == [3, 6]
    row = history.rows[-1]
    assert (row["epoch"], row["samples"], row["bytes_sent"], row["rounds"]) == (2, 128, 0, 0)
    assert history.stopped_by == "epochs"
    for name in ("train", "validation", "test"):
        part = getattr(data, name)
        with torch.no_grad():
            z = training.model(part.x)
        assert row[name]["loss"] == pytest.approx(float(SOFTMAX(z, part.y)), rel=1e-12)
        assert row[name]["score"] == float((z.argmax(1) == part.y).double().mean())
    assert history.about["parameters"] == sum(one.numel() for one in training.model.parameters())
    json.dumps(history.rows, allow_nan=False)


def test_a_part_that_is_missing_is_none() -> None:
    history, _ = train(data=replace(classes(), validation=None, test=None), steps=1)
    assert history.rows[0]["validation"] is None
    assert history.rows[0]["test"] is None
    assert history.summary()["best_test_score"] is None


class _Reporting(PlainTraining):
    """Reports figures that are known beforehand; rank 1 has no loss, as the first of several blocks would."""

    def step(self, batch: Batch) -> Metrics:
        super().step(batch)
        metrics = {"step_number": torch.tensor(self.steps), "own": torch.tensor(float(self.group.rank))}
        loss = {"loss": torch.tensor(float(len(batch)))} if self.group.rank != 1 else {}
        return {**metrics, **loss}


def test_step_figures_are_means_since_the_last_row_and_loss_is_weighted_by_rows() -> None:
    history, _ = train(training=_Reporting(PlainSGD(), network(), SOFTMAX, Solo()), epochs=2)
    assert history["step_number"] == [2.0, 5.0]
    assert history["loss"] == [pytest.approx((24 * 24 + 24 * 24 + 16 * 16) / 64)] * 2


def test_step_figures_of_a_full_batch_method_are_those_of_the_last_step() -> None:
    training = _Reporting(PlainSGD(full=True), network(), SOFTMAX, Solo())
    history, _ = train(training=training, steps=6, evaluate_every=3)
    assert history["step_number"] == [3.0, 6.0]


def test_ranks_are_merged_and_may_report_different_figures() -> None:
    def work(group: Group) -> History:
        return train(training=_Reporting(PlainSGD(full=True), network(), SOFTMAX, group), steps=1, group=group)[0]

    for history in threads(3, work):
        assert history["own"] == [1.0]
        # The shares of 64 rows are 21, 21, 22; rank 1 says nothing.
        assert history["loss"] == [pytest.approx((21 * 21 + 22 * 22) / 43)]


class _Clashing(PlainTraining):
    def step(self, batch: Batch) -> Metrics:
        return {**super().step(batch), "seconds": torch.tensor(0.0)}


def test_a_figure_may_not_take_the_name_of_a_rows_own() -> None:
    with pytest.raises(ValueError, match="the step reports seconds, which rows have already"):
        train(training=_Clashing(PlainSGD(), network(), SOFTMAX, Solo()), steps=1)


def test_on_row_is_called_on_rank_0_and_rows_are_equal_on_all() -> None:
    def work(group: Group) -> tuple[list[int], list[dict[str, Any]]]:
        seen: list[int] = []
        return seen, train(group=group, steps=4, evaluate_every=2, on_row=lambda row: seen.append(row["step"]))[0].rows

    (first, rows), *others = threads(3, work)
    assert first == [2, 4]
    for seen, theirs in others:
        assert seen == []
        assert theirs == rows


def test_the_messages_of_evaluation_are_not_counted() -> None:
    def work(group: Group, evaluate_every: int) -> tuple[int, int]:
        row = train(group=group, steps=6, evaluate_every=evaluate_every)[0].rows[-1]
        return row["bytes_sent"], row["rounds"]

    numbers = sum(one.numel() for one in network().parameters())
    for every in (1, 6):
        # A step sums the gradient and the number of rows, float64 both.
        assert threads(2, partial(work, evaluate_every=every)) == [(6 * 8 * (numbers + 1), 6 * 2)] * 2


# What stops a run


def test_steps_are_the_limit_of_a_run() -> None:
    history, _ = train(steps=5, evaluate_every=2)
    assert history["step"] == [2, 4, 5]
    assert history.stopped_by == "steps"


def test_the_smaller_of_steps_and_epochs_counts() -> None:
    assert train(steps=4, epochs=2)[0].stopped_by == "steps"
    assert train(steps=7, epochs=2)[0].stopped_by == "epochs"


class _Slow(PlainTraining):
    """Takes its time, and more of it in the first step."""

    def step(self, batch: Batch) -> Metrics:
        import time

        time.sleep(0.02 if self.steps == 0 else 0.001)
        return super().step(batch)


def test_seconds_are_the_limit_of_a_run_and_its_rows_come_often_enough() -> None:
    history, _ = train(training=_Slow(PlainSGD(), network(), SOFTMAX, Solo()), seconds=0.4, batch_size=1)
    assert history.stopped_by == "seconds"
    assert history["seconds"][-1] >= 0.4
    assert history["seconds"][-2] < 0.4
    assert len(history) >= 5


def _bounds(**settings: Any) -> Limits:
    given = {"steps": None, "epochs": None, "seconds": 100.0, "stop_at": None, "patience": None, "evaluate_every": None}
    return limits(classes(), **{**given, "steps_per_epoch": 10, "full": False, "part": 0.05, **settings})


def test_with_a_limit_in_seconds_rows_are_dense_at_first_and_then_neither_rare_nor_many() -> None:
    full, mini, asked = _bounds(full=True), _bounds(), _bounds(evaluate_every=3)
    assert [full.spacing(seconds) for seconds in (0.0, 1.0, 99.0)] == [0.0, 0.05, 0.25]
    assert full.due(1, 0.0, 0.0)
    assert not full.due(7, 50.0, 0.2)
    assert full.due(7, 50.0, 0.25)
    assert not mini.due(7, 50.0, 4.0)
    assert mini.due(10, 50.0, 4.0)
    assert mini.due(7, 50.0, 5.0)
    assert asked.due(9, 50.0, 0.0)
    assert not asked.due(10, 50.0, 30.0)
    assert all(bounds.due(7, 99.0, 1.0) for bounds in (full, mini, asked))


def test_fast_steps_do_not_make_a_row_each_on_several_ranks() -> None:
    def work(group: Group) -> tuple[list[int], str | None]:
        history, _ = train(PlainSGD(full=True), seconds=0.5, group=group)
        return history["step"], history.stopped_by

    (steps, ended), other = threads(2, work)
    assert other == (steps, ended)
    assert ended == "seconds"
    assert steps[0] == 1


@pytest.mark.parametrize("every", [None, 100_000])
def test_ranks_agree_on_the_clock_without_a_message_a_step(every: int | None) -> None:
    def work(group: Group) -> History:
        training = _Slow(PlainSGD(), network(), SOFTMAX, group)
        return train(training=training, group=group, seconds=0.4, batch_size=1, evaluate_every=every)[0]

    histories = threads(2, work)
    first = histories[0]
    assert all(history.rows == first.rows and history.stopped_by == "seconds" for history in histories)
    assert first["seconds"][-1] >= 0.4
    assert first["seconds"][-2] < 0.4
    assert 3 <= len(first) < first["step"][-1]


def test_evaluation_takes_no_training_time() -> None:
    class Waiting(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            import time

            time.sleep(0.0 if torch.is_grad_enabled() else 0.05)
            return z

    model = nn.Sequential(*network(), Waiting())
    history, _ = train(training=PlainSGD().bind(model, SOFTMAX), steps=3, evaluate_every=1)
    assert history["seconds"][-1] < 3 * 3 * 0.05


def test_a_validation_score_that_is_reached_stops_the_run() -> None:
    history, _ = train(steps=300, stop_at=0.6)
    assert history.stopped_by == "stop_at"
    assert history["validation", "score"][-1] >= 0.6 > max(history["validation", "score"][:-1])


def test_patience_ends_the_run_and_deploys_the_best_weights_on_validation(tmp_path: Path) -> None:
    training = Wandering(PlainSGD(full=True), network(), SOFTMAX, Solo())
    history, _ = train(training=training, patience=3, run=tmp_path / "run")
    assert history.stopped_by == "patience"
    best = history.best
    assert best is not None
    assert history["step"][-1] == best["step"] + 3
    assert (history.deployed_step, history.summary()["deployed_step"]) == (best["step"], best["step"])
    assert history.summary()["validation"] == best["validation"]
    with torch.no_grad():
        z = training.model(classes().validation.x)  # type: ignore[union-attr]
    assert float(SOFTMAX(z, classes().validation.y)) == pytest.approx(best["validation"]["loss"], rel=1e-12)  # type: ignore[union-attr]
    # The folder's network is the best one, and its state goes on from the last one.
    found = RunFolder(tmp_path / "run").load()
    assert same(found.deployed, weights(training.model))
    factor = Wandering.plan[history["step"][-1] - 1]
    assert torch.equal(found.trajectory["0.weight"], factor * training.good[0])


def test_a_loss_that_is_not_finite_ends_the_run_and_json_can_write_it(tmp_path: Path) -> None:
    history, _ = train(PlainSGD(lr=math.inf, full=True), steps=50, run=tmp_path / "run")
    assert history.stopped_by == "diverged"
    assert len(history) < 50
    assert history.rows[-1]["train"]["loss"] is None
    assert 0 <= history.rows[-1]["train"]["score"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows == history.rows
    assert RunFolder(tmp_path / "run").summary()["stopped_by"] == "diverged"


def test_on_row_may_end_the_run() -> None:
    history, _ = train(steps=50, evaluate_every=1, on_row=lambda row: row["step"] == 3)
    assert (history.stopped_by, len(history)) == ("on_row", 3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "nothing ends this run; give steps, epochs, seconds or patience"),
        ({"stop_at": 0.9}, "nothing ends this run"),
        ({"steps": 0}, "steps must be a whole number, at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"epochs": -1}, "epochs must be a whole number"),
        ({"seconds": 0}, "seconds must be positive"),
        ({"seconds": math.nan}, "seconds must be positive"),
        ({"steps": 1, "stop_at": math.inf}, "stop_at must be a score"),
        ({"steps": 1, "patience": 0}, "patience must be a whole number"),
        ({"steps": 1, "evaluate_every": 0}, "evaluate_every must be a whole number"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be at least 1 row"),
        ({"steps": 1, "resume": True}, "resume=True needs run="),
    ],
)
def test_settings_without_sense_are_refused_in_a_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        train(**settings)


@pytest.mark.parametrize("settings", [{"stop_at": 0.9}, {"patience": 3}])
def test_what_looks_at_validation_is_refused_without_it(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="looks at validation rows, and there are none"):
        train(data=replace(classes(), validation=None), steps=3, **settings)


def test_data_without_sense_is_refused_in_a_sentence() -> None:
    data = classes()
    short = replace(data, test=Batch(data.train.x, data.train.y[:-1]))
    with pytest.raises(BadInput, match="the test part has 64 rows and 63 targets"):
        train(data=short, steps=1)
    empty = replace(data, validation=Batch(data.train.x[:0], data.train.y[:0]))
    with pytest.raises(BadInput, match="the validation part has 0 rows"):
        train(data=empty, steps=1)
    flat = replace(data, task="regression", train=Batch(data.train.x, data.train.x[:, 0]))
    with pytest.raises(
        BadInput, match=r"the train targets of a regression must have shape \(rows, outputs\), got \(64,\)"
    ):
        train(data=flat, steps=1)


def test_words_about_a_step_come_into_its_row() -> None:
    training = PlainSGD(lr=0.3).bind(network(), SOFTMAX)
    training.words = {"solver": "by hand"}  # type: ignore[attr-defined]
    history, _ = train(training=training, steps=2)
    assert [row["solver"] for row in history.rows] == ["by hand"] * len(history.rows)


def test_words_do_not_replace_a_rows_own_figures() -> None:
    training = PlainSGD(lr=0.3).bind(network(), SOFTMAX)
    training.words = {"seconds": "many"}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="seconds, which rows have already"):
        train(training=training, steps=2)
