"""What a run is to do: read from a command line, written into a recipe, and read from there again."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import data as datasets
from .. import losses
from ..data import Dataset
from ..formats import whole
from ..losses import Loss
from ..methods import METHODS
from ..models import ACTIVATIONS
from ..training import BadInput, Batch, Method, Task
from . import network
from .options import DataOptions, NetworkOptions, TrainingOptions
from .parse import near

STEPS, EPOCHS = 40, 10
"""Limits of a run that is given none: of a full-batch method, and of a mini-batch method."""

LIMITS = ("steps", "epochs", "seconds", "stop_at", "patience", "evaluate_every", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run. source: the name of a data set, or a path; name: the method's; method: its recipe, with settings;
    called: what the data is called, where that is not the source."""

    source: str
    data: DataOptions
    network: NetworkOptions
    training: TrainingOptions
    name: str
    method: Method
    called: str = ""

    def load(self) -> Dataset:
        """The rows. Raises BadInput."""
        options, seed = self.data, self.training.seed
        if not 0 <= seed < 2**63:
            raise BadInput(f"--seed must be a whole number from 0 to 2^63 - 1, got {seed}")
        task: Task | None = None if options.task == "auto" else options.task
        found = datasets.load(
            self.source,
            task=task,
            target=options.target,
            rows=options.rows,
            test_rows=options.test_rows,
            validation=options.validation or 0.0,
            seed=seed,
            dtype=network.DTYPES[self.network.dtype],
        )
        return dataclasses.replace(found, name=self.called) if self.called else found

    def loss(self, data: Dataset) -> Loss:
        """The loss asked for, else the method's own choice for the task, else the task's. Raises CannotTrain for one
        that does not fit the task."""
        own: Mapping[str, str] = getattr(type(self.method), "auto_loss", {})
        if self.network.loss != "auto":
            loss = losses.named(self.network.loss)
        else:
            loss = losses.named(own[data.task]) if data.task in own else losses.auto(data.task)
        loss.check(data.task, data.num_outputs)
        return loss

    def limits(self, batches: str) -> dict[str, Any]:
        """The limits of `fit`, by name, with one that ends the run."""
        given = {name: getattr(self.training, name) for name in LIMITS if name != "batch_size"}
        if all(given[name] is None for name in ("steps", "epochs", "seconds", "patience")):
            given |= {"steps": STEPS} if batches == "full" else {"epochs": EPOCHS}
        return given

    def recipe(self, data: Dataset, loss: Loss, *, ranks: int, command: str, batches: str) -> dict[str, Any]:
        """What recipe.json says; `from_recipe` is its counterpart."""
        path = os.path.abspath(os.path.expanduser(self.source)) if _is_file(self.source) else None
        return {
            "method": self.name,
            "settings": settings(self.method),
            "loss": loss.name,
            "model": network.description(self.network, data),
            "data": {
                "name": self.called or self.source,
                "path": path,
                **dataclasses.asdict(self.data),
                "asked_task": self.data.task,
                "task": data.task,
                "dtype": self.network.dtype,
                "fingerprint": fingerprint(data),
                "num_features": data.num_features,
                "classes": list(data.classes),
                "feature_names": list(data.feature_names),
                "target_name": data.target_name,
                "target_mean": _listed(data.target_mean),
                "target_scale": _listed(data.target_scale),
                "note": data.note,
            },
            "limits": {**self.limits(batches), "batch_size": self.training.batch_size},
            "seed": self.training.seed,
            "threads": torch.get_num_threads(),
            "device": self.training.device,
            "ranks": ranks,
            "command": command,
        }

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], path: Path) -> Plan:
        """The plan that a recipe records. Nothing it names is imported or opened. Raises BadInput naming the file."""
        record = Record(recipe, path)
        data, model, limits = record.inside("data"), record.inside("model"), record.inside("limits")
        name = record.text("method")
        if name not in METHODS:
            raise BadInput(f"{path} names the method {name[:40]!r}; there are {', '.join(METHODS)}")
        own = model.text("builder") if model.values.get("kind") == "function" else None
        hidden = () if own is not None else tuple(model.whole_numbers("hidden"))
        return cls(
            source=data.optional("path", str) or data.text("name"),
            data=DataOptions(
                target=data.optional("target", str),
                task=data.one_of("asked_task", ("auto", "binary", "multiclass", "regression")),
                rows=data.optional("rows", int),
                test_rows=data.optional("test_rows", int),
                validation=data.optional("validation", float),
            ),
            network=NetworkOptions(
                hidden=hidden,
                factors=None if own is not None else model.optional("factors", int),
                activation="relu" if own is not None else model.one_of("activation", tuple(ACTIVATIONS)),
                model=own,
                loss=record.one_of("loss", ("squared", "hinge", "softmax", "logistic")),
                dtype=model.one_of("dtype", tuple(network.DTYPES)),
            ),
            training=TrainingOptions(
                **{key: limits.optional(key, float if key in ("seconds", "stop_at") else int) for key in LIMITS},
                seed=record.whole_number("seed"),
                threads=record.whole_number("threads"),
                device=record.text("device"),
            ),
            name=name,
            method=method_of(name, record.inside("settings").values, path),
            called=data.text("name"),
        )


@dataclass(frozen=True)
class Record:
    """A JSON object of a recipe, whose entries are looked at before they are used. Raises BadInput naming the file."""

    values: Mapping[str, Any]
    path: Path

    def _wrong(self, key: str) -> BadInput:
        return BadInput(f"{self.path} is damaged, or not of a run of the command line: its {key!r} cannot be used")

    def inside(self, key: str) -> Record:
        """The object of this name."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key)
        return Record(value, self.path)

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._wrong(key)
        return value

    def one_of(self, key: str, words: Sequence[str]) -> Any:
        if self.values.get(key) not in words:
            raise self._wrong(key)
        return self.values[key]

    def whole_number(self, key: str) -> int:
        value = self.values.get(key)
        if not whole(value):
            raise self._wrong(key)
        return int(value)  # type: ignore[arg-type]

    def whole_numbers(self, key: str) -> list[int]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(map(whole, value)):
            raise self._wrong(key)
        return value

    def numbers(self, key: str) -> list[float]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(one, int | float) and math.isfinite(one) for one in value):
            raise self._wrong(key)
        return [float(one) for one in value]

    def texts(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(key)
        return value

    def optional(self, key: str, kind: type) -> Any:
        """None, or a word or number of this kind; a whole number will do for a number."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise self._wrong(key)
        return value


def settings(method: Method) -> dict[str, Any]:
    """The settings of a recipe as JSON; functions, which a command line cannot give, are left out."""
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    found = {one.name: getattr(method, one.name) for one in fields if one.init}
    return {name: _plain(value) for name, value in found.items() if value is None or not callable(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value


def method_of(name: str, values: Mapping[str, Any], path: Path) -> Method:
    """The counterpart of `settings`. Raises BadInput naming the file."""
    recipe = METHODS[name]
    known = {one.name for one in dataclasses.fields(recipe) if one.init}  # type: ignore[arg-type]
    if unknown := [key for key in values if key not in known]:
        raise BadInput(f"{path}: {name} has no setting {unknown[0][:40]!r}{near(unknown[0], known)}")
    try:
        return recipe(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except BadInput:
        raise
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: these settings of {name} cannot be used ({str(error)[:120]})") from None


def seeded(method: Method, seed: int, *, given: bool) -> Method:
    """The recipe with the run's seed, if it has one of its own that was not given."""
    fields = {one.name for one in dataclasses.fields(method)}  # type: ignore[arg-type]
    if given or "seed" not in fields:
        return method
    return dataclasses.replace(method, seed=seed)  # type: ignore[type-var]


def fingerprint(data: Dataset) -> str:
    """SHA-256 of what would change with the data: shapes, targets, first rows, and every feature's mean and scale."""
    digest = hashlib.sha256()

    def take(part: torch.Tensor) -> None:
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.contiguous().numpy().tobytes())

    parts: tuple[Batch | None, ...] = (data.train, data.validation, data.test)
    for part in parts:
        digest.update(b"-" if part is None else f"{tuple(part.x.shape)}".encode())
        if part is not None:
            take(part.y)
            take(part.x[:1024])
    take(data.mean)
    take(data.scale)
    return digest.hexdigest()


def _is_file(source: str) -> bool:
    """Whether the source was read from a path; a data set's name goes before a file of the same name."""
    known = {entry.name for entry in datasets.catalogue()}
    return source not in known and not source.startswith("openml:")


def _listed(values: torch.Tensor | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values.tolist()]
