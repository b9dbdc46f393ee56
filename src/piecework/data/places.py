"""Where named data sets are looked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "PIECEWORK_DATA"
SYSTEM = (Path("/usr/share/datasets"), Path("/usr/local/share/datasets"))
"""Where packages of the system put data sets; Debian's dataset-fashion-mnist uses the first."""


def cache_folder() -> Path:
    """The user's cache for this library; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root and os.path.isabs(root) else Path.home() / ".cache") / "piecework"


@dataclass(frozen=True)
class Place:
    """A folder with subfolders of data sets, and how a message calls it."""

    folder: Path
    called: str


def places() -> list[Place]:
    """The folders in the order in which they are searched."""
    own = os.environ.get(VARIABLE)
    found = [Place(Path(own).expanduser(), f"${VARIABLE} ({own})")] if own else []
    found.append(Place(cache_folder(), str(cache_folder())))
    return found + [Place(folder, str(folder)) for folder in SYSTEM]


def look_in(place: Place, files: Sequence[str]) -> list[Path] | str:
    """The files in this place, plain or with .gz behind; or a clause that says what is missing."""
    if not place.folder.is_dir():
        return f"{place.called} is no folder"
    found: list[Path] = []
    missing: list[str] = []
    for name in files:
        there = next((p for p in (place.folder / name, place.folder / (name + ".gz")) if p.is_file()), None)
        if there is None:
            missing.append(name)
        else:
            found.append(there)
    if not missing:
        return found
    return f"{place.called} has no {missing[0]}" + (f" (but {len(found)} of {len(files)} files)" if found else "")
