"""What the command line refuses: in one sentence, with exit status 2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from command_line import fit, own_folder, refused
from piecework.cli import _status, main
from piecework.training import BadInput, CannotTrain, DidNotSolve, PeerLost

__all__ = ["own_folder"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("fti digits adam", "did you mean fit?"),
        ("fit digits adams", "did you mean adam?"),
        ("fit adams", "did you mean adam?"),
        ("fit digits", "which method?"),
        ("fit dgits adam", "did you mean 'digits'?"),
        ("fit digits --step 3 adam", "did you mean --steps?"),
        ("fit digits adam --learning-rate 3", "there is no option --learning-rate"),
        ("fit digits --lr 3 adam", "it goes behind it: fit DATA adam --lr"),
        ("fit digits adam --steps 3", "it goes before the method"),
        ("fit adam digits", "DATA goes before it"),
        ("fit digits --steps x adam", "--steps takes a whole number, and was given x"),
        ("fit digits --steps 1.5 adam", "--steps takes a whole number"),
        ("fit digits --steps", "--steps takes a whole number, and was given nothing"),
        ("fit digits --steps 0 adam", "--steps must be a whole number, at least 1"),
        ("fit digits --seconds nan adam", "--seconds must be positive"),
        ("fit digits --hidden -3 adam", "--hidden takes widths of at least 1"),
        ("fit digits --hidden x adam", "--hidden takes whole numbers"),
        ("fit digits --hidden 10000000 10000000 adam", "give smaller --hidden"),
        ("fit digits --activation gelu adam", "--activation takes one of relu"),
        ("fit digits --loss logistic adam", "the logistic loss is for two classes"),
        ("fit diabetes --loss softmax adam", "the softmax loss is for classes"),
        ("fit digits --dtype float16 adam", "--dtype takes one of float32, float64"),
        ("fit digits --device tpu9 adam", "is no device"),
        ("fit digits --threads 0 adam", "--threads must be at least 1"),
        ("fit digits --seed -1 adam", "--seed must be a whole number from 0"),
        ("fit digits --batch-size 0 adam", "--batch-size must be at least 1"),
        ("fit digits --batch-size 32 lbfgs", "leave it out"),
        ("fit digits --batch-size 32 gauss-newton", "or give --sample-rows behind the method"),
        ("fit digits --patience 3 adam", "keep a part of the training rows"),
        ("fit digits --stop-at 0.9 lbfgs", "keep a part of the training rows"),
        ("fit digits --validation 1 adam", "--validation is a fraction"),
        ("fit digits --rows 0 adam", "--rows must be a whole number"),
        ("fit digits adam --betas 0.9", "--betas takes 2 numbers, and was given 0.9"),
        ("fit digits adam --lr -1", "lr must be above 0"),
        ("fit digits --out /dev/null/run lbfgs", "/dev/null/run"),
        ("resume nowhere", "there is no run folder nowhere"),
        ("resume", "resume takes one run folder"),
        ("show nowhere", "there is no run folder nowhere"),
        ("show", "at least one run folder"),
        ("predict nowhere", "predict takes a run folder and a file"),
        ("predict nowhere rows.csv", "there is no run folder nowhere"),
        ("methods --all", "there is no option --all"),
        ("data digits", "takes nothing more"),
    ],
)
def test_a_mistake_is_answered_by_one_sentence(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refused(capsys, *words.split())


def test_resume_refuses_what_is_past_ended_or_changed(capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).normal(size=(60, 3))
    np.savez("rows.npz", x=x, y=(x[:, 0] > 0).astype(int))
    assert main(["fit", "rows.npz", "--steps", "4", "--out", "run", "lbfgs"]) == 0
    assert "has 4 steps already" in refused(capsys, "resume", "run", "--steps", 3)
    assert "seconds already" in refused(capsys, "resume", "run", "--seconds", "1e-9")
    assert "give --steps N" in refused(capsys, "resume", "run")
    assert "leave out --model" in refused(capsys, "resume", "run", "--steps", 5, "--model", "a:b")
    np.savez("rows.npz", x=x + 1, y=(x[:, 0] > 0).astype(int))
    assert "the data has changed" in refused(capsys, "resume", "run", "--steps", 5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "sdg"),
        ("method", 3),
        ("settings", {"lrr": 3}),
        ("settings", {"lr": "high"}),
        ("settings", None),
        ("data", {"name": "digits"}),
        ("data", []),
        ("model", {"kind": "mlp", "hidden": [-1], "dtype": "float32"}),
        ("model", {"kind": "mlp", "hidden": "5", "dtype": "float32"}),
        ("loss", "softmaxx"),
        ("limits", {"steps": "many"}),
        ("seed", 1.5),
        ("threads", None),
        ("device", "\0"),
        ("ranks", "one"),
        ("format", 99),
    ],
)
def test_a_damaged_recipe_is_refused_by_name(key: str, value: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--steps", 1, "--out", "run", "adam") == 0
    recipe = json.loads(Path("run/recipe.json").read_text())
    Path("run/recipe.json").write_text(json.dumps({**recipe, key: value}))
    assert "run" in refused(capsys, "resume", "run", "--steps", 2)


def test_a_lost_peer_and_a_failed_solve_end_with_3_and_a_defect_with_its_traceback() -> None:
    lost = PeerLost(rank=0, peer=1, verb="sum_", timeout=3.0)
    assert [_status(error) for error in (lost, DidNotSolve("singular"))] == [3, 3]
    assert [_status(error) for error in (BadInput("no"), CannotTrain("no"))] == [2, 2]
    assert _status(KeyError("ours")) is None
