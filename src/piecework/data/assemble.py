"""Raw arrays -> Dataset: checked, understood, split, and with the statistics of the training rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..training import BadInput, Batch, Task
from . import checks, scaling, targets
from .dataset import Dataset
from .source import Array, Source, is_mapped
from .splits import Rows, split, take


def assemble(
    source: Source,
    *,
    task: Task | None = None,
    rows: int | None = None,
    test_rows: int | None = None,
    validation: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Check, understand and split a source; the settings are those of `load`, and so are the refusals."""
    where, names = source.name, source.feature_names
    checks.refuse_unusable_arrays(source)
    _refuse_unusable_values(source, dtype)
    what = targets.meaning(source.targets, where, asked=task, known=source.task)
    codes = [None if what.values is None else targets.codes(y, what.values) for y in source.targets]
    shares = split(source, codes[0], codes[-1], rows=rows, test_rows=test_rows, validation=validation, seed=seed)
    train = _part(source, shares.train, codes[0], dtype)
    held = None if shares.validation is None else _part(source, shares.validation, codes[0], dtype)
    test = _part(source, shares.test, codes[-1], dtype, which=-1)
    _refuse_lost_classes(train, what.classes, where)
    mean, scale = scaling.feature_scaling(train.x, dtype, where, names=names, white=source.white)
    units = None if train.codes is not None else scaling.target_scaling(train.y, where)
    return Dataset(
        name=where,
        train=train.batch(dtype, units),
        validation=None if held is None else held.batch(dtype, units),
        test=test.batch(dtype, units),
        task=what.task,
        mean=mean,
        scale=scale,
        classes=what.classes,
        target_mean=None if units is None else torch.from_numpy(units[0]),
        target_scale=None if units is None else torch.from_numpy(units[1]),
        note=_note(what.note, source, seed),
        feature_names=names,
        target_name=source.target_name,
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one part, as they were read; codes: their classes, or None for a regression."""

    x: Array
    y: Array
    codes: Array | None
    rows: Rows

    def batch(self, dtype: torch.dtype, units: tuple[Array, Array] | None) -> Batch:
        x = features_tensor(self.x, dtype)
        if self.codes is not None:
            return Batch(x, _tensor(np.ascontiguousarray(self.codes)))
        assert units is not None
        return Batch(x, scaling.standardised(self.y, *units, dtype))


def features_tensor(x: Array, dtype: torch.dtype) -> Tensor:
    """The features as a tensor: a mapped file and bytes as they are, anything else in `dtype`."""
    if is_mapped(x):
        return torch.from_numpy(np.asarray(x))
    kind = np.uint8 if x.dtype == np.uint8 else np.float64 if dtype == torch.float64 else np.float32
    return _tensor(np.ascontiguousarray(x, dtype=kind))


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _refuse_unusable_values(source: Source, dtype: torch.dtype) -> None:
    """All targets, and the features that are in memory: there the rows still have the numbers they had in the file."""
    for x, y in source.arrays:
        checks.refuse_unusable_numbers(y, source.name, target=True)
        if not is_mapped(x):
            limit = torch.finfo(dtype).max
            checks.refuse_unusable_numbers(x, source.name, names=source.feature_names, limit=limit)


def _part(source: Source, rows: Rows, codes: Array | None, dtype: torch.dtype, *, which: int = 0) -> _Part:
    """These rows of the source's first or last arrays; of a mapped file only the rows in use are read and checked."""
    x, y = source.arrays[which]
    if is_mapped(x):
        assert isinstance(rows, range)
        limit = torch.finfo(dtype).max
        checks.refuse_unusable_numbers(take(x, rows), source.name, limit=limit, first_row=rows.start)
    return _Part(take(x, rows), take(y, rows), None if codes is None else take(codes, rows), rows)


def _refuse_lost_classes(train: _Part, classes: tuple[str, ...], where: str) -> None:
    if train.codes is None:
        return
    counts = np.bincount(train.codes, minlength=len(classes))
    for lost in np.flatnonzero(counts == 0):
        if isinstance(train.rows, range):
            way_out = "shuffle the rows before saving the file, or leave that class out of it"
        else:
            way_out = f"{len(classes)} classes need at least as many training rows, and there are {len(train.y)}"
        raise BadInput(f"{where}: no training row has the class '{classes[lost]}'; {way_out}")


def _note(meaning: str, source: Source, seed: int) -> str:
    if source.x_test is not None:
        how = source.test_is
    elif source.mapped:
        how = "read from the file where it lies, the test rows are its last 20 %"
    else:
        how = f"20 % of the rows are the test rows, by seed {seed}"
    return "; ".join(clause for clause in (meaning, how, source.remark) if clause)
