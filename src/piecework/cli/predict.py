"""`piecework predict`: apply a trained run to new rows."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import PredictOptions
from .parse import parse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..checkpoint import RunFolder
    from .plan import Record

PREDICT = "piecework predict RUN FILE [--out FILE]"


def predict_command(argv: Sequence[str]) -> int:
    """`piecework predict`."""
    chosen, standing = parse(
        PredictOptions,
        argv,
        usage=PREDICT,
        about="Apply the network of a run to the rows of FILE (csv, parquet, or npz with an array x), and write a csv "
        "table: the class of each row, with probabilities where the loss gives some, or numbers in their own units.",
    )
    from .. import data as datasets
    from .. import storage
    from ..checkpoint import RECIPE, RunFolder
    from ..training import BadInput
    from . import folders, network
    from .plan import Record

    if len(standing) != 2:
        raise BadInput(f"predict takes a run folder and a file, and was given {len(standing)} words: {PREDICT}")
    out = None if chosen.out is None else Path(chosen.out)
    if out is not None and storage.is_there(out) and not chosen.overwrite:
        raise BadInput(f"{out} exists; give another --out, or --overwrite")
    run = RunFolder(folders.existing(standing[0]))
    recipe = Record(run.recipe, run.path / RECIPE)
    model = _model(run, recipe, chosen.model)
    data = recipe.inside("data")
    x = datasets.for_prediction(
        standing[1],
        num_features=data.whole_number("num_features"),
        feature_names=data.texts("feature_names"),
        target_name=data.optional("target_name", str),
        dtype=network.DTYPES[recipe.inside("model").one_of("dtype", tuple(network.DTYPES))],
    )
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for row in _table(model, x, recipe):
        writer.writerow(row)
    if out is None:
        sys.stdout.write(text.getvalue())
    else:
        storage.replace_bytes(out, text.getvalue().encode())
        print(f"{len(x):,} predictions in {out}")
    return 0


def _model(run: RunFolder, recipe: Record, given: str | None) -> nn.Module:
    """The deployed network; one that a function made needs that function again."""
    from .. import deploy
    from . import network, resuming
    from .plan import Plan

    own = resuming.own_function(Plan.from_recipe(recipe.values, recipe.path), given, run.path)
    if own is None:
        return deploy.load(run.path)
    shape = recipe.inside("model")
    made = network.made(own, shape.whole_number("num_features"), shape.whole_number("num_outputs"), seed=0)
    return deploy.load(run.path, model=made.to(network.DTYPES[shape.one_of("dtype", tuple(network.DTYPES))]))


def _table(model: nn.Module, x: Tensor, recipe: Record) -> Iterator[Sequence[Any]]:
    """The header, and a row for each row of x."""
    import torch

    from .. import evaluation, losses

    data = recipe.inside("data")
    task = data.one_of("task", ("binary", "multiclass", "regression"))
    loss = losses.named(recipe.one_of("loss", ("squared", "hinge", "softmax", "logistic")))
    classes = data.texts("classes") or ["0", "1"]
    chances = (
        {"softmax": lambda z: torch.softmax(z, 1), "logistic": _both}.get(loss.name) if task != "regression" else None
    )
    first = True
    with torch.no_grad():
        for start in range(0, len(x), evaluation.TILE):
            z = _outputs(model, x[start : start + evaluation.TILE], recipe, task, len(classes))
            if task == "regression":
                z = z.double() * _row(data, "target_scale") + _row(data, "target_mean")
                header, rows = _names(data, z.shape[1]), [[f"{value:.9g}" for value in row] for row in z.tolist()]
            else:
                header = ["prediction", *([f"p({name})" for name in classes] if chances else [])]
                decided = [[classes[number]] for number in loss.decide(z).tolist()]
                spread = chances(z.double()).tolist() if chances else [[]] * len(z)
                rows = [one + [f"{p:.6g}" for p in ps] for one, ps in zip(decided, spread, strict=True)]
            if first:
                yield header
            first = False
            yield from rows


def _outputs(model: nn.Module, x: Tensor, recipe: Record, task: str, num_classes: int) -> Tensor:
    from ..training import BadInput

    z: Tensor = model(x)
    wanted = {"binary": 1, "multiclass": num_classes}.get(task)
    if z.dim() != 2 or (wanted is not None and z.shape[1] != wanted) or (task == "binary" and num_classes != 2):
        raise BadInput(f"{recipe.path} is damaged: its classes are not those of the network")
    if not bool(z.isfinite().all()):
        raise BadInput(
            "the network's outputs are not finite for some of these rows; it diverged, or the rows are extreme"
        )
    return z


def _both(z: Tensor) -> Tensor:
    import torch

    return torch.cat([torch.sigmoid(-z), torch.sigmoid(z)], dim=1)


def _row(data: Record, key: str) -> Tensor:
    import torch

    return torch.tensor(data.numbers(key), dtype=torch.float64)


def _names(data: Record, k: int) -> list[str]:
    return ["prediction"] if k == 1 else [f"prediction_{number}" for number in range(k)]
