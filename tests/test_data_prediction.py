"""Rows to predict must fit the rows that were trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from piecework.data import for_prediction
from piecework.training import BadInput

NAMED = {"num_features": 3, "feature_names": ("a", "b", "c"), "target_name": "t"}
BARE = {"num_features": 3, "target_name": "3"}


def table(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "meta"),
    [
        ("a,b,c\n1,2,3\n4,5,6\n", NAMED),
        ("a,b,c,t\n1,2,3,yes\n4,5,6,\n", NAMED),
        ("t,c,a,b\nyes,3,1,2\nno,6,4,5\n", NAMED),
        ("1,2,3\n4,5,6\n", BARE),
        ("1,2,3,0.5\n4,5,6,0.5\n", BARE),
        ("1,2,3,yes\n4,5,6,no\n", BARE),
        ("p,q,r\n1,2,3\n4,5,6\n", BARE),
        ("p,q,r,t\n1,2,3,yes\n4,5,6,no\n", {"num_features": 3, "target_name": "t"}),
        ("1,2,3\n4,5,6\n", {"num_features": 3}),
    ],
)
def test_columns_are_taken_by_name_or_place_without_the_target(tmp_path, text, meta):
    x = for_prediction(table(tmp_path / "new.csv", text), **meta)
    assert x.dtype == torch.float32
    assert x.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_arrays_are_flattened_to_rows(tmp_path):
    x = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    np.savez(tmp_path / "new.npz", x=x)
    found = for_prediction(tmp_path / "new.npz", num_features=6, feature_names=tuple("abcdef"))
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), x.reshape(4, 6))
    np.savez(tmp_path / "new.npz", x=x.astype(np.float32))
    assert for_prediction(tmp_path / "new.npz", num_features=6, dtype=torch.float64).dtype == torch.float64


def test_a_parquet_table_is_read_by_name(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"t": ["x"], "c": [3.0], "b": [2], "a": [1.0]}), tmp_path / "new.parquet")
    assert for_prediction(tmp_path / "new.parquet", **NAMED).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("text", "meta", "said"),
    [
        ("a,b,cc\n1,2,3\n", NAMED, r"no column 'c' \(did you mean 'cc'\?\), which the network was trained on"),
        ("a,b,c,d\n1,2,3,4\n", NAMED, "columns the network was not trained on: d; leave them out"),
        ("1,2,3\n", NAMED, "has no header; the network was trained on the columns a, b, c"),
        ("1,2\n", BARE, "a row has 2 features, the network was trained on 3"),
        ("1,2,3,4,5\n", BARE, "a row has 5 features"),
        ("1,2,3\n4,x,6\n", BARE, r"column 1 holds text \('x'\) in row 1"),
        ("a,b,c\n1,2,inf\n", NAMED, "row 0, column 'c' is inf"),
        ("a,b,c\n", NAMED, "no rows"),
        ("", NAMED, "is empty"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, text, meta, said):
    with pytest.raises(BadInput, match=said) as refusal:
        for_prediction(table(tmp_path / "new.csv", text), **meta)
    assert "\n" not in str(refusal.value)


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    for arrays, said in (
        ({"x": np.ones((5, 4))}, "a row has 4 features, the network was trained on 3"),
        ({"z": np.ones((5, 3))}, "has the arrays z; the rows to predict must be called x"),
        ({"x": np.ones(3)}, "it must be \\(rows, features\\)"),
        ({"x": np.full((5, 3), np.nan)}, "row 0, column 0 .* is nan"),
        ({"x": np.array([[None] * 3])}, "Python objects"),
    ):
        np.savez(tmp_path / "new.npz", **arrays)
        with pytest.raises(BadInput, match=said):
            for_prediction(tmp_path / "new.npz", num_features=3)
    with pytest.raises(BadInput, match="there is no file"):
        for_prediction(tmp_path / "nothing.csv", num_features=3)
