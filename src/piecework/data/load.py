"""A name or a file -> Dataset."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..training import BadInput, Task
from . import checks, files, named, text
from .assemble import assemble
from .dataset import Dataset
from .npz import MAP_FROM
from .openml import Fetch
from .source import Source


def load(
    name_or_path: str | os.PathLike[str],
    *,
    task: Task | None = None,
    target: str | int | None = None,
    rows: int | None = None,
    test_rows: int | None = None,
    validation: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Read, check, split and describe a data set.

    name_or_path: a name of `catalogue()`, `openml:NAME` (or number), or a .csv, .csv.gz, .parquet or .npz file.
    task: in place of what is inferred from the target. target: the target column of a table, by name or number.
    rows, test_rows: so many training and test rows. validation: the fraction of these training rows that is set aside.
    seed: decides every split and subset. dtype: float32 or float64, of the features (bytes stay bytes) and of what is
    computed from them.

    A set without test rows of its own is split by seed, 80 % to train and 20 % to test, stratified where there are
    classes. A large .npz file stays in the file: its parts are contiguous, the test rows its last 20 %, the
    validation rows the last of the training rows, so its rows must have been shuffled before it was saved.
    Raises BadInput, in one sentence."""
    _check_settings(task, rows, test_rows, validation, seed, dtype)
    source = open_source(name_or_path, target)
    make = text.assemble if source.characters else assemble
    return make(source, task=task, rows=rows, test_rows=test_rows, validation=validation, seed=seed, dtype=dtype)


def open_source(
    name_or_path: str | os.PathLike[str],
    target: str | int | None = None,
    *,
    fetch: Fetch | None = None,
    map_from: int = MAP_FROM,
) -> Source:
    """Find and read what a name or path means.

    fetch: stands in for scikit-learn's fetch_openml; map_from: bytes from which a file is mapped."""
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str):
        if name.startswith("openml:"):
            return named.from_openml(name.removeprefix("openml:"), target, fetch=fetch)
        if name in named.names():
            if target is not None:
                raise BadInput(f"{name} has its own target; --target is for tables in files and from openml:")
            return named.find(name, fetch=fetch)
        if not files.looks_like_a_file(name):
            raise BadInput(
                f"there is no data set and no file '{name}'{checks.suggestion(name, named.names())}; "
                f"piecework data lists the sets ({checks.some(named.names(), 9)}), "
                f"files end in {checks.some(files.SUFFIXES)}"
            )
    return files.read(Path(name).expanduser(), target=target, map_from=map_from)


def _check_settings(
    task: Task | None, rows: int | None, test_rows: int | None, validation: float, seed: int, dtype: torch.dtype
) -> None:
    if task not in (None, "binary", "multiclass", "regression"):
        raise BadInput(f"--task {task!r} is not one of binary, multiclass, regression")
    for option, value in (("rows", rows), ("test-rows", test_rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise BadInput(f"--{option} must be a whole number of at least 1, got {value!r}")
    if not 0 <= validation < 1:
        raise BadInput(f"--validation is a fraction of the training rows, from 0 to below 1; got {validation!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BadInput(f"--seed must be a whole number, got {seed!r}")
    if dtype not in (torch.float32, torch.float64):
        raise BadInput(f"--dtype must be float32 or float64, got {dtype}")
