"""What the tests of the command line share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from piecework.cli import main

SMALL = ["--hidden", "5", "--rows", "203", "--test-rows", "71"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are left in a folder that goes away; modules there can be imported only during the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


def fit(*words: object) -> int:
    """The exit status of `piecework fit` on a few digits."""
    return main(["fit", "digits", *SMALL, *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The sentence that a command line is refused with."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("piecework: error: ")
    return said[0]
