"""A picture of what ranks waited for, and the same in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from .figures import COLOURS, FAINT, INK
from .timeline import Wait, parts

COMPUTING, MESSAGES = "#e9e9e9", "#8f8f8f"


@dataclass(frozen=True)
class Share:
    """Of one rank's time: what part it waited for others, what part its messages travelled while it stood still, the
    rank that it waited for longest with its part of the waiting, and the longest wait with its step."""

    rank: int
    waiting: float
    messages: float
    most_for: int | None
    part_for: float
    longest: float
    longest_step: int


def shares(waits: Sequence[Wait]) -> list[Share]:
    """One a rank, of the time between the first and the last wait that any noted."""
    found, all_parts = [], parts(waits)
    begins, ends = min(one.began for one in waits), max(one.ended for one in waits)
    whole = max(ends - begins, 1e-9)
    for rank in sorted({one.rank for one in waits}):
        own = [part for part in all_parts if part.rank == rank]
        for_whom: dict[int, float] = {}
        for part in own:
            if part.peer is not None:
                for_whom[part.peer] = for_whom.get(part.peer, 0.0) + part.ended - part.began
        waiting = sum(for_whom.values())
        messages = sum(part.ended - part.began for part in own if part.peer is None)
        most = max(for_whom, key=lambda peer: for_whom[peer], default=None)
        longest = max(own, key=lambda part: part.ended - part.began, default=None)
        found.append(
            Share(
                rank,
                waiting / whole,
                messages / whole,
                most,
                for_whom[most] / waiting if most is not None and waiting > 0 else 0.0,
                0.0 if longest is None else longest.ended - longest.began,
                0 if longest is None else longest.step,
            )
        )
    return found


def window(waits: Sequence[Wait], steps: int = 6) -> tuple[float, float]:
    """From when to when some steps in the middle of what was noted took place."""
    known = sorted({one.step for one in waits})
    middle = len(known) // 2
    chosen = set(known[max(0, middle - steps // 2) : middle + steps - steps // 2])
    inside = [one for one in waits if one.step in chosen]
    return min(one.began for one in inside), max(one.ended for one in inside)


def draw(waits: Sequence[Wait], file: IO[bytes], between: tuple[float, float], *, title: str) -> None:
    """A row a rank: computing, waiting (in the colour of the rank that is waited for, with its number where there is
    room), and standing still while messages travel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    begins, ends = between
    ranks = sorted({one.rank for one in waits})
    sheet = Figure(figsize=(11, 1.9 + 0.42 * len(ranks)), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(sheet)
    panel = sheet.subplots()
    waited_for = set()
    for place, rank in enumerate(ranks):
        panel.broken_barh([(begins, ends - begins)], (place - 0.36, 0.72), facecolors=COMPUTING)
        for part in parts(waits):
            left, right = max(part.began, begins), min(part.ended, ends)
            if part.rank != rank or right <= left:
                continue
            colour = MESSAGES if part.peer is None else _colour(part.peer)
            panel.broken_barh([(left, right - left)], (place - 0.36, 0.72), facecolors=colour)
            if part.peer is not None:
                waited_for.add(part.peer)
                if right - left > 0.018 * (ends - begins):
                    panel.text(
                        (left + right) / 2, place, str(part.peer), ha="center", va="center", fontsize=8, color="w"
                    )
    panel.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    for label, rank in zip(panel.get_yticklabels(), ranks, strict=True):
        label.set_color(_colour(rank))
    panel.invert_yaxis()
    panel.set_xlim(begins, ends)
    panel.set_xlabel("training seconds", color=INK)
    panel.tick_params(labelsize=9, color=FAINT)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    legend = [Patch(color=COMPUTING, label="at work"), Patch(color=MESSAGES, label="messages travel")]
    legend += [Patch(color=_colour(peer), label=f"waits for rank {peer}") for peer in sorted(waited_for)[:8]]
    sheet.legend(handles=legend, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    sheet.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    sheet.savefig(file, format="png")


def _colour(rank: int) -> str:
    return COLOURS[rank % len(COLOURS)]
