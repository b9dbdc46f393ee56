"""Pictures: the score of runs against seconds and against steps, and plain lines."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .training import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .history import History

# Okabe and Ito 2008, black left to the floors and yellow left out (too pale for a line on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#6B6B6B")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
TICKS = (-1, -0.5, 0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 1)
INK, FAINT = "#222222", "#6f6f6f"

Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Places on the axis, and there the median, lowest and highest score over the seeds."""


def draw(
    histories: Mapping[str, History | Sequence[History]],
    path: str | os.PathLike[str],
    *,
    floors: Mapping[str, float] | None = None,
    title: str = "",
    part: str = "test",
) -> None:
    """Two panels, score against training seconds and against steps.

    histories: runs by name; several histories of one name (seeds) become a median line and a band from the lowest to
        the highest.
    floors: scores of simple models, drawn as labelled dashed lines.
    part: which rows are scored, "test", or "validation" or "train" where there is no test part.
    Raises BadInput when no run has a row to draw."""
    runs = {name: _seeds(found) for name, found in histories.items()}
    drawn = {
        name: some for name, seeds in runs.items() if (some := [run for run in seeds if len(_scores(run, part)[0])])
    }
    if not drawn:
        raise BadInput(f"no run has a row with a {part} score to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(10.5, 4.6), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(sheet)
    panels = sheet.subplots(1, 2, sharey=True)
    low, high = math.inf, -math.inf
    for panel, axis in zip(panels, ("seconds", "step"), strict=True):
        ends = []
        for number, (name, seeds) in enumerate(drawn.items()):
            curve = _curve(seeds, axis, part)
            colour = COLOURS[number % len(COLOURS)]
            _line(panel, curve, name, colour, DASHES[number // len(COLOURS) % len(DASHES)])
            ends.append(curve)
            low, high = min(low, float(curve[2].min())), max(high, float(curve[3].max()))
        _dress(panel, ends, axis)
    _scale(panels[0], drawn, part, floors or {}, low, high)
    label = _score_label(next(iter(drawn.values()))[0], part)
    logarithmic = panels[0].get_yscale() != "linear"
    panels[0].set_ylabel(label + ("\n(log scale of the error)" if logarithmic else ""), color=INK)
    for panel in panels:
        _floors(panel, floors or {}, label=panel is panels[1])
    handles, labels = panels[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9.5)
    if title:
        sheet.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    sheet.savefig(os.fspath(path), format="png")


def lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    file: IO[bytes],
    *,
    x: str,
    y: str,
    title: str,
) -> None:
    """Panels side by side, in each the same lines by name, on logarithmic axes; x at the places that are given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(1.5 + 4.5 * len(panels), 4.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(sheet)
    for panel, (name, curves) in zip(sheet.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (label, (across, up)) in enumerate(curves.items()):
            colour = INK if number == 0 else COLOURS[(number - 1) % len(COLOURS)]
            dashes = DASHES[max(0, number - 1) // len(COLOURS) % len(DASHES)]
            panel.plot(across, up, color=colour, linestyle=dashes, marker="o", markersize=3.5, lw=1.6, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        places = sorted({place for across, _ in curves.values() for place in across})
        panel.set_xticks(places, [f"{place:g}" for place in places])
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.yaxis.set_minor_formatter("{x:,g}")
        panel.tick_params(which="both", labelsize=8.5, colors=FAINT)
        panel.grid(axis="y", which="both", lw=0.4, alpha=0.4)
        panel.set_title(name, loc="left", fontsize=10, color=INK)
        panel.set_xlabel(x, color=INK)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    sheet.axes[0].set_ylabel(y, color=INK)
    handles, labels = sheet.axes[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=8.5)
    sheet.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    sheet.savefig(file, format="png")


def _seeds(found: History | Sequence[History]) -> list[History]:
    return list(found) if isinstance(found, Sequence) else [found]


def _scores(run: History, part: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    rows = [row for row in run.rows if row.get(part) and row[part]["score"] is not None]
    seconds, steps, scores = (
        [row["seconds"] for row in rows],
        [row["step"] for row in rows],
        [row[part]["score"] for row in rows],
    )
    return np.array(seconds, float), np.array(steps, float), np.array(scores, float)


def _curve(seeds: Sequence[History], axis: str, part: str) -> Curve:
    """Median, lowest and highest over the seeds, first rows together, then second rows, and so on.

    Seeds of one run are evaluated at about the same steps and times; a row stands at the median of these. A seed that
    ended early keeps its last score, because that is the network it leaves."""
    columns = [_scores(run, part) for run in seeds]
    length = max(len(scores) for *_, scores in columns)
    held = np.array([np.pad(scores, (0, length - len(scores)), mode="edge") for *_, scores in columns])
    places = np.full(held.shape, np.nan)
    for row, (seconds, steps, _) in zip(places, columns, strict=True):
        row[: len(steps)] = seconds if axis == "seconds" else steps
    at = np.maximum.accumulate(np.nanmedian(places, axis=0))
    return at, np.median(held, axis=0), held.min(axis=0), held.max(axis=0)


def _line(panel: Axes, curve: Curve, name: str, colour: str, dashes: Any) -> None:
    grid, middle, lowest, highest = curve
    if (lowest < highest).any():
        panel.fill_between(grid, lowest, highest, color=colour, alpha=0.18, linewidth=0)
    few = grid.size <= 25
    panel.plot(
        grid,
        middle,
        color=colour,
        linestyle=dashes,
        linewidth=1.8,
        label=name,
        marker="o" if few else "",
        markersize=3.2,
    )
    panel.plot(grid[-1:], middle[-1:], color=colour, marker="o", markersize=5.5, linestyle="")


def _dress(panel: Axes, curves: Sequence[Curve], axis: str) -> None:
    """A logarithmic axis where the runs cover more than a factor of 30, and nothing on the page that says nothing."""
    first = min((float(grid[grid > 0][0]) for grid, *_ in curves if (grid > 0).any()), default=1.0)
    last = max(float(grid[-1]) for grid, *_ in curves)
    if last > 30 * first:
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(_plain)
    else:
        panel.set_xlim(left=0)
    panel.set_xlabel(
        "training seconds" if axis == "seconds" else "steps (a mini-batch, or a sweep over all rows)", color=INK
    )
    panel.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#b0b0b0")
    panel.tick_params(colors=FAINT, which="both", labelcolor=INK, labelsize=9)


def _plain(value: float, _position: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _scale(
    panel: Axes, drawn: Mapping[str, Sequence[History]], part: str, floors: Mapping[str, float], low: float, high: float
) -> None:
    """Set the axis of the scores.

    Where the scores come near 1 and started far below, the axis is logarithmic in 1 - score: there 0.95 and 0.975
    differ as much as 0.9 and 0.95. A start far below everything else is cut off."""
    ends = [float(_scores(run, part)[2][-1]) for seeds in drawn.values() for run in seeds]
    top, bottom = max([high, *floors.values()]), min([*ends, *floors.values()])
    spread = max(top - bottom, 0.02)
    bottom = max(min(low, bottom), bottom - max(2 * spread, 0.6 if top > 0.9 else 0.0))
    if top > 0.9 and top - bottom > 0.15 and 1 - top < 0.3 * (1 - bottom):
        rest = max((1 - top) / 2, 0.003)  # keeps the axis finite at 1
        panel.set_yscale("function", functions=(partial(_nines, rest), partial(_scores_of, rest)))
        bottom, top = bottom - 0.05 * (1 - bottom), min(top + (1 - top) / 5 + rest / 5, 1.0)
        panel.set_yticks([tick for tick in TICKS if bottom <= tick <= top])
        panel.yaxis.set_major_formatter(_plain)
        panel.set_ylim(bottom, top)
    else:
        margin = 0.05 * max(top - bottom, 0.1)
        panel.set_ylim(bottom - margin, top + margin)


def _nines(rest: float, score: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(-np.log(np.maximum(1 + rest - np.asarray(score, float), 1e-9)))


def _scores_of(rest: float, place: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 + rest - np.exp(-np.asarray(place, float)))


def _floors(panel: Axes, floors: Mapping[str, float], *, label: bool) -> None:
    """Dashed lines; their names stand to the right of the last panel, moved apart where they would touch."""
    above = -math.inf
    for name, score in sorted(floors.items(), key=lambda item: item[1]):
        panel.axhline(score, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1.5)
        if not label:
            continue
        height = panel.transAxes.inverted().transform(panel.transData.transform((1.0, score)))[1]
        above = max(height, above + 0.055, 0.0)
        words = f"{name} {score:.3f}" + (" (below)" if height < 0 else "")
        panel.annotate(words, (1.02, above), xycoords="axes fraction", fontsize=9, color=INK, va="center")


def _score_label(run: History, part: str) -> str:
    name = {"r2": "R²", "accuracy": "accuracy"}.get(str(run.about.get("score_name")), "score")
    return f"{part} {name} of the deployed network"
