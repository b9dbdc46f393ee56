from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from piecework.checkpoint import RunFolder
from piecework.group import Group, Solo
from piecework.history import History
from piecework.testing import threads
from piecework.testing.check import classes, same, weights
from piecework.training import BadInput
from plain_sgd import PlainSGD, PlainTraining
from runs import SOFTMAX, Wandering, network, train


def _run(path: Path, **settings: Any) -> tuple[History, PlainTraining]:
    return train(run=path, **settings)


@pytest.mark.parametrize("recipe", [PlainSGD(lr=0.3), PlainSGD(lr=0.3, full=True), PlainSGD(lr=0.3, averaged=True)])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_stopped_anywhere_goes_on_as_if_never_stopped(tmp_path: Path, recipe: PlainSGD, stop: int) -> None:
    _, whole = _run(tmp_path / "whole", recipe=recipe, steps=7)
    _run(tmp_path / "parts", recipe=recipe, steps=stop)
    history, _ = _run(tmp_path / "parts", recipe=recipe, steps=7, resume=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert same(RunFolder(tmp_path / "parts").weights(), weights(whole.model))
    assert history["step"][-1] == 7
    assert history["step"] == sorted(set(history["step"]))
    lines = (tmp_path / "parts" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history.rows


def test_ranks_resume_to_the_same_bits_and_counters(tmp_path: Path) -> None:
    def work(group: Group, name: str, **settings: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        history, training = _run(tmp_path / name, group=group, evaluate_every=1, **settings)
        return weights(training.model), history.rows

    whole = threads(3, partial(work, name="whole", steps=7))
    threads(3, partial(work, name="parts", steps=3))
    parts = threads(3, partial(work, name="parts", steps=7, resume=True))
    for (own, rows), (other, others) in zip(whole, parts, strict=True):
        assert same(own, other)
        assert [row["bytes_sent"] for row in rows] == [row["bytes_sent"] for row in others]
        assert [row["train"] for row in rows] == [row["train"] for row in others]


def test_patience_and_the_best_weights_outlive_a_stop(tmp_path: Path) -> None:
    def training() -> PlainTraining:
        return Wandering(PlainSGD(full=True), network(), SOFTMAX, Solo())

    whole, one = train(training=training(), patience=3, steps=20)
    _run(tmp_path / "run", training=training(), patience=3, steps=3)
    history, two = _run(tmp_path / "run", training=training(), patience=3, steps=20, resume=True)
    assert history["step"] == whole["step"]
    assert history.stopped_by == whole.stopped_by == "patience"
    assert history.deployed_step == whole.deployed_step
    assert same(weights(one.model), weights(two.model))
    assert same(RunFolder(tmp_path / "run").weights(), weights(two.model))


def test_rows_made_after_the_last_checkpoint_are_made_again(tmp_path: Path) -> None:
    history, _ = _run(tmp_path / "run", steps=6, evaluate_every=1)
    with (tmp_path / "run" / "history.jsonl").open("a") as file:
        file.write(json.dumps({**history.rows[-1], "step": 7}) + '\n{"step": 8, "tor')
    again, _ = _run(tmp_path / "run", steps=8, evaluate_every=1, resume=True)
    assert again["step"] == list(range(1, 9))
    assert History.read(tmp_path / "run" / "history.jsonl").rows == again.rows


def test_a_run_that_is_done_already_is_left_as_it_is(tmp_path: Path) -> None:
    _, whole = _run(tmp_path / "run", steps=4)
    before = (tmp_path / "run" / "history.jsonl").read_text()
    history, training = _run(tmp_path / "run", steps=4, resume=True)
    assert history.stopped_by == "steps"
    assert same(weights(training.model), weights(whole.model))
    assert (tmp_path / "run" / "history.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 4}, "was trained with seed 3 and cannot go on with 4"),
        ({"batch_size": 5}, "was trained with batch_size 24 and cannot go on with 5"),
        ({"data": classes(57)}, "was trained with rows 64 and cannot go on with 34"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    _run(tmp_path / "run", steps=2)
    with pytest.raises(BadInput, match=sentence):
        _run(tmp_path / "run", steps=4, resume=True, **change)


def test_a_run_does_not_go_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    _run(tmp_path / "run", steps=2)

    def work(group: Group) -> str:
        with pytest.raises(BadInput) as refusal:
            _run(tmp_path / "run", steps=4, resume=True, group=group)
        return str(refusal.value)

    for said in threads(2, work):
        assert "was trained on 1 rank(s) and cannot go on with 2; start as many" in said


def test_an_existing_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    _run(tmp_path / "run", steps=2)
    with pytest.raises(BadInput, match="exists; give another folder"):
        _run(tmp_path / "run", steps=2)


def test_a_long_run_is_saved_now_and_then_and_at_its_end(tmp_path: Path) -> None:
    saved: list[int] = []

    def look(every: float) -> Callable[[Mapping[str, Any]], None]:
        run = RunFolder.create(tmp_path / str(every), {}, save_every=every)
        saved.clear()

        def note(_row: Mapping[str, Any]) -> None:
            if (run.path / "training.pt").exists():
                saved.append(run.load().fit["step"])

        train(steps=5, evaluate_every=1, run=run, on_row=note)
        assert run.load().fit["step"] == 5
        return note

    look(0.0)
    assert saved == [1, 2, 3, 4]
    look(1000.0)
    assert saved == []


def test_numbers_may_be_numpys(tmp_path: Path) -> None:
    settings = {name: np.int64(number) for name, number in {"seed": 3, "batch_size": 24, "evaluate_every": 2}.items()}
    _run(tmp_path / "run", steps=np.int64(3), **settings)
    history, training = _run(tmp_path / "run", steps=np.int64(4), resume=True, **settings)
    assert history["step"] == [2, 3, 4]
    assert same(weights(training.model), weights(train(steps=4)[1].model))
