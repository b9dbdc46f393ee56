"""Text as windows of characters."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from piecework import Adam, BadInput, data, fit, load, losses
from piecework.cli import main
from piecework.data import text

WORDS = "".join(chr(97 + (number * number) % 7) for number in range(3011))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text").mkdir()
    with gzip.open(tmp_path / "text" / "tinyshakespeare.txt.gz", "wb") as file:
        file.write(WORDS.encode())
    monkeypatch.setenv("PIECEWORK_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_character_is_to_tell_the_next_and_the_end_of_the_text_is_held_out(folder: Path) -> None:
    found = data.load("shakespeare")
    assert found.sequences
    assert found.test is not None
    assert (found.task, found.num_features, found.num_outputs) == ("multiclass", 128, len(set(WORDS)))
    for part, start in ((found.train, 0), (found.test, 3011 - 301)):
        for row in range(len(part)):
            begin = start + 128 * row
            assert "".join(found.classes[code] for code in part.x[row]) == WORDS[begin : begin + 128]
            assert "".join(found.classes[code] for code in part.y[row]) == WORDS[begin + 1 : begin + 129]
    assert len(found.train) == (3011 - 301 - 1) // 128


def test_validation_windows_are_some_of_the_training_windows_by_seed(folder: Path) -> None:
    whole, one, other = (
        data.load("shakespeare", validation=part, seed=seed) for part, seed in ((0, 0), (0.2, 1), (0.2, 2))
    )
    assert one.validation is not None
    assert other.validation is not None
    assert len(one.train) + len(one.validation) == len(whole.train)
    assert not torch.equal(one.validation.x, other.validation.x)
    kept = {tuple(row) for row in whole.train.x.tolist()}
    assert all(tuple(row) in kept for row in one.validation.x.tolist())


def test_text_that_makes_no_windows_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="too short"):
        text.windows("note", "a short note", 128)
    (folder / "text" / "tinyshakespeare.txt.gz").write_bytes(b"\x1f\x8b nothing")
    with pytest.raises(BadInput, match="no whole text"):
        data.load("shakespeare")
    (folder / "text" / "tinyshakespeare.txt").write_text(WORDS)
    with pytest.raises(BadInput, match="leave it out"):
        data.load("shakespeare", task="regression")


def test_the_command_line_trains_and_resumes_a_transformer_and_refuses_other_methods(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["fit", "shakespeare", "--hidden", "16", "16", "--batch-size", "4", "--steps", "2"]
    assert main([*short, "--out", "run", "local"]) == 0
    assert main(["resume", "run", "--steps", "4"]) == 0
    network = load("run")
    assert network(data.load("shakespeare").train.x[:2]).shape == (2, 128, len(set(WORDS)))
    assert (
        main(["compare", "shakespeare", "--hidden", "16", "--steps", "1", "--methods", "adam", "local:blocks=1"]) == 0
    )
    capsys.readouterr()
    for words, said in (
        ([*short, "admm"], "admm|ADMM"),
        ([*short[:5], "--steps", "1", "gauss-newton"], "takes tokens"),
        ([*short, "deepfacto"], "NMF layer"),
        (["fit", "shakespeare", "--hidden", "16", "8", "local"], "one width"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert any(part in error for part in said.split("|")), error


def test_fit_reports_the_mean_over_characters(folder: Path) -> None:
    from piecework.models import transformer

    found = data.load("shakespeare")
    model = transformer(found.num_outputs, width=8, depth=1, heads=2, context=128)
    loss: Any = losses.Softmax()
    history = fit(Adam(lr=0.01).bind(model, loss), found, loss=loss, steps=3, batch_size=8)
    with torch.no_grad():
        wanted = float(loss(model(found.train.x), found.train.y))
    assert history.rows[-1]["train"]["loss"] == pytest.approx(wanted, rel=1e-5)
