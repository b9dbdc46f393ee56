"""Tables and figures of speech: what the commands print."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_WIDTH = 150
"""Columns of output that does not go to a terminal, where nothing has to fit a window."""

SCORES = {"accuracy": "accuracy", "r2": "R²"}


def console(stream: IO[str] | None = None) -> Console:
    """Where to print; a table that is piped is not squeezed into the width of a terminal."""
    from rich.console import Console

    stream = sys.stdout if stream is None else stream
    made = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not made.is_terminal:
        made = Console(file=stream, width=PLAIN_WIDTH, highlight=False, markup=False, emoji=False)
    return made


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int = 1,
    wrap: bool = False,
) -> Table:
    """A table whose first `left` columns are text and whose other columns are numbers, aligned to the right.

    wrap: whether text may take several lines in other columns than the first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        made.add_column(
            Text(heading),
            justify="left" if number < left else "right",
            no_wrap=number >= left or not (wrap or number == 0),
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(Text("\n".join(map(clean, cell.split("\n")))) for cell in row))
    return made


def clean(text: Any, most: int = 200) -> str:
    """What a file says, as text that a terminal only shows: no control codes, and not too long."""
    words = str(text)
    shown = "".join(letter if letter.isprintable() else "�" for letter in words[: most + 1])
    return shown if len(words) <= most else shown[:most] + "..."


def number(value: Any, form: str = ".4f") -> str:
    """A number, or a dash for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return format(value, form)


def figure(part: Any, key: str, form: str = ".4f") -> str:
    """An entry of {"loss", "score"}, or a dash."""
    return number(part.get(key) if isinstance(part, Mapping) else None, form)


def duration(seconds: Any) -> str:
    """Seconds, to three digits."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return "-"
    return f"{seconds:.2f}" if seconds < 100 else f"{seconds:,.0f}"


def score_word(name: Any) -> str:
    """The score as a heading."""
    return SCORES.get(str(name), "score")


STOPS = {
    "steps": "all steps done",
    "epochs": "all epochs done",
    "seconds": "time is up",
    "stop_at": "the validation score was reached",
    "patience": "the validation score no longer rose",
    "diverged": "DIVERGED: the training loss is not finite",
    "interrupted": "interrupted",
    "on_row": "steps no longer move the weights",
}


def stop(reason: Any) -> str:
    """Why a run ended, in words."""
    return STOPS.get(str(reason), clean(reason))
