"""The rows of a run: kept in memory, written to `history.jsonl` as they come, summed up and drawn."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import storage
from .training import BadInput

Row = dict[str, Any]

SUMMARY_KEYS = frozenset(
    [
        "method",
        "data",
        "task",
        "rows",
        "ranks",
        "steps",
        "seconds",
        "stopped_by",
        "score_name",
        "train",
        "validation",
        "test",
        "best_test_score",
        "bytes_sent",
        "rounds",
        "peak_memory_mb",
        "parameters",
    ]
)
"""What every `summary.json` has."""


@dataclass
class History:
    """What happened in a run, a row an evaluation.

    rows: dictionaries of step, epoch, seconds, samples, train, validation, test ({"loss", "score"} of the deployed
        network, or None without such a part), bytes_sent, rounds, and the method's own figures.
    about: what does not change in a run: method, data, task, rows, ranks, score_name, parameters, loss, seed, note.
    stopped_by: "steps", "epochs", "seconds", "stop_at", "patience", "diverged", "on_row" or "interrupted"; None while
        the run goes on.
    deployed_step: the step whose network is deployed, where that is not the last.
    path: where rows are written too, one JSON object a line."""

    rows: list[Row] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    stopped_by: str | None = None
    deployed_step: int | None = None
    path: Path | None = None

    def append(self, row: Row) -> None:
        """Add a row, and write it where the run has a folder."""
        self.rows.append(row)
        if self.path is not None:
            storage.append_line(self.path, json.dumps(row, allow_nan=False))

    def cut(self, step: int) -> None:
        """Forget the rows after this step, on the disk too: a resumed run makes them again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        if self.path is not None:
            lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
            storage.replace_bytes(self.path, lines.encode())

    def __getitem__(self, keys: str | tuple[str, ...]) -> list[Any]:
        """A column: history["seconds"], history["test", "score"]; None where a row lacks it."""
        column = []
        for row in self.rows:
            value: Any = row
            for key in (keys,) if isinstance(keys, str) else keys:
                value = value.get(key) if isinstance(value, dict) else None
            column.append(value)
        return column

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def best(self) -> Row | None:
        """The first row with the best validation score, ties decided by the loss there; None without validation."""
        best: Row | None = None
        for row in self.rows:
            if row.get("validation") and (best is None or improves(row["validation"], best["validation"])):
                best = row
        return best

    def summary(self) -> dict[str, Any]:
        """The run in one flat object: the figures of the deployed network, what they cost, and how the run ended.

        `best_test_score` is the best test score of any row and optimistic: nothing may be chosen by it.
        `peak_memory_mb` is the high-water mark of this process, mapped files included; `mapped_mb` is how much of them
        is resident now."""
        last: Row = self.rows[-1] if self.rows else {}
        shown = next((row for row in self.rows if row["step"] == self.deployed_step), last)
        best = self.best
        scores = [score for score in self["test", "score"] if score is not None]
        peak, mapped = memory()
        return {
            **{key: self.about.get(key) for key in ("method", "data", "task", "rows", "ranks")},
            "steps": last.get("step", 0),
            "seconds": last.get("seconds", 0.0),
            "stopped_by": self.stopped_by,
            "score_name": self.about.get("score_name"),
            **{part: shown.get(part) for part in ("train", "validation", "test")},
            "best_test_score": max(scores, default=None),
            "bytes_sent": last.get("bytes_sent", 0),
            "rounds": last.get("rounds", 0),
            "peak_memory_mb": peak,
            "parameters": self.about.get("parameters"),
            "mapped_mb": mapped,
            "samples": last.get("samples", 0),
            "epochs": last.get("epoch", 0),
            "deployed_step": shown.get("step", 0),
            "best_step": best["step"] if best else None,
            **{key: self.about[key] for key in ("loss", "seed", "note") if key in self.about},
        }

    @classmethod
    def read(cls, path: str | os.PathLike[str], summary: Mapping[str, Any] | None = None) -> History:
        """The rows of a `history.jsonl`, with the run's summary where there is one.

        A last line without its end is what a killed process leaves and is left out. Raises BadInput naming the file."""
        path = Path(path)
        *lines, _torn = storage.read_bytes(path, storage.HISTORY_LIMIT).split(b"\n")
        rows: list[Row] = []
        for number, line in enumerate(lines, start=1):
            row = storage.parse_json(line, path)
            reason = _unlike_a_row(row)
            if reason or (rows and row["step"] < rows[-1]["step"]):
                raise BadInput(f"{path}, line {number}, is not a row of a run: {reason or 'its step goes backwards'}")
            rows.append(row)
        facts = dict(summary or {})
        return cls(rows, about=facts, stopped_by=facts.get("stopped_by"), deployed_step=facts.get("deployed_step"))


def improves(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether a score is better, or as good with a lower loss; a figure that is not finite (None) never is."""
    if new["score"] is None or old["score"] is None:
        return new["score"] is not None
    if new["score"] != old["score"]:
        return bool(new["score"] > old["score"])
    return new["loss"] is not None and (old["loss"] is None or bool(new["loss"] < old["loss"]))


def _unlike_a_row(row: Any) -> str:
    if not isinstance(row, dict):
        return "it is not a JSON object"
    if not _is_count(row.get("step")):
        return "it has no step"
    if row.get("train") is None:
        return "its train part has no loss and score"
    return _without_figures(row)


def unlike_a_summary(summary: Mapping[str, Any]) -> str:
    """Why this is not the summary of a run, or nothing."""
    missing = SUMMARY_KEYS - summary.keys()
    if missing:
        return f"it lacks {', '.join(sorted(missing))}"
    for key in ("steps", "ranks", "bytes_sent", "rounds"):
        if not _is_count(summary[key]):
            return f"its {key} are not a number"
    for key in ("method", "data", "task", "score_name", "stopped_by"):
        if not isinstance(summary[key], str | None):
            return f"its {key} is not a text"
    for key in ("rows", "parameters", "peak_memory_mb", "best_test_score"):
        if not isinstance(summary[key], int | float | None):
            return f"its {key} is not a number"
    return _without_figures(summary)


def _without_figures(given: Mapping[str, Any]) -> str:
    if not isinstance(given.get("seconds"), int | float):
        return "it has no seconds"
    for part in ("train", "validation", "test"):
        figures = given.get(part)
        if figures is None:
            continue
        if not isinstance(figures, dict) or not all(
            key in figures and isinstance(figures[key], int | float | None) for key in ("loss", "score")
        ):
            return f"its {part} part has no loss and score"
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def memory() -> tuple[int, int | None]:
    """(peak, mapped): this process's high-water mark and its resident mapped files, in megabytes of 1e6 bytes.

    Linux tells both (VmHWM and RssFile); elsewhere the peak is getrusage's and the second is None."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return tuple(round(int(fields[key].split()[0]) * 1024 / 1e6) for key in ("VmHWM", "RssFile"))  # type: ignore[return-value]
    except (OSError, KeyError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6), None


def figure(
    histories: Mapping[str, History | Sequence[History]],
    path: str | os.PathLike[str],
    *,
    floors: Mapping[str, float] | None = None,
    title: str = "",
    part: str = "test",
) -> None:
    """Draw score against seconds and against steps as a PNG file: see `piecework.figures.draw`."""
    from .figures import draw

    draw(histories, path, floors=floors, title=title, part=part)
