"""The examples run, and learn: with small settings, on data that is always there."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from piecework import data

EXAMPLES = Path(__file__).parent.parent / "examples"

Main = Callable[[Sequence[str]], float]


def main_of(name: str) -> Main:
    main: Main = runpy.run_path(str(EXAMPLES / name))["main"]
    return main


def on_two_ranks(*words: str, name: str = "02_higgs_on_two_ranks.py") -> str:
    """What an example prints under a real torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(EXAMPLES / name), *words],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_example_has_at_most_80_lines_and_is_run_here() -> None:
    here = Path(__file__).read_text()
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) >= 2
    for path in files:
        assert path.name in here, f"{path.name} is not run by these tests"
        assert len(path.read_text().splitlines()) <= 80, f"{path.name} is longer than 80 lines"


def test_digits_are_learnt_without_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    score = main_of("01_digits_without_gradients.py")(["--hidden", "40", "20", "--sweeps", "12"])
    said = capsys.readouterr().out.splitlines()[-1]
    floor = float(re.findall(r"0\.\d+", said)[0])
    assert score > 0.93
    assert score > floor + 0.05


def test_thresholds_without_a_derivative_learn_more_than_random_ones(capsys: pytest.CaptureFixture[str]) -> None:
    score = main_of("01_digits_without_gradients.py")(["--activation", "sign", "--hidden", "40", "--sweeps", "60"])
    floor = float(re.findall(r"0\.\d+", capsys.readouterr().out.splitlines()[-1])[0])
    assert score > floor + 0.01


def test_the_second_example_is_the_same_on_one_rank_and_on_two(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "breast_cancer", "--hidden", "20", "--sweeps", "4"]
    alone = main_of("02_higgs_on_two_ranks.py")(words)
    said = on_two_ranks(*words).splitlines()[-1]
    assert said.startswith("2 ranks")
    assert f"{alone:.4f}" in said
    assert alone > 0.85


def test_the_second_example_learns_higgs() -> None:
    if next(entry for entry in data.catalogue() if entry.name == "higgs").where == "not here":
        pytest.skip("higgs is not on this machine; set PIECEWORK_DATA to a folder that has it")
    score = main_of("02_higgs_on_two_ranks.py")(["--rows", "8000", "--hidden", "100", "--sweeps", "6"])
    assert score > 0.62


def test_a_function_is_fitted_far_below_where_gradients_stop(capsys: pytest.CaptureFixture[str]) -> None:
    error = main_of("03_fit_to_machine_precision.py")(["--units", "15", "--steps", "120"])
    assert error < 1e-4
    errors = [float(one) for one in re.findall(r"relative error (\S+)", capsys.readouterr().out)]
    assert errors == sorted(errors, reverse=True)


def test_a_regression_from_a_table_beats_the_linear_one(capsys: pytest.CaptureFixture[str]) -> None:
    score = main_of("04_regression_from_a_table.py")(["--seconds", "2"])
    said = capsys.readouterr().out
    assert score > 0.99
    assert float(re.findall(r"linear regression +R2 (\S+)", said)[0]) < 0.9


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by torch's forward mode
def test_an_equation_is_solved_from_its_residuals() -> None:
    assert main_of("05_physics_informed_poisson.py")(["--units", "20", "--steps", "40"]) < 0.02


def test_sign_units_learn_where_adam_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    score = main_of("06_binary_activations.py")(["--width", "40", "--depth", "2", "--epochs", "6"])
    said = capsys.readouterr().out
    assert "(Sign) has none" in said
    assert score > float(re.findall(r"last layer trained: test accuracy (\S+)", said)[0]) + 0.05


def test_few_bits_carry_most_of_a_digit() -> None:
    trained, random = main_of("07_quantised_bottleneck.py")(["--levels", "4", "--epochs", "8"])
    assert trained > 0.8
    assert trained > random + 0.05


def test_factors_of_faces_are_drawn_and_know_strangers_better_than_pixels_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "factors.png"
    score = main_of("08_factors_of_faces.py")(["--epochs", "15", "--out", str(picture)])
    by_pixels = float(re.findall(r"0\.\d+", capsys.readouterr().out.splitlines()[-1])[-1])
    assert score > by_pixels + 0.02
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_gossip_around_a_loop_of_ones_own_alone_and_on_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    name = "09_gossip_in_your_own_loop.py"
    assert main_of(name)(["--epochs", "6"]) > 0.93
    assert "1 ranks" in capsys.readouterr().out
    found = re.search(r"2 ranks.*average (\S+)", on_two_ranks("--epochs", "6", name=name))
    assert found is not None
    assert float(found[1]) > 0.93


def test_two_blocks_learn_a_language_on_one_process_and_on_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "words.txt"
    file.write_text("the quick brown fox jumps over the lazy dog and the hen. " * 40)
    words = ["--text", str(file), "--width", "16", "--depth", "2", "--context", "19", "--steps", "40"]
    name = "10_transformer_in_two_blocks.py"
    reached = main_of(name)(words)
    alone = re.findall(r"block \d: (\S+) nats", capsys.readouterr().out)
    assert re.findall(r"2 ranks.*block \d: (\S+) nats", on_two_ranks(*words, name=name)) == alone
    assert reached < 1.5
    assert float(alone[-1]) == pytest.approx(reached, abs=1e-6)
