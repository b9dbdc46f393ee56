"""How a run is getting on, on standard error: a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from .history import Row

NARROW = 110
"""Columns of a terminal below which the figures of training are left out."""

PAUSE = 2.0
"""Seconds between two plain lines of a run at least; its first and its last row are always written."""


class Progress:
    """A context in which runs report; `run` gives the `on_row` of one.

    quiet: report nothing, as on all ranks but the first; stream: where to write. A moving line needs a terminal that
    understands control codes."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet, self._stream = quiet, sys.stderr if stream is None else stream
        self._bars: Bars | None = None
        self._unsaid: Callable[[], None] | None = None
        self._said = 0.0

    def __enter__(self) -> Progress:
        if not self._quiet and self._stream.isatty():
            self._bars = _bars(self._stream)
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._say_last()
        if self._bars is not None:
            self._bars.stop()

    def run(
        self, title: str, *, steps: int | None = None, epochs: int | None = None, seconds: float | None = None
    ) -> Callable[[Row], None]:
        """Announce a run with its limits; the function returned is to be called with each of its rows."""
        self._say_last()
        limits = {"step": steps, "epoch": epochs, "seconds": seconds}
        if self._quiet:
            return lambda row: None
        if self._bars is None:
            return self._lines(title, steps)
        bars, number = self._bars, self._bars.add_task(title, total=1.0, figures="starting")
        self._unsaid = lambda: bars.update(number, completed=1.0)

        brief = bars.console.width < NARROW

        def move(row: Row) -> None:
            bars.update(number, completed=part_done(row, limits), figures=figures(row, steps, brief=brief))

        return move

    def _lines(self, title: str, steps: int | None) -> Callable[[Row], None]:
        first = True

        def line(row: Row) -> None:
            nonlocal first
            now = time.monotonic()

            def say() -> None:
                print(f"{title}  {figures(row, steps)}", file=self._stream, flush=True)
                self._said, self._unsaid = now, None

            self._unsaid = say
            if first or now - self._said >= PAUSE:
                say()
            first = False

        return line

    def _say_last(self) -> None:
        if self._unsaid is not None:
            self._unsaid()
            self._unsaid = None


def _bars(stream: TextIO) -> Bars | None:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(file=stream)
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    return Bars(*columns, console=console)


def part_done(row: Row, limits: dict[str, Any]) -> float:
    """How near the run is to the first of its limits, from 0 to 1."""
    return min(1.0, max((row[name] / most for name, most in limits.items() if most), default=0.0))


def figures(row: Row, steps: int | None = None, *, brief: bool = False) -> str:
    """A row in one line: the training loss, and the scores of the parts that there are; brief: without training."""
    score = {part: row[part]["score"] for part in ("train", "validation", "test") if row.get(part)}
    said = [f"step {row['step']:,}" + (f"/{steps:,}" if steps else ""), f"{row['seconds']:.1f} s"]
    if not brief or len(score) == 1 or row["train"]["loss"] is None:
        said.append(f"loss {_number(row['train']['loss'], '.4g')}")
    else:
        del score["train"]
    said += [f"{part} {_number(value, '.4f')}" for part, value in score.items()]
    return "  ".join(said)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
