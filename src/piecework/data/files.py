"""A user's own file -> Source."""

from __future__ import annotations

import os
from pathlib import Path

from ..training import BadInput
from . import delimited, npz, parquet
from .checks import some, suggestion
from .source import Array, Source
from .table import Pick, Table, to_train

SUFFIXES = (".csv", ".csv.gz", ".parquet", ".npz")


def looks_like_a_file(name: str) -> bool:
    """Whether a name means a file: by its ending, or because there is something of that name."""
    return name.lower().endswith(SUFFIXES) or os.path.exists(name)


def suffix(path: Path) -> str:
    """Which of SUFFIXES a path ends in. Raises BadInput for none, and for a path where there is no file."""
    if os.path.isdir(path):
        raise BadInput(f"{path} is a folder; give a file that ends in {some(SUFFIXES)}")
    found = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
    if not os.path.exists(path):
        near = _beside(path)
        raise BadInput(f"there is no file {path}{suggestion(path.name, near)}")
    if found is None:
        raise BadInput(f"{path} has an unknown ending; files that can be read end in {some(SUFFIXES)}")
    return found


def _beside(path: Path) -> list[str]:
    try:
        return os.listdir(path.parent)
    except OSError:
        return []


def read(path: Path, *, target: str | int | None, map_from: int = npz.MAP_FROM) -> Source:
    """Read a file to train on. `target` names the column of a table and is refused for .npz, which has `y`."""
    kind = suffix(path)
    where = str(path)
    if kind == ".npz":
        if target is not None:
            raise BadInput(f"{where}: the target of an .npz file is its array y; leave out --target")
        return archive(path, map_from)
    table = read_table(path, kind, to_train(target, where), target)
    assert table.y is not None
    return Source(name=where, x=table.x, y=table.y, feature_names=table.names, target_name=table.target_name)


def read_table(path: Path, kind: str, pick: Pick, target: str | int | None) -> Table:
    """Read the columns of a table that `pick` picks; `target` only helps to see whether there is a header."""
    return parquet.read(path, pick) if kind == ".parquet" else delimited.read(path, pick, target=target)


def archive(path: Path, map_from: int = npz.MAP_FROM) -> Source:
    """Read an .npz file with x and y, or x_train, y_train, x_test and y_test."""
    there = npz.names(path)
    own_test = ["x_train", "y_train", "x_test", "y_test"]
    x_test: Array | None = None
    y_test: Array | None = None
    if {"x", "y"} <= set(there):
        x, y = npz.read(path, ["x", "y"], map_from=map_from)
    elif set(own_test) <= set(there):
        x, y, x_test, y_test = npz.read(path, own_test, map_from=map_from)
    else:
        raise BadInput(
            f"{path} has the arrays {some(there)}; it must have x and y, or x_train, y_train, x_test and y_test"
        )
    pictures = x.dtype == "uint8" and x.ndim > 2
    remark = "bytes in more than one dimension are pictures, white is 255" if pictures else ""
    return Source(
        name=str(path), x=x, y=y, x_test=x_test, y_test=y_test, white=255.0 if pictures else None, remark=remark
    )
