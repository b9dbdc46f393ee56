from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from piecework.history import History, figure, improves, memory
from piecework.training import BadInput

KEYS = {
    "method": "admm",
    "data": "digits",
    "task": "multiclass",
    "rows": 1437,
    "ranks": 1,
    "score_name": "accuracy",
    "parameters": 2410,
}


def _row(step: int, train: float, validation: float | None, test: float | None, **figures: Any) -> dict[str, Any]:
    def part(score: float | None) -> dict[str, float] | None:
        return None if score is None else {"loss": 1 - score, "score": score}

    return {
        "step": step,
        "epoch": step / 3,
        "seconds": step / 7,
        "samples": 24 * step,
        "train": part(train),
        "validation": part(validation),
        "test": part(test),
        "bytes_sent": 8 * step,
        "rounds": step,
        **figures,
    }


def _history(path: Path | None = None) -> History:
    history = History(about={**KEYS, "loss": "squared", "seed": 3, "note": ""}, path=path)
    for row in (_row(1, 0.5, 0.4, 0.45), _row(2, 0.7, 0.6, 0.65, trials=2), _row(3, 0.9, 0.6, 0.5)):
        history.append(row)
    return history


def test_the_summary_has_the_keys_of_a_run_folder_and_json_can_write_it() -> None:
    history = _history()
    history.stopped_by = "steps"
    summary = json.loads(json.dumps(history.summary(), allow_nan=False))
    assert {key: summary[key] for key in KEYS} == KEYS
    assert summary["steps"] == 3
    assert summary["seconds"] == 3 / 7
    assert summary["stopped_by"] == "steps"
    assert summary["train"] == {"loss": 1 - 0.9, "score": 0.9}
    assert summary["best_test_score"] == 0.65
    assert (summary["bytes_sent"], summary["rounds"]) == (24, 3)
    assert summary["best_step"] == 2
    assert summary["peak_memory_mb"] > 10


def test_the_summary_shows_the_deployed_network_and_the_cost_of_the_whole_run() -> None:
    history = _history()
    history.deployed_step = 2
    summary = history.summary()
    assert (summary["deployed_step"], summary["steps"]) == (2, 3)
    assert summary["test"]["score"] == 0.65
    assert summary["seconds"] == 3 / 7


def test_a_history_without_rows_has_a_summary_too() -> None:
    summary = History().summary()
    assert (summary["steps"], summary["train"], summary["best_test_score"]) == (0, None, None)


def test_columns_are_read_by_name() -> None:
    history = _history()
    assert history["step"] == [1, 2, 3]
    assert history["validation", "score"] == [0.4, 0.6, 0.6]
    assert history["trials"] == [None, 2, None]
    assert len(history) == 3


def test_the_best_row_has_the_best_validation_score_and_then_the_lower_loss() -> None:
    history = _history()
    assert history.best is history.rows[1]
    history.rows[2]["validation"]["loss"] = 0.01
    assert history.best is history.rows[2]
    assert History([_row(1, 0.5, None, 0.9)]).best is None


def test_a_figure_that_is_not_finite_never_improves() -> None:
    good, none = {"score": 0.5, "loss": 1.0}, {"score": None, "loss": None}
    assert improves(good, none)
    assert not improves(none, good)
    assert not improves(none, none)
    assert not improves({"score": 0.5, "loss": None}, good)
    assert improves(good, {"score": 0.5, "loss": None})


def test_rows_are_on_the_disk_as_they_come_and_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = _history(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == history.rows
    summary = history.summary()
    again = History.read(path, summary)
    assert again.rows == history.rows
    assert again.about["method"] == "admm"


def test_a_last_line_that_a_killed_process_left_is_not_a_row(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    _history(path)
    with path.open("a") as file:
        file.write('{"step": 4, "sec')
    assert History.read(path)["step"] == [1, 2, 3]


def test_rows_after_a_step_are_cut_on_the_disk_too(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = _history(path)
    history.cut(2)
    assert history["step"] == [1, 2]
    assert History.read(path)["step"] == [1, 2]
    history.append(_row(3, 0.1, 0.1, 0.1))
    assert History.read(path).rows == history.rows


GOOD = json.dumps(_row(1, 0.5, 0.4, 0.45))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("garbage", "is not readable JSON"),
        ("[1, 2]", "it is not a JSON object"),
        (GOOD.replace('"step": 1', '"step": NaN'), "NaN is not JSON"),
        (GOOD.replace('"step": 1', '"step": 1e999'), "it has no step"),
        (GOOD.replace('"step": 1', '"step": -1'), "it has no step"),
        (GOOD.replace('"step": 1', '"step": true'), "it has no step"),
        (GOOD.replace('"train"', '"trains"'), "its train part has no loss and score"),
        (GOOD.replace('"score": 0.5', '"score": "0.5"'), "its train part has no loss and score"),
        ("[" * 100_000, "is not readable JSON"),
        ("1" * 5000, "is not readable JSON"),
        ("\0", "is not readable JSON"),
    ],
)
def test_a_line_that_is_no_row_is_refused_with_its_file(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(GOOD + "\n" + line + "\n")
    with pytest.raises(BadInput, match=sentence) as refusal:
        History.read(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_steps_that_go_backwards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(_row(step, 0.5, None, None)) + "\n" for step in (2, 1)))
    with pytest.raises(BadInput, match="line 2, is not a row of a run: its step goes backwards"):
        History.read(path)


def test_a_history_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(GOOD + "\n")
    link = tmp_path / "history.jsonl"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="is not an ordinary file"):
        History.read(link)
    with pytest.raises(BadInput, match="cannot be written"):
        History(path=link).append(_row(1, 0.5, None, None))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells mapped files apart")
def test_the_peak_of_memory_is_kept_and_mapped_files_are_told_apart(tmp_path: Path) -> None:
    code = (
        "import mmap, sys; from piecework.history import memory\n"
        "a = memory(); b = bytearray(100_000_000); b[::4096] = b[::4096]; del b; c = memory()\n"
        "f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); sum(m[::4096]); d = memory()\n"
        "print(c[0] - a[0], d[1] - c[1])"
    )
    file = tmp_path / "mapped"
    with file.open("wb") as made:
        made.truncate(50_000_000)
    out = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60, check=True
    )
    grown, mapped = map(int, out.stdout.split())
    assert 90 <= grown <= 140
    assert 45 <= mapped <= 60
    assert memory()[0] > 0


def _picture(path: Path) -> tuple[int, int]:
    from matplotlib.image import imread

    height, width, _ = imread(path).shape
    return width, height


def test_the_figure_is_a_picture_of_any_number_of_runs_and_seeds(tmp_path: Path) -> None:
    seeds = []
    for seed in range(3):
        rows = [_row(step, 0.5, None, 1 - 1 / (step + seed + 1)) for step in range(1, 6 + seed)]
        seeds.append(History(rows, about=KEYS))
    figure(
        {"admm": seeds, "adam": _history()},
        tmp_path / "two.png",
        floors={"majority": 0.1, "logistic": 0.4},
        title="digits",
    )
    assert _picture(tmp_path / "two.png")[0] > 1000
    figure({"one": _history()}, tmp_path / "one.png")
    many = {f"method number {number}": _history() for number in range(12)}
    figure(many, tmp_path / "many.png")
    figure({"single row": History([_row(1, 0.5, None, 0.5)])}, tmp_path / "single.png")


def test_the_figure_leaves_pyplot_and_its_backend_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from piecework.history import History, figure\n"
        "assert 'matplotlib' not in sys.modules\n"
        "part = {'loss': 0.5, 'score': 0.5}\n"
        "row = {'step': 1, 'seconds': 1.0, 'train': part, 'validation': None, 'test': part}\n"
        "figure({'a': History([row])}, sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], timeout=60, check=True)


def test_a_figure_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no run has a row with a test score to draw"):
        figure({"adam": History([_row(1, 0.5, None, None)])}, tmp_path / "nothing.png")
