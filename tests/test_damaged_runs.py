from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from piecework.checkpoint import RunFolder
from piecework.deploy import load
from piecework.testing.check import same
from piecework.training import BadInput
from runs import train_scaled


def _refused(folder: Path, file: str) -> str:
    """The sentence with which resuming refuses this folder; it names the file."""
    before = {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(BadInput) as refusal:
        train_scaled(folder, steps=6, resume=True)
    sentence = str(refusal.value)
    assert str(folder / file) in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400 + len(str(folder))
    assert {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()} == before
    return sentence


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def _with(folder: Path, **changes: Any) -> None:
    """Write training.pt again, with other entries; a callable changes the entry, None deletes it."""
    state = torch.load(folder / "training.pt", weights_only=True)
    for name, value in changes.items():
        state[name] = value(state[name]) if callable(value) else value
        if value is None:
            del state[name]
    torch.save(state, folder / "training.pt")


def test_no_bomb_in_a_training_file_goes_off(folder: Path, tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    file = folder / "training.pt"
    whole = file.read_bytes()
    state = torch.load(file, weights_only=True)
    torch.save({**state, "fit": {**state["fit"], "step": Bomb(exploded)}}, file)
    _refused(folder, "training.pt")
    file.write_bytes(pickle.dumps({**state["fit"], "bomb": Bomb(exploded)}))
    assert "is damaged or is not a checkpoint" in _refused(folder, "training.pt")
    # The bomb in place of the archive's own pickle, everything else as it was.
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            content = pickle.dumps(Bomb(exploded)) if entry.filename.endswith("data.pkl") else old.read(entry)
            new.writestr(entry.filename, content)
    _refused(folder, "training.pt")
    assert not exploded.exists()
    file.write_bytes(whole)
    train_scaled(folder, steps=5, resume=True)


def test_a_training_file_that_would_grow_when_read_is_refused(folder: Path) -> None:
    whole = (folder / "training.pt").read_bytes()
    with (
        zipfile.ZipFile(io.BytesIO(whole)) as old,
        zipfile.ZipFile(folder / "training.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert "has compressed parts" in _refused(folder, "training.pt")
    (folder / "training.pt").write_bytes(whole)
    _with(folder, ranks=[{"velocity": [torch.zeros(1).expand(10**12)]}])
    assert "repeats its memory" in _refused(folder, "training.pt")


@pytest.mark.parametrize("file", ["training.pt", "model.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(folder: Path, file: str, part: float) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(part * len(whole))])
    _refused(folder, file)


@pytest.mark.parametrize("place", [3, 200, -40])
def test_a_model_with_one_wrong_byte_is_refused(folder: Path, place: int) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[place] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert "it is not the model that training.pt was saved with" in _refused(folder, "model.safetensors")


@pytest.mark.parametrize("seed", range(5))
def test_a_training_file_with_wrong_bytes_is_refused_or_means_the_same(folder: Path, seed: int) -> None:
    whole, generator = (folder / "training.pt").read_bytes(), random.Random(seed)
    expected = RunFolder(folder).load()
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(generator.choice((1, 1, 3))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        (folder / "training.pt").write_bytes(content)
        found = None
        with contextlib.suppress(BadInput):
            found = RunFolder(folder).load()
        if found is not None:
            assert found.fit == expected.fit
            assert same(found.deployed, expected.deployed)
            assert str(found.ranks) == str(expected.ranks)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "four"},
        {"method": ["admm"]},
        {"train": {"loss": "low"}},
        {"test": 0.9},
        {"peak_memory_mb": {}},
        {"seconds": None},
        {"stopped_by": 7},
    ],
)
def test_a_summary_that_no_run_has_written_is_refused(folder: Path, change: dict[str, Any]) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    for wrong in ({**summary, **change}, {key: summary[key] for key in summary if key != next(iter(change))}):
        (folder / "summary.json").write_text(json.dumps(wrong))
        with pytest.raises(BadInput, match=r"summary\.json is not the summary of a run: it"):
            RunFolder(folder).summary()
        with pytest.raises(BadInput, match=r"summary\.json"):
            RunFolder(folder).history()


def test_files_that_are_missing_are_named(folder: Path) -> None:
    for file in ("model.safetensors", "training.pt", "history.jsonl", "recipe.json"):
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        if file == "recipe.json":
            with pytest.raises(BadInput, match=r"is not a run folder: it has no recipe\.json"):
                train_scaled(folder, steps=6, resume=True)
        else:
            assert "does not exist" in _refused(folder, file)
        (folder / file).write_bytes(content)
    with pytest.raises(BadInput, match="nowhere is not a run folder"):
        train_scaled(folder.with_name("nowhere"), steps=6, resume=True)
    assert not folder.with_name("nowhere").exists()


def test_links_and_devices_are_not_read(folder: Path, tmp_path: Path) -> None:
    for file in ("model.safetensors", "training.pt", "history.jsonl", "recipe.json"):
        shutil.move(folder / file, tmp_path / file)
        (folder / file).symlink_to(tmp_path / file)
        assert "is not an ordinary file" in _refused(folder, file)
        (folder / file).unlink()
        os.mkfifo(folder / file)
        assert "is not an ordinary file" in _refused(folder, file)
        (folder / file).unlink()
        (folder / file).mkdir()
        assert "is not an ordinary file" in _refused(folder, file)
        (folder / file).rmdir()
        shutil.move(tmp_path / file, folder / file)


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        b"",
        b"[]",
        b'{"format": 2}',
        b'{"format": NaN}',
        b"{" * 10_000,
        b"\xff\xfe",
        b'"' + b"a" * 20_000_000 + b'"',
    ],
    ids=["garbage", "empty", "list", "newer", "nan", "deep", "bytes", "long"],
)
def test_a_recipe_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / "recipe.json").write_bytes(content)
    _refused(folder, "recipe.json")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "it does not have format 1"),
        ({"sha256": None}, "it does not name its model's SHA-256"),
        ({"sha256": 7}, "it does not name its model's SHA-256"),
        ({"number": -1}, "its number is not a whole number"),
        ({"fit": None}, "its step is not a whole number"),
        ({"fit": lambda fit: {**fit, "step": float("nan")}}, "its step is not a whole number"),
        ({"fit": lambda fit: {**fit, "step": True}}, "its step is not a whole number"),
        ({"fit": lambda fit: {**fit, "step": -4}}, "its step is not a whole number"),
        ({"fit": lambda fit: {**fit, "step": torch.tensor(4)}}, "its step is not a whole number"),
        ({"fit": lambda fit: {**fit, "seconds": float("nan")}}, "its seconds are not a time"),
        ({"fit": lambda fit: {**fit, "seconds": "long"}}, "its seconds are not a time"),
        ({"fit": lambda fit: {**fit, "rounds": float("inf")}}, "it lacks the counters of the run"),
        ({"ranks": None}, "it lacks the states of the ranks"),
        ({"ranks": []}, "it lacks the states of the ranks"),
        ({"ranks": {"0": {}}}, "it lacks the states of the ranks"),
        ({"ranks": [{}]}, "does not fit this PlainTraining"),
        ({"ranks": [{"steps": 4, "velocity": [torch.zeros(3, 3)]}]}, "does not fit this PlainTraining"),
        ({"ranks": [{"steps": 4, "velocity": ["a", "b", "c", "d"]}]}, "does not fit this PlainTraining"),
        ({"model": [1, 2]}, "its model is not a table of tensors"),
        ({"model": {"network.0.weight": torch.zeros(7, 5)}}, "lacks 'scaling.mean' of this network"),
    ],
)
def test_a_training_file_with_wrong_entries_is_refused(folder: Path, changes: dict[str, Any], sentence: str) -> None:
    _with(folder, **changes)
    assert sentence in _refused(folder, "training.pt")


def test_a_best_score_that_is_none_is_refused(tmp_path: Path) -> None:
    train_scaled(tmp_path / "run", patience=5, evaluate_every=1)
    for best in (
        7,
        {"step": 1},
        {"step": -1, "waited": 0, "score": 0.5, "loss": 0.5},
        {"step": 1, "waited": 0, "score": "x"},
    ):
        _with(tmp_path / "run", fit=lambda fit, best=best: {**fit, "best": best})
        with pytest.raises(BadInput, match=r"training\.pt is damaged: it lacks the best score"):
            train_scaled(tmp_path / "run", steps=6, resume=True, patience=5)


def _swap_model(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Another model, with a training file that vouches for it."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    _with(folder, sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda old: {**old, "network.0.weight": torch.zeros(7, 24)}, "has 'network.0.weight' of shape (7, 24)"),
        (
            lambda old: {**old, "network.0.weight": torch.zeros(7, 5)},
            "and type torch.float32; this network's is (7, 5)",
        ),
        (lambda old: {**old, "extra": torch.zeros(1)}, "has 'extra', which this network does not have"),
        (lambda old: {name: old[name] for name in old if name != "network.2.bias"}, "lacks 'network.2.bias'"),
    ],
)
def test_a_model_of_another_network_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], sentence: str
) -> None:
    _swap_model(folder, change)
    assert sentence in _refused(folder, "model.safetensors")
    with pytest.raises(BadInput):
        load(folder)


def test_a_model_file_of_many_lies_is_refused(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F64", "shape": [10**6, 10**6], "data_offsets": [0, 8 * 10**12]}}).encode()
    liars = [
        len(header).to_bytes(8, "little") + header + b"\0" * 100,
        (10**12).to_bytes(8, "little") + b"{}",
        len(b"{" * 99).to_bytes(8, "little") + b"{" * 99,
    ]
    for liar in liars:
        (folder / "model.safetensors").write_bytes(liar)
        _with(folder, sha256=hashlib.sha256(liar).hexdigest())
        assert "is not a whole safetensors file" in _refused(folder, "model.safetensors")
