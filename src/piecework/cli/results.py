"""What a comparison leaves and prints: compare.json, compare.png and the table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tables import console, duration, figure, number, score_word, table

if TYPE_CHECKING:
    from ..history import History
    from .specs import Entry

PICTURE, TABLE = "compare.png", "compare.json"
Floors = Sequence[dict[str, Any]]
NARROW = 100
"""Columns of a terminal below which the table leaves out what the figure or compare.json show as well."""

PARTS = ("train", "validation", "test")


@dataclass
class Outcome:
    """A finished run of a comparison. figures: its summary; best: the settings that were chosen for it, of those that
    were tried; failed: why it has no figures."""

    entry: Entry
    seed: int
    folder: Path
    history: History | None
    figures: dict[str, Any] = field(default_factory=dict)
    best: dict[str, list[str]] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    failed: str = ""

    def summary(self, root: Path) -> dict[str, Any]:
        """The summary of its run, and what the comparison adds."""
        summary = dict(self.figures)
        if self.tried:
            summary["tuned"] = {option[2:]: ",".join(values) for option, values in self.best.items()}
            summary["tried"] = self.tried
        return {**summary, "label": self.entry.label, "run": str(self.folder.relative_to(root))}


def summaries(root: Path, outcomes: Sequence[Outcome], floors: Floors) -> list[dict[str, Any]]:
    """The summary of each run that has one, then those of the floors."""
    runs = [outcome.summary(root) for outcome in outcomes if outcome.history is not None]
    return runs + [{key: value for key, value in floor.items() if key != "fingerprint"} for floor in floors]


def write(root: Path, outcomes: Sequence[Outcome], floors: Floors, *, title: str) -> None:
    """Write compare.json and compare.png into the folder of the comparison."""
    from .. import storage
    from .show import draw

    text = json.dumps(summaries(root, outcomes, floors), indent=1, allow_nan=False, ensure_ascii=False)
    storage.replace_bytes(root / TABLE, text.encode() + b"\n")
    histories = {label: [run.history for run in runs if run.history] for label, runs in _by_label(outcomes).items()}
    lines = {name: score for name, some in _floors_by_name(floors).items() if (score := _median(some)) is not None}
    drawn = {_legend(label, outcomes): found for label, found in histories.items() if found}
    draw(drawn, root / PICTURE, floors=lines, title=title, say=False)


def _by_label(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.entry.label, []).append(outcome)
    return found


def _floors_by_name(floors: Floors) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for floor in floors:
        found.setdefault(floor["method"].removeprefix("floor: "), []).append(floor)
    return found


def _legend(label: str, outcomes: Sequence[Outcome]) -> str:
    """The label with the settings that were chosen for it."""
    from .specs import in_words

    best = next((outcome.best for outcome in outcomes if outcome.entry.label == label), {})
    return f"{label} {in_words(best)}" if best else label


def _median(summaries: Sequence[dict[str, Any]], part: str = "test") -> float | None:
    scores = [found for one in summaries if (found := _score(one, part)) is not None]
    return statistics.median(scores) if scores else None


def _score(summary: dict[str, Any], part: str) -> float | None:
    found = summary.get(part)
    return found["score"] if found else None


def show(root: Path, outcomes: Sequence[Outcome], floors: Floors) -> None:
    """Print the table, methods by their validation score, or their test score where there is no validation part, then
    the floors; and say where everything is."""
    grouped = {
        label: [run.summary(root) | {"history": run.history} for run in runs if run.history is not None]
        for label, runs in _by_label(outcomes).items()
    }
    shown = {_legend(label, outcomes): found for label, found in grouped.items() if found}
    if not shown:
        return
    by_name = _floors_by_name(floors)
    first = next(iter(shown.values()))[0]
    goal = _goal(by_name)
    parts = [part for part in PARTS if first.get(part) is not None]
    chosen = "validation" if "validation" in parts else "test"
    order = sorted(shown, key=lambda label: -_or_lowest(_median(shown[label], chosen)))
    word = score_word(first["score_name"])
    headings = ["", "loss", *(f"{part}\n{word}" for part in parts), "steps", "seconds"]
    headings += [f"s to\n{goal:.4f}"] if goal is not None else []
    headings += ["passes\na step"]
    rows = [_row(label, shown[label], parts, goal) for label in order]
    below = sorted(by_name, key=lambda name: -_or_lowest(_median(by_name[name], chosen)))
    rows += [_floor_row(name, by_name[name], parts, goal is not None) for name in below]
    alike = len({runs[0].get("loss") for runs in shown.values()}) == 1
    to = console()
    narrow = to.width < NARROW
    dropped = ([1] if alike else []) + ([2] if narrow and len(parts) > 1 else [])
    dropped += [] if any(row[-1] for row in rows) and not narrow else [len(headings) - 1]
    headings, *rows = ([cell for number, cell in enumerate(row) if number not in dropped] for row in (headings, *rows))
    to.print(table(headings, rows, left=1 if alike else 2))
    seeds = len(first_runs) if (first_runs := next(iter(shown.values()))) else 1
    if seeds > 1:
        print(f"Medians of {seeds} seeds, and below them the lowest and the highest score.")
    if goal is not None:
        print(f"s to {goal:.4f}: training seconds until the test score is above every floor.")
    diverged = [label for label in order if any(one["stopped_by"] == "diverged" for one in shown[label])]
    if diverged:
        print(f"Diverged, because the training loss became infinite or NaN: {', '.join(diverged)}.")
    print(f"figure   {root / PICTURE}\ntable    {root / TABLE}\nruns     {root}")


def _or_lowest(score: float | None) -> float:
    return float("-inf") if score is None else score


def _goal(by_name: dict[str, list[dict[str, Any]]]) -> float | None:
    """The best floor's test score."""
    scores = [score for some in by_name.values() if (score := _median(some)) is not None]
    return max(scores, default=None)


def _row(label: str, runs: Sequence[dict[str, Any]], parts: Sequence[str], goal: float | None) -> list[str]:
    from .train import passes_a_step

    row = [label, str(runs[0].get("loss") or ""), *(_spread(runs, part) for part in parts)]
    row += [f"{statistics.median(one['steps'] for one in runs):,.0f}"]
    row += [duration(statistics.median(one["seconds"] for one in runs))]
    if goal is not None:
        row.append(_seconds_to(goal, runs))
    passes = [found for one in runs if (found := passes_a_step(one["history"].rows)) is not None]
    return [*row, number(statistics.median(passes), ".1f") if passes else ""]


def _floor_row(name: str, floors: Sequence[dict[str, Any]], parts: Sequence[str], goal: bool) -> list[str]:
    seconds = duration(statistics.median(one["seconds"] for one in floors))
    return [f"floor: {name}", "", *(_spread(floors, part) for part in parts), "", seconds, *([""] if goal else []), ""]


def _spread(runs: Sequence[dict[str, Any]], part: str) -> str:
    """The median score, with its range where there are several seeds."""
    scores = [score for one in runs if (score := _score(one, part)) is not None]
    if len(runs) == 1 or not scores:
        return figure(runs[0].get(part), "score")
    lost = f", {len(runs) - len(scores)} lost" if len(scores) < len(runs) else ""
    if min(scores) == max(scores):
        return f"{scores[0]:.4f}{lost}"
    return f"{statistics.median(scores):.4f}{lost}\n{min(scores):.4f}-{max(scores):.4f}"


def _seconds_to(goal: float, runs: Sequence[dict[str, Any]]) -> str:
    """The median time to a row with a better test score; a dash if fewer than half of the seeds had one."""
    times = []
    for one in runs:
        rows = [row for row in one["history"].rows if (_score(row, "test") or float("-inf")) > goal]
        times.append(rows[0]["seconds"] if rows else float("inf"))
    middle = statistics.median_high(times)
    return duration(middle) if middle < float("inf") else "-"
