"""A run's folder: saved so that a killed process leaves a whole checkpoint, read so that nothing in it is executed.

    recipe.json         what was run (format, method, settings, model, data, seed, versions, command)
    model.safetensors   the deployed network, feature scaling included
    training.pt         the state of `fit` and of every rank's Training, and the SHA-256 of the model it belongs to
    history.jsonl       a row an evaluation
    summary.json        the last summary

A save writes the new pair model.safetensors.new, training.pt.new to the disk in full and only then renames the two.
So at every moment some model file and some training file on the disk belong together, and the hash says which: loading
takes the newest pair that matches, and a save first finishes the renames that an earlier, killed one left.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import formats, storage, timeline
from .formats import FORMAT
from .group import Group, Solo
from .history import History, unlike_a_summary
from .training import BadInput, PeerLost, Training

RECIPE, MODEL, TRAINING, HISTORY, SUMMARY = (
    "recipe.json",
    "model.safetensors",
    "training.pt",
    "history.jsonl",
    "summary.json",
)
_NEW, _PART = ".new", ".part"


@dataclass(frozen=True)
class Checkpoint:
    """What a run can go on from.

    fit: the state of the loop (step, seconds, ...); ranks: every rank's `Training.state_dict()`; deployed: the weights
    of model.safetensors; trajectory: the weights training goes on from, the same unless the best ones are deployed;
    number: how many saves came before."""

    fit: dict[str, Any]
    ranks: list[dict[str, Any]]
    deployed: dict[str, Tensor]
    trajectory: dict[str, Tensor]
    number: int


class RunFolder:
    """The folder of one run. Rank 0 reads and writes it, the other ranks are told; what fails there is raised on all.

    path: the folder; save_every: seconds at least between two saves of a run that goes on, 0 to save at every
    evaluation (the last state is always saved)."""

    def __init__(self, path: str | os.PathLike[str], *, save_every: float = 5.0) -> None:
        self.path = Path(path)
        self.save_every = save_every
        self._number = 0

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        recipe: Mapping[str, Any],
        *,
        overwrite: bool = False,
        group: Group | None = None,
        save_every: float = 5.0,
    ) -> RunFolder:
        """Start a folder with its recipe. Raises BadInput for one that exists, and for one that is not a run even with
        `overwrite`; an empty folder is taken. Overwriting removes the files of the old run and nothing else."""
        run = cls(path, save_every=save_every)

        def work() -> bytes:
            _clear(run.path, overwrite)
            record = {"format": FORMAT, "versions": versions(), **recipe}
            storage.write_object(run.path / RECIPE, record)
            storage.settle(run.path)
            return b""

        from_rank_zero(group or Solo(), work)
        return run

    @property
    def recipe(self) -> dict[str, Any]:
        """recipe.json as it is; nothing it names is imported or opened. Raises BadInput for what is not a run."""
        if not (self.path / RECIPE).exists():
            raise BadInput(f"{self.path} is not a run folder: it has no {RECIPE}")
        recipe = storage.read_object(self.path / RECIPE)
        if recipe.get("format") != FORMAT:
            raise BadInput(
                f"{self.path / RECIPE} has format {str(recipe.get('format'))[:20]!r}; "
                f"this version of piecework reads {FORMAT}"
            )
        return recipe

    def summary(self) -> dict[str, Any]:
        """summary.json as it is. Raises BadInput for one that no run has written."""
        summary = storage.read_object(self.path / SUMMARY)
        if reason := unlike_a_summary(summary):
            raise BadInput(f"{self.path / SUMMARY} is not the summary of a run: {reason}")
        return summary

    def history(self) -> History:
        """The rows of the run, with its summary where there is one."""
        summary = self.summary() if storage.is_there(self.path / SUMMARY) else None
        return History.read(self.path / HISTORY, summary)

    def save(
        self,
        deployed: Mapping[str, Tensor],
        state: Mapping[str, Any],
        fit: Mapping[str, Any],
        *,
        summary: Mapping[str, Any] | None = None,
        trajectory: Mapping[str, Tensor] | None = None,
        group: Group | None = None,
    ) -> None:
        """Put a new checkpoint in place of the last one; on return it is on the disk, for all ranks.

        deployed: weights of the deployed network, equal on all ranks; state: this rank's `Training.state_dict()`; fit:
        state of the loop; trajectory: the weights to go on from where they are not the deployed ones.
        Raises BadInput when the disk refuses, and TypeError for a state that is not tensors and plain values."""
        group = group or Solo()
        formats.require_plain(state, "state_dict()")
        states = group.gather(_to_bytes(state))

        def work() -> bytes:
            model = formats.model_bytes(deployed)
            content = {
                "format": FORMAT,
                "number": self._number + 1,
                "sha256": hashlib.sha256(model).hexdigest(),
                "fit": dict(fit),
                "ranks": [_load(_from_bytes(one)) for one in states],
            }
            if trajectory is not None:
                content["model"] = {name: tensor.detach().cpu() for name, tensor in trajectory.items()}
            self._finish_renames()
            storage.write_bytes(self.path / (MODEL + _NEW), model)
            storage.write_bytes(self.path / (TRAINING + _NEW), _from_bytes(_to_bytes(content)))
            storage.settle(self.path)
            self._rename(MODEL + _NEW, TRAINING + _NEW)
            if summary is not None:
                storage.write_object(self.path / SUMMARY, dict(summary))
            return b""

        from_rank_zero(group, work)
        self._number += 1

    def write_timeline(self, told: Sequence[Mapping[str, Any]]) -> bytes:
        """Put what the ranks noted of their waits behind what they noted before the run was resumed."""
        timeline.write(self.path / timeline.TIMELINE, told, more=True)
        return b""

    def waits(self) -> timeline.Timeline | None:
        """When ranks waited for each other; None for a run that did not note it."""
        path = self.path / timeline.TIMELINE
        return timeline.read(path) if storage.is_there(path) else None

    def load(self, group: Group | None = None) -> Checkpoint:
        """The newest whole checkpoint, the same on all ranks. Raises BadInput, in a sentence that names the file."""

        def work() -> bytes:
            model, content = self._newest()[2:]
            return len(model).to_bytes(8, "little") + model + content

        packed = memoryview(from_rank_zero(group or Solo(), work))
        size = int.from_bytes(packed[:8], "little")
        deployed = formats.parse_model(bytes(packed[8 : 8 + size]), self.path / MODEL)
        content = formats.parse_training(bytes(packed[8 + size :]), self.path / TRAINING)
        self._number = content["number"]
        return Checkpoint(content["fit"], content["ranks"], deployed, content.get("model", deployed), content["number"])

    def weights(self) -> dict[str, Tensor]:
        """The deployed network's tensors by name; a folder that was stripped of its training.pt will do."""
        if not storage.is_there(self.path / TRAINING) and not storage.is_there(self.path / (TRAINING + _NEW)):
            return formats.parse_model(storage.read_bytes(self.path / MODEL), self.path / MODEL)
        return formats.parse_model(self._newest()[2], self.path / MODEL)

    def _newest(self) -> tuple[str, str, bytes, bytes]:
        """(model's name, training's name, their contents) of the newest pair that belongs together."""
        models: dict[str, tuple[str, bytes]] = {}
        problems: list[str] = []
        for name in (MODEL + _NEW, MODEL):
            try:
                content = storage.read_bytes(self.path / name)
                models[hashlib.sha256(content).hexdigest()] = (name, content)
            except BadInput as error:
                problems += [str(error)] if name == MODEL else []
        found: list[tuple[int, str, str, bytes, bytes]] = []
        for name in (TRAINING + _NEW, TRAINING):
            try:
                content = storage.read_bytes(self.path / name)
                record = formats.parse_training(content, self.path / name)
                if record["sha256"] in models:
                    found.append((record["number"], *_pair(models[record["sha256"]], name, content)))
                elif name == TRAINING:
                    problems.append(
                        f"{self.path / MODEL} is damaged: it is not the model that {TRAINING} was saved with "
                        "(the SHA-256 differ)"
                    )
            except BadInput as error:
                problems += [str(error)] if name == TRAINING else []
        if not found:
            raise BadInput(problems[0] if problems else f"{self.path} has no whole checkpoint")
        return max(found, key=lambda pair: pair[0])[1:]

    def _finish_renames(self) -> None:
        """Finish what a killed save left: give the newest whole pair its proper names."""
        if not any(storage.is_there(self.path / (name + _NEW)) for name in (MODEL, TRAINING)):
            return
        try:
            model, training = self._newest()[:2]
        except BadInput:
            return  # the first save of this run was killed: there is nothing to keep
        self._rename(model, training)

    def _rename(self, model: str, training: str) -> None:
        """The model goes first: under either of its names the training file still finds it."""
        for name, proper in ((model, MODEL), (training, TRAINING)):
            if name != proper:
                storage.rename(self.path / name, self.path / proper)
        storage.settle(self.path)


def _pair(model: tuple[str, bytes], name: str, content: bytes) -> tuple[str, str, bytes, bytes]:
    return model[0], name, model[1], content


def _clear(path: Path, overwrite: bool) -> None:
    try:
        if storage.is_there(path):
            names = set(os.listdir(path)) if path.is_dir() else {""}
            if names and not overwrite:
                raise BadInput(f"{path} exists; give another folder, or overwrite it (--overwrite, overwrite=True)")
            if names and RECIPE not in names:
                raise BadInput(
                    f"{path} is no run folder (it has no {RECIPE}), so it is not overwritten; give another one"
                )
            for name in (timeline.TIMELINE, SUMMARY, HISTORY, TRAINING, MODEL, RECIPE):
                for ending in (_NEW, _PART, ""):
                    (path / (name + ending)).unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{path} cannot be made a run folder: {error.strerror}") from error


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    from importlib import metadata

    try:
        own = metadata.version("piecework")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return {"piecework": own, "torch": str(torch.__version__), "python": platform.python_version()}


def from_rank_zero(group: Group, work: Callable[[], bytes]) -> bytes:
    """Let rank 0 do some work and give its result to all; what it raises is raised on all, elsewhere as BadInput."""
    if group.size == 1:
        return work()
    result, error = b"", None
    if group.rank == 0:
        try:
            result = work()
        except Exception as caught:
            error, result = caught, (str(caught) or type(caught).__name__).encode()
    head = torch.tensor([int(error is not None), len(result)])
    group.broadcast_(head, 0)
    failed, size = head.tolist()
    body = torch.frombuffer(bytearray(result), dtype=torch.uint8) if result else torch.zeros(size, dtype=torch.uint8)
    if size:
        group.broadcast_(body, 0)
    if error is not None:
        raise error
    if failed:
        raise BadInput(_from_bytes(body).decode())
    return result or _from_bytes(body)


def _to_bytes(value: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _load(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def load_into(training: Training[Any], run: RunFolder, *, group: Group | None = None) -> Checkpoint:
    """Put a run's newest checkpoint into a fresh Training of the same recipe, on as many ranks: model and state.

    For whoever writes his own loop; `fit(..., resume=True)` does this itself. Raises BadInput."""
    group = group or Solo()
    found = run.load(group)
    if len(found.ranks) != group.size:
        raise BadInput(
            f"{run.path} was trained on {len(found.ranks)} rank(s) and cannot go on with {group.size}; start as many"
        )
    formats.put_weights(
        training.model, found.trajectory, run.path / (MODEL if found.trajectory is found.deployed else TRAINING)
    )
    try:
        training.load_state_dict(found.ranks[group.rank])
    except (BadInput, PeerLost):
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(
            f"{run.path / TRAINING} does not fit this {type(training).__name__} ({type(error).__name__}: {reason})"
        ) from error
    return found
