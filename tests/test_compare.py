"""`piecework compare`: what is understood, what is left behind, and that the test rows choose nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import SMALL, own_folder, refused
from piecework.cli import main, specs
from piecework.methods import METHODS

__all__ = ["own_folder"]


def compare(*words: object) -> list[dict[str, Any]]:
    """What compare.json holds after a comparison on a few digits."""
    assert main(["compare", "digits", *SMALL, "--out", "out", *map(str, words)]) == 0
    found: list[dict[str, Any]] = json.loads(Path("out/compare.json").read_text())
    return found


def test_settings_follow_a_colon() -> None:
    plain, rich, pair = specs.entries(["lbfgs", "adam:lr=3e-3,weight-decay=1e-4", "adam:betas=0.8,0.9"])
    assert plain.method == METHODS["lbfgs"]()
    assert rich.method == METHODS["adam"](lr=3e-3, weight_decay=1e-4)
    assert pair.method == METHODS["adam"](betas=(0.8, 0.9))
    assert specs.entries(["sgd:nesterov=true"])[0].method == METHODS["sgd"](nesterov=True)


def test_a_comparison_leaves_runs_a_table_and_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare("--steps", 3, "--methods", "lbfgs", "adam", "adam:lr=3e-2")
    said = capsys.readouterr().out
    names = [one["method"] for one in found]
    assert names == ["lbfgs", "adam", "adam", "floor: majority class", "floor: logistic regression"]
    assert [one.get("label") for one in found[:3]] == ["lbfgs", "adam", "adam:lr=3e-2"]
    assert Path("out/compare.png").read_bytes()[:4] == b"\x89PNG"
    for one in found[:3]:
        kept = json.loads(Path("out", one["run"], "summary.json").read_text())
        assert kept["test"] == one["test"]
        assert one["steps"] == 3
    assert all(name in said for name in ("lbfgs", "adam:lr=3e-2", "floor: logistic regression"))


def test_the_random_features_floor_comes_with_admm() -> None:
    found = compare("--steps", 2, "--methods", "admm")
    assert [one["method"] for one in found][1:] == [
        "floor: majority class",
        "floor: logistic regression",
        "floor: random features",
    ]


def test_seeds_are_runs_of_their_own_that_fit_repeats() -> None:
    found = compare("--steps", 2, "--seeds", 2, "--seed", 4, "--methods", "lbfgs")
    assert [one["seed"] for one in found[:2]] == [4, 5]
    assert Path("out/lbfgs-seed4/summary.json").exists()
    assert main(["fit", "digits", *SMALL, "--steps", "2", "--seed", "5", "--out", "again", "lbfgs"]) == 0
    assert json.loads(Path("again/summary.json").read_text())["test"] == found[1]["test"]


def test_tuning_chooses_by_validation_and_says_what_it_tried(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare("--steps", 12, "--tune", "lr=1e-5,3e-2", "--methods", "adam", "lbfgs", "sgd:lr=0.1")
    said = capsys.readouterr().out
    adam, lbfgs, sgd = found[:3]
    scores = {one["settings"]: one["validation"]["score"] for one in adam["tried"]}
    assert set(scores) == {"lr=1e-5", "lr=3e-2"}
    assert adam["tuned"] == {"lr": "3e-2"}
    assert scores["lr=3e-2"] == max(scores.values()) == adam["validation"]["score"]
    assert "tuned" not in lbfgs
    assert "tuned" not in sgd
    assert "lbfgs has no lr" in said
    assert "sgd:lr=0.1 keeps the lr" in said


def test_json_is_the_list_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare("--steps", 2, "--json", "--methods", "lbfgs")
    said = capsys.readouterr()
    assert json.loads(said.out) == found
    assert said.err == ""


def test_a_folder_of_a_comparison_is_shown_and_only_asked_for_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    compare("--steps", 1, "--methods", "lbfgs", "adam")
    assert "exists" in refused(capsys, "compare", *SMALL, "--steps", 1, "--out", "out", "--methods", "lbfgs")
    compare("--steps", 2, "--overwrite", "--methods", "lbfgs")
    assert main(["show", "out"]) == 0
    assert Path("out/show.png").exists()
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    assert "is no folder of a comparison" in refused(
        capsys, "compare", *SMALL, "--steps", 1, "--out", "other", "--overwrite", "--methods", "lbfgs"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--methods adams", "did you mean adam?"),
        ("--methods adam adam", "names adam twice"),
        ("--methods adam:learning=3", "adam has no setting 'learning'"),
        ("--methods adam:lr", "write adam:setting=value"),
        ("--methods adam:lr=high", "--lr takes a number"),
        ("--methods adam:betas=0.9", "--betas takes 2 numbers"),
        ("--methods adam:lr=-1", "lr must be above 0"),
        ("--methods sgd:nesterov=maybe", "nesterov is true or false"),
        ("--methods adam --tune rate=1,2", "no method of this comparison has a setting 'rate'"),
        ("--methods adam --tune lr", "--tune takes setting=value"),
        ("--methods adam --tune lr=high", "--lr takes a number"),
        ("--methods adam --seeds 0", "--seeds must be at least 1"),
        ("--methods lbfgs --batch-size 32", "--batch-size means nothing"),
        ("lbfgs --methods adam", "the methods follow --methods"),
        ("--methods adam --loss logistic", "the logistic loss is for two classes"),
    ],
)
def test_a_mistake_is_answered_before_any_training(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, "compare", "digits", *SMALL, "--steps", 1, "--out", "out", *words.split())
    assert not Path("out").exists()
