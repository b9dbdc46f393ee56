"""Keep a Training in a folder, and get the deployed network back from one."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import formats, storage
from .checkpoint import MODEL, RECIPE, RunFolder, from_rank_zero
from .group import Group, Solo
from .models import mlp
from .models.transformer import transformer_of
from .nn import Standardise
from .training import BadInput, Training

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(
    training: Training[Any],
    folder: str | os.PathLike[str],
    *,
    step: int = 0,
    recipe: Mapping[str, Any] | None = None,
    group: Group | None = None,
) -> None:
    """Keep a Training of one's own loop as a run folder, from which `load_into` goes on. Collective.

    folder: a new one, or the one that an earlier `save` made, whose checkpoint is then replaced safely.
    step: how many steps were taken; recipe: what to record, for example {"method": ..., "model": {...}}.
    Raises BadInput for a folder that is something else."""
    group = group or getattr(training, "group", None) or Solo()
    training.sync()
    run = RunFolder(folder)
    if from_rank_zero(group, lambda: b"a run" if storage.is_there(run.path / RECIPE) else b""):
        run.load(group)
    else:
        run = RunFolder.create(folder, recipe or {}, group=group)
    fit = {"step": step, "seconds": 0.0}
    run.save(training.model.state_dict(), training.state_dict(), fit, group=group)


def load(folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """The deployed network of a run, in evaluation mode; it takes raw features.

    model: a module of the right shape to fill, needed where the run trained a network of its owner's own making: what a
        recipe names is never imported here. The scaling that was put in front of it for the run is put there again.
    Raises BadInput, naming the file, for anything that is not a whole run of this network."""
    run = RunFolder(folder)
    weights = run.weights()
    if model is None:
        model = rebuild(run.recipe, run.path / RECIPE, limit=sum(tensor.numel() for tensor in weights.values()))
    elif not any(name.startswith("network.") for name in model.state_dict()):
        model = _scaled(model, weights)
    formats.put_weights(model, weights, run.path / MODEL)
    return model.eval()


def _scaled(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    mean = weights.get("scaling.mean")
    if mean is None or mean.dim() != 1:
        return model
    return nn.Sequential(OrderedDict(scaling=Standardise(torch.zeros_like(mean), torch.ones_like(mean)), network=model))


def rebuild(recipe: Mapping[str, Any], path: Path, *, limit: int) -> nn.Module:
    """The network that a recipe describes, with start weights: scaling, then an `mlp`, or a transformer of equal
    widths.

    recipe["model"] is {"kind": "mlp" or "transformer", "num_features", "hidden", "num_outputs", "activation", "dtype"},
    and "factors" where there is an NMF layer. A network of more than `limit` numbers is refused before it is made.
    Raises BadInput naming the file."""
    spec = recipe.get("model")
    if not isinstance(spec, dict) or spec.get("kind") not in ("mlp", "transformer"):
        named = spec.get("builder") if isinstance(spec, dict) else None
        what = f"built by {str(named)[:60]!r}, which is not imported" if named else "not one that piecework builds"
        raise BadInput(f"the network in {path} is {what}; make it yourself and give it as model=")
    activation, dtype = spec.get("activation"), spec.get("dtype", "float32")
    hidden: Any = spec.get("hidden")
    widths: list[Any] = [
        spec.get("num_features"),
        *(hidden if isinstance(hidden, list) else [None]),
        spec.get("num_outputs"),
    ]
    if not all(formats.whole(width) and width > 0 for width in widths):
        raise BadInput(f"{path} does not say the widths of the network")
    if not isinstance(activation, str) or not isinstance(dtype, str) or dtype not in _DTYPES:
        raise BadInput(f"{path} does not say the network's activation and dtype ({', '.join(_DTYPES)})")
    kind = _DTYPES[dtype]
    if spec["kind"] == "transformer":
        return _transformer(widths, kind, path, limit)
    factors = spec.get("factors")
    if factors is not None and not (formats.whole(factors) and 0 < factors <= (hidden or [0])[-1]):
        raise BadInput(f"{path} does not say the rank of the network's NMF layer")
    layers = widths if factors is None else [*widths[:-1], factors, widths[-1]]
    if sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(layers)) > limit:
        raise BadInput(f"{path} describes a larger network than {MODEL} holds")
    scaling = Standardise(torch.zeros(widths[0], dtype=kind), torch.ones(widths[0], dtype=kind))
    network = mlp(widths[0], hidden, widths[-1], activation=activation, factors=factors, dtype=kind)
    return nn.Sequential(OrderedDict(scaling=scaling, network=network))


def _transformer(widths: list[int], dtype: torch.dtype, path: Path, limit: int) -> nn.Module:
    context, *hidden, vocabulary = widths
    if not hidden or len(set(hidden)) > 1:
        raise BadInput(f"{path} does not say the one width of the transformer")
    if hidden[0] * (context + 2 * vocabulary + 12 * hidden[0] * len(hidden)) > limit:
        raise BadInput(f"{path} describes a larger network than {MODEL} holds")
    scaling = Standardise(torch.zeros(context, dtype=dtype), torch.ones(context, dtype=dtype))
    network = transformer_of(context, hidden, vocabulary, dtype=dtype)
    return nn.Sequential(OrderedDict(scaling=scaling, network=network))
