"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from piecework.progress import Progress, figures, part_done


def row(step: int, loss: float | None = 0.5) -> dict[str, Any]:
    scores = {"loss": loss, "score": 0.75}
    return {"step": step, "epoch": step / 2, "seconds": 0.1 * step, "train": scores, "validation": None, "test": scores}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_are_plain_lines_the_last_row_included() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        on_row = progress.run("adam", steps=9)
        for step in range(1, 10):
            on_row(row(step))
        progress.run("cg", steps=9)(row(3))
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["adam", "step 1/9"], ["adam", "step 9/9"], ["cg", "step 3/9"]]
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_a_line_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    with Progress(stream=stream) as progress:
        on_row = progress.run("adam [not markup]", seconds=2.0)
        on_row(row(7))
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "adam [not markup]" in said
    assert "step 7  0.7 s  loss 0.5  train 0.7500  test 0.7500" in said


def test_a_quiet_run_says_nothing() -> None:
    stream = Terminal()
    with Progress(quiet=True, stream=stream) as progress:
        progress.run("adam")(row(1))
    assert stream.getvalue() == ""


def test_a_loss_that_is_not_finite_is_said() -> None:
    assert "loss not finite" in figures(row(3, loss=None))
    assert "loss not finite" in figures(row(3, loss=None), brief=True)


def test_progress_is_that_towards_the_nearest_limit() -> None:
    assert part_done(row(4), {"step": 10, "epoch": None, "seconds": None}) == pytest.approx(0.4)
    assert part_done(row(4), {"step": 10, "epoch": 3, "seconds": 4.0}) == pytest.approx(2 / 3)
    assert part_done(row(40), {"step": 10, "epoch": None, "seconds": None}) == 1.0
    assert part_done(row(4), {"step": None, "epoch": None, "seconds": None}) == 0.0
