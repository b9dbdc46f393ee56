"""Tables in csv and Parquet, whole and broken, and names that mean nothing."""

from __future__ import annotations

import gzip
import sys

import numpy as np
import pytest
import torch

from piecework import data
from piecework.training import BadInput


def numbers(num_rows=60, num_columns=4, seed=0):
    x = np.random.default_rng(seed).normal(size=(num_rows, num_columns)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


def write_csv(path, x, y, header="a,b,c,d,t\n", opener=open):
    with opener(path, "wt") as file:
        file.write(header)
        file.writelines(",".join(map(repr, map(float, row))) + f",{label}\n" for row, label in zip(x, y, strict=True))
    return path


@pytest.mark.parametrize("name", ["good.csv", "good.csv.gz"])
def test_a_csv_file_with_a_target_is_read(tmp_path, name):
    x, y = numbers()
    path = write_csv(tmp_path / name, x, y, opener=gzip.open if name.endswith(".gz") else open)
    found = data.load(path, target="t", dtype=torch.float64)
    assert (found.task, found.name, found.target_name) == ("binary", str(path), "t")
    assert found.feature_names == ("a", "b", "c", "d")
    assert found.note.startswith("target has 2 integer values: binary (--task overrides)")
    both = torch.cat([found.train.x, found.test.x])
    np.testing.assert_array_equal(np.sort(both[:, 0]), np.sort(x[:, 0].astype(np.float64)))
    assert torch.equal(found.train.y, (found.train.x[:, 0] > 0).long())


@pytest.mark.parametrize("target", [4, "4", -1, "-1"])
def test_a_csv_file_without_a_header_has_numbered_columns(tmp_path, target):
    x, y = numbers()
    found = data.load(write_csv(tmp_path / "bare.csv", x, y, header=""), target=target)
    assert (found.feature_names, found.target_name) == ((), "4")
    assert len(found.train) + len(found.test) == 60


def test_text_in_the_target_of_a_bare_file_is_no_header(tmp_path):
    x, y = numbers()
    path = write_csv(tmp_path / "iris.csv", x, np.array(["setosa", "virginica"])[y], header="")
    found = data.load(path, target=-1)
    assert found.classes == ("setosa", "virginica")
    assert len(found.train) + len(found.test) == 60


def test_other_separators_quotes_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "odd.csv"
    lines = "".join(f'"{i}"; {i * 0.5} ;{"yes" if i % 2 else "no"}\r\n' for i in range(24))
    path.write_bytes(b"\xef\xbb\xbf" + f'"a;x";b;t\r\n{lines}\r\n'.encode())
    found = data.load(path, target="t", dtype=torch.float64)
    assert found.feature_names == ("a;x", "b")
    assert found.classes == ("no", "yes")
    assert torch.equal(found.train.x[:, 1], found.train.x[:, 0] / 2)


@pytest.mark.parametrize(
    ("text", "target", "said"),
    [
        ("", "t", "is empty"),
        ("\n\n", "t", "is empty"),
        ("a,b,t\n", "t", "has a header and no rows"),
        ("a,b,t\n1,foo,0\n2,bar,1\n", "t", r"column 'b' holds text \('foo'\) in row 0"),
        ("a,b,t\n1,2,0\n2,?,1\n", "t", r"column 'b' holds text \('\?'\) in row 1"),
        ("a,b,t\n1,2,0\n,3,1\n", "t", "column 'a' holds nothing in row 1"),
        ("a,b,t\n1,2,0\n2,3,\n", "t", "column 't' \\(the target\\) holds nothing in row 1"),
        ("a,b,t\n1,2,0\n2,nan,1\n", "t", "row 1, column 'b' is nan"),
        ("a,b,t\n1,2,0\n2,-inf,1\n", "t", "row 1, column 'b' is -inf"),
        ("a,b,t\n1,2,0.5\n2,3,nan\n", "t", "row 1, the target is nan"),
        ("a,b,t\n1,2,0\n2,1e39,1\n", "t", "row 1, column 'b' is 1e\\+39, more than .*--dtype float64"),
        ("a,b,t\n1,2,0\n2,3\n", "t", "row 1 has 2 fields where the first line has 3"),
        ("a,b,t\n1,2,0\n2,3,1,4\n", "t", "row 1 has 4 fields"),
        ("a,b,t\n1,2,0\n2,3,0\n", "t", "the target is 0 in every row"),
        ("a,b,t\n1,2,0\n", "t", "is 0 in every row|one row"),
        ("a,a,t\n1,2,0\n2,3,1\n", "t", "two columns called 'a'"),
        ("age,b,t\n1,2,0\n2,3,1\n", "aeg", "no column 'aeg' \\(did you mean 'age'\\?\\); the columns are age, b, t"),
        ("a,b,t\n1,2,0\n2,3,1\n", None, "--target COLUMN; the columns are a, b, t"),
        ("1,2,0\n2,3,1\n", None, "--target COLUMN; columns 0 to 2"),
        ("1,2,0\n2,3,1\n", 3, "no column 3; the columns are numbered 0 to 2"),
        ("t\n1\n0\n", "t", "the target is the only column"),
        ('a,b,t\n1,"2,0\n2,3,1\n', "t", "not a table of separated fields"),
        ("a,b,t\n1,2\x00,0\n2,3,1\n", "t", "holds text|not a table"),
    ],
)
def test_a_csv_file_that_is_no_table_of_numbers_is_refused(tmp_path, text, target, said):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=said) as refusal:
        data.load(path, target=target)
    assert "\n" not in str(refusal.value)
    assert "bad.csv" in str(refusal.value)


def test_bad_rows_are_found_beyond_the_first_chunk(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("a,t\n" + "".join(f"{i},{i % 2}\n" for i in range(5000)) + "oops,1\n")
    with pytest.raises(BadInput, match=r"column 'a' holds text \('oops'\) in row 5000"):
        data.load(path, target="t")


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08\x00garbage", b"a,b,t\n1,2,0\n", b""])
def test_a_broken_gzip_archive_is_refused(tmp_path, content):
    path = tmp_path / "bad.csv.gz"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"gzip|empty"):
        data.load(path, target="t")


def test_a_cut_gzip_archive_is_refused(tmp_path):
    path = write_csv(tmp_path / "cut.csv.gz", *numbers(500), opener=gzip.open)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(BadInput, match="truncated"):
        data.load(path, target="t")


def test_a_binary_file_called_csv_is_refused(tmp_path):
    path = tmp_path / "binary.csv"
    path.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(BadInput, match="not a text in UTF-8"):
        data.load(path, target=0)


def parquet_file(path, columns):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_parquet_file_with_a_target_is_read(tmp_path):
    x, y = numbers()
    columns = {"a": x[:, 0], "b": np.arange(60), "c": x[:, 1] > 0, "t": np.array(["no", "yes"])[y]}
    found = data.load(parquet_file(tmp_path / "good.parquet", columns), target="t", dtype=torch.float64)
    assert (found.feature_names, found.classes) == (("a", "b", "c"), ("no", "yes"))
    assert torch.equal(found.train.y, (found.train.x[:, 0] > 0).long())


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"a": [1.0, 2.0], "b": ["foo", "bar"], "t": [0, 1]}, r"column 'b' holds text \('foo' in row 0\)"),
        ({"a": [1.0, None], "t": [0, 1]}, "column 'a' holds nothing in row 1"),
        ({"a": [1.0, 2.0], "t": ["x", None]}, "column 't' holds nothing in row 1"),
        ({"a": [1.0, float("nan")], "t": [0, 1]}, "row 1, column 'a' is nan"),
        ({"a": [[1.0], [2.0]], "t": [0, 1]}, "column 'a' holds values of type list"),
        ({"a": [1.0, 2.0]}, "no column 't'"),
    ],
)
def test_a_parquet_file_that_is_no_table_of_numbers_is_refused(tmp_path, columns, said):
    with pytest.raises(BadInput, match=said):
        data.load(parquet_file(tmp_path / "bad.parquet", columns), target="t")


def test_a_broken_parquet_file_is_refused_in_one_line(tmp_path):
    path = parquet_file(tmp_path / "cut.parquet", {"a": [1.0, 2.0], "t": [0, 1]})
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(BadInput, match="not a Parquet file") as refusal:
        data.load(path, target="t")
    assert "\n" not in str(refusal.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "any.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"pip install piecework\[parquet\]"):
        data.load(tmp_path / "any.parquet", target="t")


def test_names_that_are_no_data_are_refused_with_a_suggestion(tmp_path):
    write_csv(tmp_path / "measured.csv", *numbers())
    (tmp_path / "sheet.xlsx").write_bytes(b"PK")
    for name, said in (
        ("digit", "no data set and no file 'digit' \\(did you mean 'digits'\\?\\)"),
        ("uci/wnie", "did you mean 'uci/wine'"),
        ("no-such-data", "no data set and no file 'no-such-data'; piecework data lists the sets \\(digits"),
        (str(tmp_path / "measurd.csv"), "no file .*did you mean 'measured.csv'"),
        (str(tmp_path / "sheet.xlsx"), "unknown ending; files that can be read end in .csv, .csv.gz, .parquet, .npz"),
        (str(tmp_path), "is a folder"),
        ("x" * 5000, "no data set and no file"),
    ):
        with pytest.raises(BadInput, match=said):
            data.load(name)


def test_a_target_is_refused_where_the_file_has_its_own(tmp_path):
    np.savez(tmp_path / "good.npz", x=np.eye(4), y=np.arange(4))
    with pytest.raises(BadInput, match="leave out --target"):
        data.load(tmp_path / "good.npz", target="y")
