"""Rows to predict, from a file that must fit the data a network was trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..training import BadInput
from . import checks, files, npz
from .assemble import features_tensor
from .table import Pick, Wanted, number_of


def for_prediction(
    path: str | os.PathLike[str],
    *,
    num_features: int,
    feature_names: Sequence[str] = (),
    target_name: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Read (n, d) features in the order of training; bytes stay bytes, everything else becomes `dtype`.

    path: a .csv, .csv.gz or .parquet table, or an .npz file with an array x. num_features, feature_names, target_name:
    of the Dataset that was trained on. Columns are taken by name where they had names, in any order; otherwise by
    place. A target column is left out if it is there. Raises BadInput for missing or additional columns, a wrong
    number of them, and everything that `load` refuses."""
    file = Path(path).expanduser()
    where, kind = str(file), files.suffix(file)
    if kind == ".npz":
        if "x" not in npz.names(file):
            raise BadInput(
                f"{where} has the arrays {checks.some(npz.names(file))}; the rows to predict must be called x"
            )
        (x,) = npz.read(file, ["x"])
        names: Sequence[str] = ()
    else:
        pick = _like_training(num_features, feature_names, target_name, where)
        table = files.read_table(file, kind, pick, target_name)
        x, names = table.x, table.names
    checks.features(x, where)
    if checks.width(x) != num_features:
        raise BadInput(f"{where}: a row has {checks.width(x)} features, the network was trained on {num_features}")
    checks.refuse_unusable_numbers(x, where, names=names, limit=torch.finfo(dtype).max)
    return features_tensor(x, dtype).flatten(1)


def _like_training(num_features: int, feature_names: Sequence[str], target: str | None, where: str) -> Pick:
    def pick(names: Sequence[str], header: bool) -> Wanted:
        if not feature_names:
            return _by_place(names, header)
        if not header:
            raise BadInput(
                f"{where} has no header; the network was trained on the columns {checks.some(feature_names)}, name them"
            )
        for name in feature_names:
            if name not in names:
                raise BadInput(
                    f"{where} has no column '{name}'{checks.suggestion(name, names)}, which the network was trained on"
                )
        more = [name for name in names if name not in feature_names and name != target]
        if more:
            raise BadInput(f"{where} has columns the network was not trained on: {checks.some(more)}; leave them out")
        return Wanted([names.index(name) for name in feature_names], None)

    def _by_place(names: Sequence[str], header: bool) -> Wanted:
        kept = list(range(len(names)))
        if target is not None and (target in names if header else len(names) == num_features + 1):
            kept.remove(number_of(target, names, where))
        if len(kept) != num_features:
            raise BadInput(f"{where}: a row has {len(kept)} features, the network was trained on {num_features}")
        return Wanted(kept, None)

    return pick
