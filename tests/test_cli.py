"""The command line: what it understands, what it leaves behind, and what it refuses, in a sentence."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command_line import SMALL, fit, own_folder, refused
from piecework.cli import COMMANDS, main
from piecework.cli.parse import options, read, share_out
from piecework.cli.train import plan_of
from piecework.methods import METHODS

__all__ = ["own_folder"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings as later methods may have them."""

    optimizer: Callable[[Iterable[int]], int] | None = None
    ridge: float | None = None
    widths: tuple[int, ...] | None = None


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is understood


def test_the_method_may_follow_an_option_of_several_values() -> None:
    plan, _ = plan_of(["digits", "--hidden", "300", "100", "adam", "--lr", "3e-2"])
    assert (plan.source, plan.network.hidden, plan.name) == ("digits", (300, 100), "adam")
    assert plan.method == METHODS["adam"](lr=3e-2)


@pytest.mark.parametrize(
    "words",
    [
        ["digits", "--steps", "3", "--hidden", "7", "5", "adam"],
        ["--steps", "3", "digits", "--hidden", "7", "5", "adam"],
        ["--hidden", "7", "5", "--steps", "3", "digits", "adam"],
        ["--hidden", "7", "5", "digits", "--steps=3", "adam"],
        ["--steps", "3", "--hidden", "7", "5", "adam"],
    ],
)
def test_run_options_may_stand_in_any_order(words: list[str]) -> None:
    plan, _ = plan_of(words)
    assert (plan.source, plan.training.steps, plan.network.hidden) == ("digits", 3, (7, 5))


def test_the_value_of_an_option_may_be_called_like_a_method() -> None:
    plan, chosen = plan_of(["digits", "--out", "adam", "lbfgs"])
    assert (chosen.output.out, plan.name) == ("adam", "lbfgs")


def test_underscores_are_as_good_as_hyphens_and_negative_numbers_are_values() -> None:
    plan, _ = plan_of(["digits", "--evaluate_every", "3", "--stop-at", "-1.5", "adam", "--weight_decay", "1e-4"])
    assert (plan.training.evaluate_every, plan.training.stop_at) == (3, -1.5)
    assert plan.method == METHODS["adam"](weight_decay=1e-4)


def test_no_hidden_layer_is_a_linear_model() -> None:
    plan, _ = plan_of(["digits", "--hidden", "adam"])
    assert plan.network.hidden == ()


def test_the_seed_is_the_method_s_own_unless_it_is_given_one() -> None:
    one, _ = plan_of(["digits", "--seed", "5", "adam"])
    other, _ = plan_of(["digits", "--seed", "5", "adam", "--seed", "3"])
    assert (one.method, other.method) == (METHODS["adam"](seed=5), METHODS["adam"](seed=3))


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_has_a_help_with_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "digits", name, "--help"]) == 0
    said = capsys.readouterr().out
    own = [option for option, about in options(METHODS[name]).items() if about.kind != "fixed"]
    assert own
    assert all(option in said for option in own)
    assert "callable" not in said.lower()


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: piecework {command}")


def test_settings_that_are_functions_do_not_break_the_command_line() -> None:
    assert options(Recipe)["--optimizer"].kind == "fixed"
    with pytest.raises(ValueError, match="only be given from Python"):
        share_out(["--optimizer", "x"], options(Recipe))
    words = share_out(["--ridge", "1e-3", "--widths", "3", "5"], options(Recipe))
    assert read(Recipe, words, usage="") == Recipe(ridge=1e-3, widths=(3, 5))
    assert read(Recipe, share_out(["--ridge", "None"], options(Recipe)), usage="") == Recipe()


def test_a_setting_that_is_a_word_or_a_function_takes_the_word() -> None:
    plan, _ = plan_of(["digits", "gossip", "--graph", "mixed-radix"])
    assert plan.method == METHODS["gossip"](graph="mixed-radix")
    with pytest.raises(
        ValueError, match="--graph takes one of exponential, ring, complete, mixed-radix, and was given"
    ):
        plan_of(["digits", "gossip", "--graph", "tree"])


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_recipe_s_own_warning_is_said_once_and_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--steps", 1, "--json", "admm", "--gamma", "0.1") == 0
    assert capsys.readouterr().err == "piecework: warning: ADMM does badly with gamma (0.1) below beta (1)\n"


# What is left behind


def test_a_run_is_whole_and_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--steps", 3, "lbfgs") == 0
    said = capsys.readouterr().out
    assert "runs/digits-lbfgs-1" in said
    assert "64-5-10" in said
    names = {path.name for path in Path("runs/digits-lbfgs-1").iterdir()}
    assert names == {"recipe.json", "model.safetensors", "training.pt", "history.jsonl", "summary.json"}
    assert fit("--steps", 3, "lbfgs") == 0
    assert Path("runs/digits-lbfgs-2").is_dir()


def test_json_is_the_summary_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--steps", 2, "--json", "--out", "run", "lbfgs") == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert said.err == ""
    assert (summary["method"], summary["steps"], summary["score_name"]) == ("lbfgs", 2, "accuracy")


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_stop_and_resume_is_one_run(name: str) -> None:
    options = ["--validation", "0.2", "--seed", "3", "--dtype", "float64"]
    assert fit(*options, "--steps", 7, "--out", "seven", name) == 0
    assert fit(*options, "--steps", 3, "--out", "three", name) == 0
    assert not equal(weights("seven"), weights("three"))
    assert main(["resume", "three", "--steps", "7"]) == 0
    assert equal(weights("seven"), weights("three"))


def test_a_run_without_a_limit_gets_one_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("lbfgs") == 0
    assert "; 40 steps" in capsys.readouterr().out
    assert fit("--batch-size", 64, "adam") == 0
    assert "mini-batches; 10 epochs" in capsys.readouterr().out
    assert fit("--steps", 2, "gauss-newton", "--sample-rows", "24") == 0
    assert "24 rows in each step; 2 steps" in capsys.readouterr().out


def test_a_method_that_has_come_to_rest_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "wine", "--hidden", "--seconds", "30", "--out", "run", "lbfgs", "--max-line-search", "2"]) == 0
    assert "steps no longer move the weights" in capsys.readouterr().out


def test_a_diverged_model_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--epochs", 5, "--out", "run", "--loss", "squared", "sgd", "--lr", "1e30") == 0
    assert "DIVERGED" in capsys.readouterr().out
    assert json.loads(Path("run/summary.json").read_text())["stopped_by"] == "diverged"


def test_patience_keeps_the_best_network(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--validation", "0.2", "--patience", 2, "--steps", 400, "--evaluate-every", 2, "--json"]
    assert fit(*words, "--out", "run", "adam", "--lr", "3e-2") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["stopped_by"] == "patience"
    assert summary["deployed_step"] == summary["best_step"] < summary["steps"]


def test_a_restart_by_torchrun_goes_on_where_the_run_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit("--steps", 6, "--out", "whole", "adam") == 0
    assert fit("--steps", 6, "--out", "run", "adam") == 0
    rows = Path("run/history.jsonl").read_text()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert fit("--steps", 6, "--out", "run", "adam") == 0
    assert Path("run/history.jsonl").read_text() == rows
    assert fit("--steps", 5, "--out", "run", "adam") == 2  # another recipe is not gone on with


def test_overwriting_replaces_a_run_and_no_other_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--steps", 1, "--out", "run", "lbfgs") == 0
    before = weights("run")
    assert "exists" in refused(capsys, "fit", "digits", *SMALL, "--steps", 2, "--out", "run", "lbfgs")
    assert fit("--steps", 2, "--out", "run", "--overwrite", "lbfgs") == 0
    assert not equal(before, weights("run"))
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert "no run folder" in refused(capsys, "fit", *SMALL, "--steps", 1, "--out", "mine", "--overwrite", "lbfgs")
    assert Path("mine/thesis.txt").exists()


def test_a_refused_run_leaves_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "fit", "digits", "--patience", 2, "--out", "run", "adam")
    refused(capsys, "fit", "digits", "--out", "run", "lbfgs", "--tile", "0")
    assert not Path("run").exists()


# Networks of one's own

NETWORKS = """
from torch import nn
def small(num_features, num_outputs):
    return nn.Sequential(nn.Linear(num_features, 3), nn.Tanh(), nn.Linear(3, num_outputs))
def wide(num_features, num_outputs):
    return nn.Linear(num_features, num_outputs + 1)
def failing(num_features, num_outputs):
    raise RuntimeError("no weather today")
nothing = None
"""


def test_a_network_of_one_s_own_is_made_from_the_seed_and_never_imported_unasked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("own_networks.py").write_text(NETWORKS)
    state = torch.random.get_rng_state()
    for out in ("one", "two"):
        assert fit("--model", "own_networks:small", "--steps", 3, "--out", out, "adam") == 0
    assert torch.equal(state, torch.random.get_rng_state())
    assert equal(weights("one"), weights("two"))
    assert "give --model own_networks:small" in refused(capsys, "resume", "one", "--steps", 5)
    assert main(["resume", "one", "--steps", "5", "--model", "own_networks:small"]) == 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own_networks:wide", "this data needs outputs of shape (2, 10)"),
        ("own_networks:failing", "no weather today"),
        ("own_networks:smal", "did you mean small?"),
        ("own_networks:nothing", "has no function nothing"),
        ("nowhere:net", "cannot be imported from here"),
        ("own_networks", "takes package.module:function"),
    ],
)
def test_a_network_that_cannot_be_made_is_refused(name: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own_networks.py").write_text(NETWORKS)
    assert sentence in refused(capsys, "fit", "digits", "--model", name, "--steps", 1, "adam")


# Predictions


def test_predictions_are_labels_with_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    g = np.random.default_rng(0)
    rows = [(u, v, "yes" if u > 0 else "no") for u, v in g.normal(size=(90, 2))]
    Path("rows.csv").write_text("a,b,t\n" + "".join(f"{u},{v},{t}\n" for u, v, t in rows))
    Path("new.csv").write_text("b,a\n0.3,2.5\n-0.2,-2.5\n0.1,1.5\n")
    words = ["--target", "t", "--hidden", "3", "--loss", "logistic", "--out", "run"]
    assert main(["fit", "rows.csv", *words, "lbfgs"]) == 0
    capsys.readouterr()
    assert main(["predict", "run", "new.csv"]) == 0
    header, *found = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["prediction", "p(no)", "p(yes)"]
    assert [row[0] for row in found] == ["yes", "no", "yes"]
    assert all(abs(float(row[1]) + float(row[2]) - 1) < 1e-5 for row in found)
    assert main(["predict", "run", "new.csv", "--out", "out.csv"]) == 0
    assert "exists" in refused(capsys, "predict", "run", "new.csv", "--out", "out.csv")
    Path("new.csv").write_text("b,c\n1,2\n")
    assert "no column 'a'" in refused(capsys, "predict", "run", "new.csv")


def test_predictions_of_numbers_are_in_their_own_units(capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).normal(size=(90, 3))
    np.savez("rows.npz", x=x, y=1000 + 50 * x[:, 0])
    words = ["--hidden", "--dtype", "float64", "--steps", "30", "--out", "run"]
    assert main(["fit", "rows.npz", *words, "lbfgs"]) == 0
    capsys.readouterr()
    np.savez("new.npz", x=x[:5])
    assert main(["predict", "run", "new.npz"]) == 0
    header, *found = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["prediction"]
    np.testing.assert_allclose([float(row[0]) for row in found], 1000 + 50 * x[:5, 0], rtol=1e-6)


# Show


def test_show_draws_runs_and_follows_no_link(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lbfgs", "adam"):
        assert fit("--steps", 3, "--out", f"{name}-run", name) == 0
    Path("precious.txt").write_text("keep me")
    Path("lbfgs-run/show.png").symlink_to(Path("precious.txt").resolve())
    capsys.readouterr()
    assert main(["show", "lbfgs-run", "adam-run"]) == 0
    assert "lbfgs-run" in capsys.readouterr().out
    assert Path("precious.txt").read_text() == "keep me"
    assert Path("lbfgs-run/show.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["show", "adam-run", "--out", "here.png"]) == 0
    assert Path("here.png").exists()
    assert "no timeline" in refused(capsys, "show", "adam-run", "--timeline")


def test_show_prints_no_control_codes_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--steps", 1, "--out", "run", "lbfgs") == 0
    for file in ("summary.json", "recipe.json"):
        found = json.loads(Path("run", file).read_text())
        Path("run", file).write_text(
            json.dumps({**found, "method": "[red]\x1b[31mlbfgs$x_$", "command": "\x1b]0;x\x07"})
        )
    capsys.readouterr()
    assert main(["show", "run"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "[red]" in said


# Processes


def test_ctrl_c_saves_and_ends_with_130() -> None:
    words = ["fit", "digits", *SMALL, "--seconds", "100", "--evaluate-every", "20", "--out", "run", "adam"]
    process = subprocess.Popen(
        [sys.executable, "-m", "piecework", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        until = time.monotonic() + 60
        while not Path("run/history.jsonl").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said[1]
    assert "piecework resume run" in said[1]
    steps = json.loads(Path("run/summary.json").read_text())["steps"]
    assert main(["resume", "run", "--steps", str(steps + 3)]) == 0


def test_two_ranks_of_torchrun_leave_one_folder() -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "piecework"]
    words += ["fit", "digits", *SMALL, "--threads", "1", "--steps", "3", "--out", "run", "lbfgs"]
    found = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=100, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("64-5-10") == 1
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["ranks"], summary["bytes_sent"] > 0) == (2, True)


def test_nobody_who_reads_is_no_error() -> None:
    found = subprocess.run(
        f"{sys.executable} -m piecework methods | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stderr == ""
