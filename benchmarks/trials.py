"""Rows of a table that are tuned alike: each setting in turn from a few values, on validation rows only.

A trial trains from starts of its own (seeds 100, 101, ...) and scores the network of its last step on the validation
rows. Settings are tuned one after another in the order given, the others where they are by then; a tie goes to the
lower validation loss. The runs of the table then start from seeds 0, 1, ... with what was chosen. Seconds are those of
the processor (one thread), the evaluation at the end of a run included: other work on the machine counts less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import piecework
import report
from piecework import Batch, data, losses
from piecework.training import Training

Start = Callable[..., Training[Batch]]
"""(seed, num_steps, **settings) -> a Training whose schedule ends after so many steps."""


@dataclass(frozen=True)
class Entry:
    """A row of the table. settings: what is tuned, from these values; the middle one is where it starts."""

    name: str
    start: Start
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Course:
    """What all rows of a table have in common. tuning_epochs: 0 for as many as the runs have."""

    data: data.Dataset
    epochs: float
    batch_size: int
    seeds: int
    tuning_seeds: int = 2
    tuning_epochs: float = 0


@dataclass(frozen=True)
class Run:
    validation: float
    validation_loss: float
    test: float
    seconds: float


def run(start: Start, course: Course, seed: int, **settings: Any) -> Run:
    """One run of the course."""
    steps = round(course.epochs * (len(course.data.train) // course.batch_size))
    began = time.process_time()
    history = piecework.fit(
        start(seed, steps, **settings),
        course.data,
        loss=losses.auto(course.data.task),
        batch_size=course.batch_size,
        seed=seed,
        steps=steps,
        evaluate_every=steps,
    )
    last = history.rows[-1]
    return Run(
        last["validation"]["score"], last["validation"]["loss"], last["test"]["score"], time.process_time() - began
    )


def tuned(entry: Entry, course: Course) -> dict[str, Any]:
    """The settings that were best on the validation rows."""
    course = replace(course, epochs=course.tuning_epochs or course.epochs)
    scores: dict[tuple[tuple[str, Any], ...], tuple[float, float]] = {}

    def score(chosen: Mapping[str, Any]) -> tuple[float, float]:
        key = tuple(sorted(chosen.items()))
        if key not in scores:
            runs = [run(entry.start, course, 100 + seed, **chosen) for seed in range(course.tuning_seeds)]
            mean = statistics.mean(one.validation for one in runs)
            scores[key] = mean, -statistics.mean(one.validation_loss for one in runs)
            print(f"    {shown(chosen)}: validation {mean:.4f}, {runs[0].seconds:.1f} s", flush=True)
        return scores[key]

    chosen = {name: values[len(values) // 2] for name, values in entry.settings.items()}
    for name, values in entry.settings.items():
        if len(values) > 1:
            chosen[name] = max(values, key=lambda value, name=name: score({**chosen, name: value}))  # type: ignore[misc]
    return chosen


def table(
    entries: Sequence[Entry], course: Course, known: dict[str, dict[str, Any]] | None = None
) -> list[list[object]]:
    """A row an entry: name, settings, validation and test accuracy (median and range over the seeds), seconds.

    known: settings by name that are not tuned again; those that are tuned are added."""
    known = {} if known is None else known
    rows: list[list[object]] = []
    for entry in entries:
        print(f"  {entry.name}", flush=True)
        chosen = known[entry.name] if entry.name in known else tuned(entry, course)
        known[entry.name] = chosen
        runs = [run(entry.start, course, seed, **chosen) for seed in range(course.seeds)]
        validation, test = report.spread([one.validation for one in runs]), report.spread([one.test for one in runs])
        print(f"    {shown(chosen)}: test {test}", flush=True)
        rows.append([entry.name, shown(chosen), validation, test, report.median([one.seconds for one in runs])])
    return rows


def shown(settings: Mapping[str, Any]) -> str:
    """Settings as words."""
    words = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()]
    return ", ".join(words) or "-"


def about(course: Course) -> str:
    """The course in a sentence."""
    set_ = course.data
    tuning = f"{course.tuning_epochs or course.epochs:g} epochs from {course.tuning_seeds} starts"
    return (
        f"{course.epochs:g} epochs of batches of {course.batch_size} with a cosine schedule, {course.seeds} seeds "
        f"(median and range); tuned on trials of {tuning} each; {len(set_.train):,} training, "
        f"{len(set_.validation or ()):,} validation and {len(set_.test or ()):,} test rows"
    )


HEADER = ("method", "chosen on validation", "validation", "test accuracy", "CPU s")
