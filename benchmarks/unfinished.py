"""Benchmarks in pieces: runs that are done are kept in a file, and a command stops where its time is up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENDED_EARLY = 75
"""Exit status of a command that has more to run, and goes on where it was if it is started again."""


class Unfinished(Exception):
    """The time of this command is up, and there are runs left."""


class Runs:
    """What single runs gave, by name. cache: a JSON file that keeps it, or None; limit: seconds for this command.

    A run is begun only if the longest of its part so far would still end in time; the first one always is."""

    def __init__(self, cache: Path | None, limit: float) -> None:
        self._cache, self._end = cache, time.monotonic() + limit
        self._found: dict[str, Any] = json.loads(cache.read_text()) if cache is not None and cache.exists() else {}
        self._longest = 0.0
        self._any = False

    def get(self, name: str, run: Callable[[], Any]) -> Any:
        """What the run of this name gave; it runs if it has not. Raises Unfinished."""
        if name in self._found:
            return self._found[name]
        if self._any and time.monotonic() + self._longest > self._end:
            raise Unfinished(name)
        self._any, began = True, time.monotonic()
        self._found[name] = run()
        self._longest = max(self._longest, time.monotonic() - began)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if self._cache is not None:
            part = self._cache.with_suffix(".part")
            part.write_text(json.dumps(self._found, indent=1))
            part.replace(self._cache)
        return self._found[name]
