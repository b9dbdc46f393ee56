"""`piecework simulate`: cells, table, figure, and numbers that mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from piecework.cli import main
from piecework.clock.scenario import PROGRAMS

pytestmark = pytest.mark.timeout(60)

SMALL = ["--ranks", "2", "4", "--mbit", "800", "--model-mb", "10", "--step-ms", "100", "--steps", "12"]


def test_the_cells_are_those_of_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SMALL, "--latency-ms", "0", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)
    assert len(cells) == 2 * len(PROGRAMS)
    found = {(cell["method"], cell["ranks"]): cell["seconds_a_step"] for cell in cells}
    assert found["no messages", 2] == pytest.approx(0.1)
    assert found["averaged gradients, afterwards", 2] == pytest.approx(0.2)  # 10 MB over 100 MB/s
    assert found["averaged gradients, afterwards", 4] == pytest.approx(0.25)
    assert found["gossip, overlap 0", 4] == pytest.approx(0.2, rel=0.02)
    assert found["gossip, overlap 1", 4] == pytest.approx(0.1, rel=0.02)


def test_it_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "here.png"
    assert main(["simulate", *SMALL, "--stalls", "0.2", "--slow", "2", "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in PROGRAMS)
    assert "slow for good sets everybody's pace" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "0"], "ranks must be between 1 and 1024, got 0"),
        (["--mbit", "-1"], "--mbit must be above 0, got -1"),
        (["--stalls", "2"], "stalls is a probability, got 2"),
        (["--step-ms", "0"], "step_s must be above 0, got 0"),
        (["digits"], "simulate takes options alone, and was given digits"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *words]) == 2
    assert said in capsys.readouterr().err
