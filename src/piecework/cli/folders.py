"""Where a run is kept: a folder that was asked for, a new one in `runs`, or the one a restarted run had."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import HISTORY, MODEL, RECIPE, SUMMARY, TRAINING, RunFolder, from_rank_zero
from ..group import Group
from ..training import BadInput

RUNS = Path("runs")
COMPARISON = "compare.json"

_VARIES = ("command", "versions", "format")
"""Entries of a recipe that may differ between a run and its restart."""


def short(text: str) -> str:
    """A part of a folder's name: letters, digits and a few signs."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-.")[:60] or "run"


def source(name: str) -> str:
    """A data set's part of a folder's name: of a file, its name without folder and ending."""
    return short(re.sub(r"\.(csv|csv\.gz|parquet|npz)$", "", Path(name).name if Path(name).suffix else name))


def new(stem: str, group: Group) -> Path:
    """The first folder `runs/<stem>-<number>` that does not exist; the same on all ranks."""

    def work() -> bytes:
        return os.fsencode(RUNS / f"{stem}-{_last(stem) + 1}")

    return Path(os.fsdecode(from_rank_zero(group, work)))


def _last(stem: str) -> int:
    pattern = re.compile(re.escape(stem) + r"-(\d+)")
    names = os.listdir(RUNS) if RUNS.is_dir() else []
    return max((int(found[1]) for name in names if (found := pattern.fullmatch(name))), default=0)


def refuse_existing(out: str | None, *, overwrite: bool) -> None:
    """Raise BadInput for a folder that is taken, before any time is spent on the data; `start` looks again."""
    if out is None or overwrite or restarted():
        return
    path = Path(out)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise BadInput(f"{out} exists; give another --out, or --overwrite")


def start(
    out: str | None, stem: str, recipe: Mapping[str, Any], *, overwrite: bool, group: Group
) -> tuple[RunFolder, bool]:
    """The folder of a run, and whether to go on from what it holds, because torchrun has restarted the same recipe.

    Raises BadInput for a folder that exists, unless it may be overwritten."""
    path = Path(out) if out is not None else None
    if restarted():
        found = _of_a_restart(path, stem, recipe, group)
        if found is not None:
            return found
    path = path or new(stem, group)
    return RunFolder.create(path, recipe, overwrite=overwrite, group=group), False


def restarted() -> bool:
    """Whether torchrun says that it has started these ranks before."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return count.isdigit() and int(count) > 0


def _of_a_restart(
    path: Path | None, stem: str, recipe: Mapping[str, Any], group: Group
) -> tuple[RunFolder, bool] | None:
    """The folder of the run that was interrupted, if its recipe is the same."""

    def work() -> bytes:
        folder = path or RUNS / f"{stem}-{_last(stem)}"
        if not (folder / RECIPE).is_file() or not same(RunFolder(folder).recipe, recipe):
            return b""
        whole = (folder / MODEL).exists() and (folder / TRAINING).exists()
        return (b"+" if whole else b"-") + os.fsencode(folder)

    found = from_rank_zero(group, work)
    if not found:
        return None
    folder = Path(os.fsdecode(found[1:]))
    if found[:1] == b"+":
        return RunFolder(folder), True
    return RunFolder.create(folder, recipe, overwrite=True, group=group), False


def same(recipe: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two recipes are of the same run."""
    return {key: value for key, value in recipe.items() if key not in _VARIES} == {
        key: value for key, value in other.items() if key not in _VARIES
    }


def remove_if_empty(path: Path) -> None:
    """Take away the folder of a run that has no row: it holds a recipe and nothing else."""
    try:
        if set(os.listdir(path)) <= {RECIPE, HISTORY, SUMMARY} and not _size(path / HISTORY):
            for name in (RECIPE, HISTORY, SUMMARY):
                (path / name).unlink(missing_ok=True)
            path.rmdir()
    except OSError:
        return


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def existing(name: str) -> Path:
    """A run's folder that must exist. Raises BadInput."""
    path = Path(name)
    if not path.is_dir():
        raise BadInput(f"there is no run folder {name}")
    return path


def of_comparison(out: str | None, stem: str, *, overwrite: bool, group: Group) -> Path:
    """Make the folder of a comparison, the same on all ranks. Raises BadInput for one that exists, unless it is that of
    an earlier comparison and may be overwritten, or torchrun has restarted the ranks."""

    def work() -> bytes:
        path = Path(out) if out is not None else RUNS / f"{stem}-{_last(stem) + (not restarted())}"
        try:
            names = set(os.listdir(path)) if path.is_dir() else set()
            if (names or path.is_file()) and not restarted():
                if not overwrite:
                    raise BadInput(f"{path} exists; give another --out, or --overwrite")
                if COMPARISON not in names:
                    raise BadInput(
                        f"{path} is no folder of a comparison (it has no {COMPARISON}), so it is not overwritten"
                    )
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{path} cannot be made a folder: {error.strerror}") from error
        return os.fsencode(path)

    return Path(os.fsdecode(from_rank_zero(group, work)))
