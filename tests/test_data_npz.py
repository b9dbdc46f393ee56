"""Archives of arrays: whole, broken, malicious, and mapped where they lie."""

from __future__ import annotations

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from piecework import data
from piecework.data import assemble, npz
from piecework.data.files import archive
from piecework.nn import Standardise
from piecework.training import BadInput


def numbers(num_rows=60, num_columns=4, seed=0):
    x = np.random.default_rng(seed).normal(size=(num_rows, num_columns)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


def test_an_npz_file_is_read(tmp_path):
    x, y = numbers()
    np.savez(tmp_path / "good.npz", x=x, y=y)
    found = data.load(tmp_path / "good.npz")
    assert (found.task, found.num_features, len(found.test)) == ("binary", 4, 12)
    assert found.train.x.dtype == torch.float32


def test_an_npz_file_may_bring_its_own_test_rows(tmp_path):
    x, y = numbers()
    np.savez_compressed(tmp_path / "own.npz", x_train=x[:50], y_train=y[:50], x_test=x[50:], y_test=y[50:])
    found = data.load(tmp_path / "own.npz")
    np.testing.assert_array_equal(found.train.x.numpy(), x[:50])
    np.testing.assert_array_equal(found.test.y.numpy(), y[50:])
    assert "test rows of its own" in found.note


def test_arrays_in_other_orders_types_and_shapes_are_read(tmp_path):
    x, y = numbers()
    np.savez(tmp_path / "odd.npz", x=np.asfortranarray(x.astype(">f8")), y=y.astype(">i2").reshape(-1, 1))
    found = data.load(tmp_path / "odd.npz", dtype=torch.float64)
    assert found.task == "binary"
    assert torch.equal(found.train.y, (found.train.x[:, 0] > 0).long())


class Bomb:
    """Touches a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_npz_file_executes_code(tmp_path):
    y = np.zeros(1)
    np.savez(tmp_path / "x.npz", x=np.array([Bomb(tmp_path / "executed")], dtype=object), y=y)
    np.savez(tmp_path / "y.npz", x=np.ones((1, 2)), y=np.array([Bomb(tmp_path / "executed")], dtype=object))
    records = np.zeros(3, dtype=[("a", object), ("b", float)])
    np.savez(tmp_path / "records.npz", x=records, y=np.zeros(3))
    for name in ("x.npz", "y.npz", "records.npz"):
        with pytest.raises(BadInput, match="holds Python objects, which are not read"):
            data.load(tmp_path / name)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(BadInput, match=r"not an .npz archive"):
        data.load(tmp_path / "pickle.npz")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.ones((60, 4)), "y": np.zeros(50)}, "x has 60 rows and y has 50"),
        ({"x": np.ones((0, 4)), "y": np.zeros(0)}, "x is empty"),
        ({"x": np.ones((4, 0)), "y": np.zeros(4)}, "there is no feature"),
        ({"x": np.ones(4), "y": np.zeros(4)}, r"x has shape \(4,\); it must be \(rows, features\)"),
        ({"x": np.float64(1), "y": np.zeros(4)}, r"x has shape \(\)"),
        ({"x": np.ones((4, 2)), "y": np.zeros((4, 2, 2))}, r"y has shape \(4, 2, 2\)"),
        ({"x": np.array([["a"], ["b"]]), "y": np.zeros(2)}, "x holds text"),
        ({"x": np.ones((2, 1), complex), "y": np.zeros(2)}, "x holds complex numbers"),
        ({"x": np.ones((2, 1)), "y": np.zeros(2, "datetime64[s]")}, "y holds dates"),
        ({"x": np.ones((2, 1)), "y": np.array([["a", "b"]] * 2)}, "y holds text in 2 columns"),
        ({"x": np.ones((4, 2)), "y": np.zeros(4)}, "the target is 0 in every row"),
        ({"X": np.ones((4, 2)), "y": np.zeros(4)}, "has the arrays X, y; it must have x and y, or"),
        ({"x": np.ones((4, 2)), "y_train": np.zeros(4)}, "it must have x and y"),
        (
            {"x_train": np.ones((4, 2)), "y_train": np.arange(4), "x_test": np.ones((4, 3)), "y_test": np.arange(4)},
            "they must be the same features",
        ),
        (
            {"x_train": np.eye(24), "y_train": np.arange(24) % 2, "x_test": np.eye(24), "y_test": np.arange(24) % 3},
            "no training row has the class '2'",
        ),
    ],
)
def test_an_npz_file_of_wrong_arrays_is_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BadInput, match=said) as refusal:
        data.load(tmp_path / "bad.npz")
    assert "\n" not in str(refusal.value)


def test_a_number_that_is_none_is_named_by_row_and_column(tmp_path):
    x, y = numbers()
    x[7, 2] = np.nan
    np.savez(tmp_path / "nan.npz", x=x, y=y)
    with pytest.raises(BadInput, match=r"row 7, column 2 \(both counted from 0\) is nan"):
        data.load(tmp_path / "nan.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_file_cut_anywhere_is_refused(tmp_path, compressed):
    x, y = numbers()
    (np.savez_compressed if compressed else np.savez)(tmp_path / "good.npz", x=x, y=y)
    whole = (tmp_path / "good.npz").read_bytes()
    for length in (0, 1, 4, 29, 90, 200, len(whole) // 2, len(whole) - 200, len(whole) - 22, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"cut\.npz"):
            data.load(tmp_path / "cut.npz")


def test_a_damaged_npz_file_is_refused_or_unchanged(tmp_path):
    x, y = numbers()
    np.savez(tmp_path / "good.npz", x=x, y=y)
    whole = bytearray((tmp_path / "good.npz").read_bytes())
    random = np.random.default_rng(4)
    for place in random.choice(len(whole), size=200, replace=False):
        damaged = whole.copy()
        damaged[place] ^= 0xFF
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            found = archive(tmp_path / "damaged.npz")
        except BadInput:
            continue
        np.testing.assert_array_equal(found.x, x)


def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 4), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as file:
        for name in ("x.npy", "y.npy"):
            file.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))
    with pytest.raises(BadInput, match="needs 32000000000000 bytes and has 64"):
        data.load(tmp_path / "liar.npz")


def test_a_large_array_is_mapped_where_it_lies(tmp_path):
    x, y = numbers(100)
    np.savez(tmp_path / "large.npz", x=x, y=y)
    source = archive(tmp_path / "large.npz", map_from=1000)
    assert isinstance(source.x, np.memmap)
    assert not isinstance(source.y, np.memmap)
    found = assemble(source, validation=0.25)
    assert [len(part) for part in (found.train, found.validation, found.test)] == [60, 20, 20]
    np.testing.assert_array_equal(torch.cat([found.train.x, found.validation.x, found.test.x]).numpy(), x)
    np.testing.assert_array_equal(torch.cat([found.train.y, found.validation.y, found.test.y]).numpy(), y)
    parts = [found.train.x, found.validation.x, found.test.x]
    start = source.x.ctypes.data
    assert [part.data_ptr() - start for part in parts] == [0, 60 * 16, 80 * 16]
    assert "read from the file where it lies" in found.note
    torch.testing.assert_close(found.mean, found.train.x.mean(0))
    few = assemble(source, rows=24, test_rows=5)
    np.testing.assert_array_equal(few.train.x.numpy(), x[:24])
    np.testing.assert_array_equal(few.test.x.numpy(), x[80:85])


def test_a_mapped_array_computes_like_one_in_memory(tmp_path):
    # numpy.savez puts arrays at odd addresses; torch must compute on them all the same.
    x, y = numbers(101, 5)
    np.savez(tmp_path / "odd.npz", x=x, y=y)
    source = archive(tmp_path / "odd.npz", map_from=100)
    mapped = assemble(source).train
    assert mapped.x.data_ptr() % 4 != 0
    assert isinstance(source.y, np.memmap)
    copy = mapped.x.clone()
    scaling = Standardise(torch.ones(5), torch.full((5,), 3.0))
    assert torch.equal(scaling(mapped.x), scaling(copy))
    assert torch.equal(mapped.x.double(), copy.double())
    assert torch.equal(mapped.x[::3], copy[::3])
    assert torch.equal(mapped.x.index_select(0, torch.arange(3, 60, 7)), copy.index_select(0, torch.arange(3, 60, 7)))
    torch.testing.assert_close(mapped.x @ mapped.x[:24].T, copy @ copy[:24].T)
    assert mapped.y.bincount().tolist() == np.bincount(y[:81]).tolist()


def test_writing_to_a_mapped_array_leaves_the_file_alone(tmp_path):
    x, y = numbers(100)
    np.savez(tmp_path / "large.npz", x=x, y=y)
    before = (tmp_path / "large.npz").read_bytes()
    assemble(archive(tmp_path / "large.npz", map_from=1)).train.x.zero_()
    assert (tmp_path / "large.npz").read_bytes() == before


def test_compressed_arrays_are_never_mapped(tmp_path):
    x, y = numbers(100)
    np.savez_compressed(tmp_path / "packed.npz", x=x, y=y)
    assert not isinstance(npz.read(tmp_path / "packed.npz", ["x"], map_from=1)[0], np.memmap)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (np.asfortranarray(x), y), "column by column"),
        (lambda x, y: (x.astype(">f4"), y), "too large to be converted"),
        (lambda x, y: (x, np.sort(y)), "shuffle the rows before saving"),
        (lambda x, y: (np.where(np.arange(400).reshape(100, 4) == 364, np.nan, x), y), r"row 91, column 0 .*is nan"),
    ],
)
def test_a_mapped_file_that_cannot_be_used_as_it_lies_is_refused(tmp_path, change, said):
    x, y = change(*numbers(100))
    y[:3] = y[0]
    np.savez(tmp_path / "large.npz", x=x, y=np.where(np.arange(100) < 80, 0, y) if "shuffle" in said else y)
    with pytest.raises(BadInput, match=said):
        assemble(archive(tmp_path / "large.npz", map_from=1000))


def test_pictures_in_a_file_are_scaled_by_white(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, size=(24, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", x=x, y=np.tile([0, 1], 12))
    found = data.load(tmp_path / "pictures.npz")
    assert found.scale.tolist() == [255.0] * 15
    assert "pictures" in found.note
