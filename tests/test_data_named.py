"""Named sets: where they are looked for, how they are read, and what happens where they are not."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch

from piecework import data
from piecework.data import bundled, idx, named, openml, places
from piecework.data.assemble import assemble
from piecework.data.load import open_source
from piecework.training import BadInput

REAL = os.environ.get("PIECEWORK_DATA")
real = pytest.mark.skipif(not REAL, reason="PIECEWORK_DATA does not name a folder with the real data sets")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No data anywhere: an empty cache, no system folders, no variable. Gives the cache's root."""
    monkeypatch.delenv(places.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "SYSTEM", (tmp_path / "system",))
    return tmp_path / "cache" / "piecework"


def no_network(**_):
    raise URLError("Name or service not known")


def never(**_):
    raise AssertionError("what is in the cache is not downloaded again")


def bunch(x, y, *, categories=None, names=None):
    """What scikit-learn's fetch_openml gives for as_frame=False."""
    names = names or [f"column{i}" for i in range(x.shape[1])]
    return SimpleNamespace(data=x, target=y, categories=categories or {}, feature_names=names, target_names=["class"])


def write_idx(path, array, opener=gzip.open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wb") as file:
        file.write(bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())
    return path


def small_mnist(folder, suffix=".gz"):
    random = np.random.default_rng(0)
    opener = gzip.open if suffix else open
    arrays = []
    for part, num_rows in (("train", 50), ("t10k", 20)):
        x = random.integers(0, 256, size=(num_rows, 28, 28), dtype=np.uint8)
        y = (np.arange(num_rows) % 10).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", x, opener)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", y, opener)
        arrays += [x, y]
    return arrays


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_idx_files_are_found_in_the_folder_of_the_variable(nowhere, tmp_path, monkeypatch, suffix):
    x, y, x_test, y_test = small_mnist(tmp_path / "own" / "mnist", suffix)
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "own"))
    found = data.load("mnist")
    assert found.train.x.dtype == torch.uint8
    np.testing.assert_array_equal(found.train.x.numpy(), x)
    np.testing.assert_array_equal(found.test.x.numpy(), x_test)
    np.testing.assert_array_equal(found.train.y.numpy(), y)
    np.testing.assert_array_equal(found.test.y.numpy(), y_test)
    assert (found.task, found.num_features, found.num_outputs) == ("multiclass", 784, 10)
    assert found.scale.unique().tolist() == [255.0]


def test_the_variable_goes_before_the_cache_and_the_cache_before_the_system(nowhere, tmp_path, monkeypatch):
    folders = [tmp_path / "own", nowhere, tmp_path / "system"]
    for value, folder in reversed(list(enumerate(folders))):
        (folder / "uci").mkdir(parents=True)
        rows = "".join(f"{value},{i},{i * 0.5}\n" for i in range(24))
        (folder / "uci" / "yacht.csv").write_text(rows)
        monkeypatch.setenv(places.VARIABLE, str(tmp_path / "own"))
        assert data.load("uci/yacht").train.x[0, 0] == value
        where = next(entry.where for entry in data.catalogue() if entry.name == "uci/yacht")
        assert where == str(folder)


def test_the_catalogue_lists_every_set_and_says_what_is_not_here(nowhere):
    lines = data.catalogue()
    assert [line.name for line in lines] == named.names()
    assert {line.where for line in lines} == {"bundled with scikit-learn", "not here"}
    assert all(line.what and line.size and line.origin for line in lines)


@pytest.mark.parametrize("name", ["higgs", "mnist", "fashion-mnist", "olivetti", "uci/airfoil", "uci/kin40k"])
def test_a_set_that_is_nowhere_lists_every_place_and_says_what_to_do(nowhere, name):
    with pytest.raises(BadInput) as refusal:
        open_source(name, fetch=no_network)
    said = str(refusal.value)
    assert said.startswith(f"{name} is not here: $PIECEWORK_DATA is not set; ")
    for place in (str(nowhere), "system is no folder", "OpenML", "To have it, "):
        assert place in said
    assert ("Name or service not known" in said) == (name != "uci/kin40k")
    assert "\n" not in said
    if name == "fashion-mnist":
        assert "apt-get install dataset-fashion-mnist" in said


def test_a_folder_with_some_of_the_files_is_said(nowhere, tmp_path, monkeypatch):
    small_mnist(tmp_path / "own" / "mnist")
    (tmp_path / "own" / "mnist" / "t10k-images-idx3-ubyte.gz").unlink()
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "own"))
    with pytest.raises(BadInput, match=r"has no mnist/t10k-images-idx3-ubyte \(but 3 of 4 files\)"):
        open_source("mnist", fetch=no_network)


def served_mnist(**asked):
    assert asked["data_id"] == 554
    assert (asked["as_frame"], asked["parser"]) == (False, "liac-arff")
    x = np.random.default_rng(0).integers(0, 256, size=(60, 784)).astype(float)
    return bunch(x, np.array([str(i % 10) for i in range(60)], dtype=object))


def test_a_download_with_another_checksum_is_refused(nowhere):
    with pytest.raises(BadInput, match=r"SHA-256 .* expected 78cde6028f05.* not the same data"):
        open_source("mnist", fetch=served_mnist)
    assert not list(nowhere.rglob("*.npz"))


def test_a_download_is_kept_and_its_checksum_held_against_later_readings(nowhere, monkeypatch):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(24, 3)), np.array(["b", "a"] * 12, dtype=object)
    first = open_source("openml:letters", fetch=lambda **_: bunch(x, y, names=["p", "q", "r"]))
    again = open_source("openml:letters", fetch=never)
    for source in (first, again):
        np.testing.assert_array_equal(source.x, x)
        assert source.y.tolist() == y.tolist()
        assert (source.feature_names, source.target_name) == (("p", "q", "r"), "class")
    assert assemble(again).classes == ("a", "b")
    (kept,) = nowhere.rglob("*.npz")
    np.savez_compressed(kept, x=x + 1, y=y.astype(str), names=np.array(["class", "p", "q", "r"]))
    with pytest.raises(BadInput, match=r"delete it and the \.sha256 file"):
        open_source("openml:letters", fetch=never)
    kept.write_bytes(b"PK")
    with pytest.raises(BadInput, match=r"not an .npz archive"):
        open_source("openml:letters", fetch=never)


def test_the_recorded_checksum_admits_the_right_download(nowhere, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, size=(70, 784)).astype(float)
    y = np.array([str(i % 10) for i in range(70)], dtype=object)
    sums = openml.checksum(x.astype(np.uint8).reshape(-1, 28, 28), y.astype(np.uint8))
    home = openml.Home(data_id=554, adapt=named._adapt_mnist, sha256=sums, shape=(70, 28, 28))
    got = openml.obtain(home, nowhere, fetch=lambda **_: bunch(x, y))
    np.testing.assert_array_equal(got.x.reshape(70, 784), x)
    assert openml.is_kept(home, nowhere)
    assert got.y.dtype == np.uint8
    with pytest.raises(BadInput, match="expected 00"):
        openml.obtain(openml.Home(data_id=554, sha256="00"), nowhere, fetch=never)


def test_a_download_of_another_shape_or_spread_is_refused(nowhere):
    random = np.random.default_rng(0)
    wrong_shape = bunch(random.normal(size=(1503, 4)), random.normal(size=1503))
    with pytest.raises(BadInput, match=r"shape \(1503, 4\), expected \(1503, 5\)"):
        open_source("uci/airfoil", fetch=lambda **_: wrong_shape)
    y = random.normal(size=1503)
    right = bunch(random.normal(size=(1503, 5)), y)
    with pytest.raises(BadInput, match="standard deviation"):
        open_source("uci/airfoil", fetch=lambda **_: right)
    right.target = y / y.std() * 6.896
    source = open_source("uci/airfoil", fetch=lambda **_: right)
    assert assemble(source).task == "regression"
    assert source.target_name == "5"
    with pytest.raises(BadInput, match="not the same data"):
        open_source("olivetti", fetch=lambda **_: right)


def test_higgs_from_openml_leaves_out_its_incomplete_row(nowhere):
    x = np.random.default_rng(0).normal(size=(98050, 28))
    x[-1, 20:] = np.nan
    y = np.array(["0", "1"], dtype=object)[np.arange(98050) % 2]
    source = open_source("higgs", fetch=lambda **_: bunch(x, y))
    found = assemble(source, rows=24)
    assert len(source.x) + len(source.x_test) == 98049
    assert (len(found.train), len(found.test), found.task) == (24, 19609, "binary")
    assert "OpenML's 98,049 whole rows" in found.note


def test_openml_takes_names_numbers_and_a_target_column(nowhere):
    asked = []

    def fetch(**which):
        asked.append({k: which[k] for k in ("name", "data_id", "target_column") if k in which})
        return bunch(np.random.default_rng(0).normal(size=(24, 2)), np.arange(24) % 2)

    open_source("openml:credit-g", fetch=fetch)
    open_source("openml:31", fetch=fetch)
    open_source("openml:31", "age", fetch=fetch)
    assert asked == [{"name": "credit-g"}, {"data_id": 31}, {"data_id": 31, "target_column": "age"}]


def test_no_name_of_a_download_leaves_the_cache(nowhere, tmp_path):
    open_source("openml:../../../outside", fetch=lambda **_: bunch(np.eye(24), np.arange(24) % 2))
    assert [path.parent for path in tmp_path.rglob("*.npz")] == [nowhere / "openml"]


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (bunch(np.eye(2), np.array(["a", None], dtype=object)), "the target holds nothing in row 1"),
        (bunch(np.eye(2), None), "give --target COLUMN"),
        (
            bunch(np.eye(2), np.arange(2), categories={"colour": ["red", "blue"]}, names=["size", "colour"]),
            "'colour' holds",
        ),
        (SimpleNamespace(data=SimpleNamespace(toarray=None)), "sparse"),
    ],
)
def test_a_download_that_is_no_table_of_numbers_is_refused(nowhere, got, said):
    with pytest.raises(BadInput, match=said):
        open_source("openml:odd", fetch=lambda **_: got)


def test_nominal_features_whose_labels_are_numbers_have_these_values(nowhere):
    x = np.array([[0.5, 0], [1.5, 1], [2.5, np.nan]])
    got = bunch(x, np.arange(3), categories={"doors": ["5", "3"]}, names=["size", "doors"])
    source = open_source("openml:cars", fetch=lambda **_: got)
    np.testing.assert_array_equal(source.x[:, 1], [5, 3, np.nan])
    with pytest.raises(BadInput, match="row 2, column 'doors' is nan"):
        assemble(source)


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("timed out"), ValueError("Dataset not found.")])
def test_a_name_that_openml_does_not_give_is_refused(nowhere, error):
    def fetch(**_):
        raise error

    with pytest.raises(BadInput, match=r"openml:nothing cannot be had: OpenML \(nothing\) failed: .*openml.org"):
        open_source("openml:nothing", fetch=fetch)
    with pytest.raises(BadInput, match="needs the name or the number"):
        open_source("openml:")


def test_a_cache_that_cannot_be_written_does_not_stop_a_download(nowhere):
    nowhere.parent.mkdir(parents=True)
    nowhere.write_text("a file in the place of the folder")
    source = open_source("openml:any", fetch=lambda **_: bunch(np.eye(24), np.arange(24) % 2))
    assert source.x.shape == (24, 24)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "starts with nothing"),
        (b"\x00\x00\x08\x01" + struct.pack(">I", 5) + bytes(5), "starts with 00000801, .* with 00000803"),
        (b"\x00\x00\x08\x03\x00\x00", "truncated in its header"),
        (b"\x00\x00\x08\x03" + struct.pack(">3I", 5, 3, 3) + bytes(44), "45 in all, and holds 44"),
        (b"\x00\x00\x08\x03" + struct.pack(">3I", 5, 3, 3) + bytes(46), "45 in all, and holds 46"),
    ],
)
def test_an_idx_file_of_wrong_magic_or_length_is_refused(tmp_path, content, said):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(BadInput, match=said):
        idx.read(tmp_path / "images", 3)
    (tmp_path / "images.gz").write_bytes(gzip.compress(content)[:-6])
    with pytest.raises(BadInput, match="truncated"):
        idx.read(tmp_path / "images.gz", 3)


def test_every_bundled_set_is_described():
    assert set(bundled.DESCRIPTIONS) == {"digits", "breast_cancer", "wine", "diabetes"}


@real
@pytest.mark.parametrize("name", [name for name in named.NAMED if name != "fashion-mnist"])
def test_real_sets_have_the_sizes_the_catalogue_says(name):
    found = data.load(name, validation=0.1)
    entry = next(line for line in data.catalogue() if line.name == name)
    assert entry.where == str(Path(REAL).expanduser())
    num_rows = len(found.train) + len(found.validation) + len(found.test)
    written = sum(int(n.replace(",", "")) for n in entry.size.split(" x ")[0].split(" + "))
    assert num_rows == written
    assert f" x {found.num_features:,}," in entry.size
    if found.task != "regression":
        assert f", {len(found.classes)} classes" in entry.size
        assert found.train.y.flatten().bincount(minlength=len(found.classes)).min() > 0


@real
def test_higgs_is_tested_on_the_last_fifth_of_its_file():
    found = data.load("higgs")
    with np.load(Path(REAL) / "higgs" / "higgs.npz") as file:
        x = file["x"]
    np.testing.assert_array_equal(found.train.x.numpy(), x[:38073])
    np.testing.assert_array_equal(found.test.x.numpy(), x[38073:])


@real
def test_every_person_of_olivetti_is_in_both_parts():
    found = data.load("olivetti")
    assert found.train.y.bincount().tolist() == [8] * 40
    assert found.test.y.bincount().tolist() == [2] * 40


@real
def test_the_recorded_checksum_of_mnist_is_that_of_its_files():
    found = data.load("mnist")
    x = torch.cat([found.train.x, found.test.x]).numpy()
    y = torch.cat([found.train.y, found.test.y]).numpy().astype(np.uint8)
    assert openml.checksum(x, y) == named.NAMED["mnist"].home.sha256


@pytest.mark.skipif(
    not any((folder / "fashion-mnist").is_dir() for folder in places.SYSTEM),
    reason="the system's package dataset-fashion-mnist is not installed",
)
def test_fashion_mnist_is_found_where_the_system_puts_it(nowhere, monkeypatch):
    monkeypatch.undo()
    found = data.load("fashion-mnist", rows=100, test_rows=50)
    assert (found.num_features, found.num_outputs, len(found.train), len(found.test)) == (784, 10, 100, 50)
