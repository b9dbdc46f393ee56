from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import killed_while_saving
from piecework import storage
from piecework.checkpoint import RunFolder
from piecework.group import Group, Solo
from piecework.testing import threads
from piecework.testing.check import same, weights
from piecework.training import BadInput
from runs import FILES, scaled_network, train_scaled

# What a run leaves


def test_a_run_leaves_five_files_that_need_no_code_to_read(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(FILES)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["format"], recipe["method"]) == (1, "plain-sgd")
    assert {"piecework", "torch", "python"} <= set(recipe["versions"])
    state = torch.load(folder / "training.pt", weights_only=True)
    assert state["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert state["fit"]["step"] == 4
    assert len(state["ranks"]) == 1
    assert "scaling.mean" in load_file(folder / "model.safetensors")
    assert json.loads((folder / "summary.json").read_text())["stopped_by"] == "steps"
    assert json.loads((folder / "history.jsonl").read_text().splitlines()[-1])["step"] == 4
    run = RunFolder(folder)
    assert run.history().stopped_by == "steps"
    assert run.history().summary()["test"] == run.summary()["test"]


def test_tied_and_transposed_tensors_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.register_buffer("turned", torch.arange(15.0).reshape(3, 5).T)
    run = RunFolder.create(tmp_path / "run", {})
    run.save(model.state_dict(), {"turned": torch.arange(15.0).reshape(3, 5).T}, {"step": 0, "seconds": 0.0})
    assert same(run.weights(), weights(model))
    assert torch.equal(run.load().ranks[0]["turned"], model.get_buffer("turned"))


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"group": Solo()}, r"state_dict\(\)\['group'\] is a Solo"),
        ({"a": [{"b": {1, 2}}]}, r"state_dict\(\)\['a'\]\[0\]\['b'\] is a set"),
        ({"wide": torch.zeros(1).expand(10**12)}, r"state_dict\(\)\['wide'\] repeats its memory"),
        ({"sparse": torch.zeros(3, 3).to_sparse()}, r"state_dict\(\)\['sparse'\] is not a dense tensor"),
    ],
)
def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path, state: dict[str, Any], sentence: str) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    with pytest.raises(TypeError, match=sentence):
        run.save(scaled_network().state_dict(), state, {"step": 0, "seconds": 0.0})


def test_a_full_disk_is_told_on_every_rank(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    (run.path / "training.pt.new").mkdir()  # stands where the new file should go

    def work(group: Group) -> str:
        with pytest.raises(BadInput) as refusal:
            RunFolder(run.path).save(scaled_network().state_dict(), {}, {"step": 0, "seconds": 0.0}, group=group)
        return str(refusal.value)

    said = threads(3, work)
    assert len(set(said)) == 1
    assert "training.pt.new cannot be written" in said[0]


# Making a folder


def test_an_existing_folder_is_refused_unless_it_is_a_run_to_overwrite(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists; give another folder, or overwrite it"):
        RunFolder.create(folder, {})
    (folder / "notes.txt").write_text("mine")
    RunFolder.create(folder, {"method": "other"}, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"recipe.json", "notes.txt"}
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", {})
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(BadInput):
            RunFolder.create(tmp_path / "precious", {}, overwrite=overwrite)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(BadInput):
            RunFolder.create(tmp_path / name, {}, overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years of work"


def test_overwriting_and_saving_never_write_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("years of work")
    for name in (*FILES, "model.safetensors.new", "training.pt.new", "recipe.json.part", "summary.json.part"):
        if name != "recipe.json":
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(tmp_path / "precious")
    run = RunFolder.create(folder, {}, overwrite=True)
    for name in ("model.safetensors.new", "training.pt.new", "summary.json.part", "summary.json", "training.pt"):
        (folder / name).symlink_to(tmp_path / "precious")
    train_scaled(run)
    assert (tmp_path / "precious").read_text() == "years of work"
    assert not any(path.is_symlink() for path in folder.iterdir())


# Killed while saving


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(120)
def test_a_run_killed_anywhere_in_a_save_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_while_saving.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    stages = int(done.stdout)
    assert stages > 10
    whole = RunFolder(tmp_path / f"{stages - 1:03}").weights()
    steps = set()
    for stage in range(stages - 1):
        run = RunFolder(tmp_path / f"{stage:03}")
        found = run.load()
        steps.add(found.fit["step"])
        assert found.fit["step"] in (2, 3)
        run.history()
        run.summary()
        killed_while_saving.train(run.path, resume=True)
        assert same(run.weights(), whole), f"killed before call {stage}"
        assert {path.name for path in run.path.iterdir()} <= {*FILES, "summary.json.part"}
    assert steps == {2, 3}


def test_a_second_kill_in_the_save_that_repairs_the_first_loses_nothing(folder: Path, tmp_path: Path) -> None:
    # First kill: the model has its name, the training file not yet. Second kill: a new pair is being written.
    run = RunFolder(folder)
    before = run.load()
    shutil.copytree(folder, tmp_path / "later")
    train_scaled(tmp_path / "later", steps=6, resume=True)
    shutil.copy(tmp_path / "later" / "model.safetensors", folder / "model.safetensors")
    shutil.copy(tmp_path / "later" / "training.pt", folder / "training.pt.new")
    assert (before.fit["step"], run.load().fit["step"]) == (4, 6)

    class Killed(BaseException):
        pass

    def write(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_bytes", write)
        with pytest.raises(Killed):
            run.save(scaled_network().state_dict(), {}, {"step": 7, "seconds": 1.0})
    assert run.load().fit["step"] == 6
