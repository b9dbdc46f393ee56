"""`piecework show`: table and figure of finished runs. Nothing in their folders is executed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import ShowOptions
from .parse import parse

if TYPE_CHECKING:
    from ..checkpoint import RunFolder
    from ..history import History
    from ..timeline import Timeline

SHOW = "piecework show RUN [RUN ...] [--out FILE] [--timeline]"
PICTURE, TIMELINE_PICTURE = "show.png", "timeline.png"


def show_command(argv: Sequence[str]) -> int:
    """`piecework show`."""
    chosen, standing = parse(
        ShowOptions,
        argv,
        usage=SHOW,
        about="Print a table of finished runs and draw their scores. RUN is a run folder, or that of a comparison.",
    )
    from ..training import BadInput

    if not standing:
        raise BadInput(f"show takes at least one run folder: {SHOW}")
    runs = [run for name in standing for run in _runs(Path(name))]
    if chosen.timeline:
        _timeline(chosen, runs)
        return 0
    if chosen.between is not None:
        raise BadInput("--between is for --timeline; give that too")
    histories = [_history(run) for run in runs]
    labels = _labels([run.path for run in runs])
    _print(labels, histories)
    path = Path(chosen.out) if chosen.out is not None else Path(standing[0]) / PICTURE
    if len(runs) == 1:
        _recipe_line(runs[0])
    draw(dict(zip(labels, histories, strict=True)), path)
    return 0


def _runs(path: Path) -> list[RunFolder]:
    """The run of a folder, or the runs in the folder of a comparison, in the order of their names."""
    from ..checkpoint import RECIPE, RunFolder
    from . import folders

    folders.existing(str(path))
    if not (path / RECIPE).exists():
        inside = sorted(child for child in path.iterdir() if child.is_dir() and (child / RECIPE).exists())
        if inside:
            return [RunFolder(child) for child in inside]
    run = RunFolder(path)
    _ = run.recipe  # refuses what is no run
    return [run]


def _history(run: RunFolder) -> History:
    """The rows of a run, with what its recipe says where it was killed before its first summary."""
    from .. import evaluation

    history, recipe = run.history(), run.recipe
    found = recipe.get("data")
    data = found if isinstance(found, dict) else {}
    told = {"method": recipe.get("method"), "data": data.get("name"), "task": data.get("task")}
    if told["task"] in ("binary", "multiclass", "regression"):
        told["score_name"] = evaluation.score_name(told["task"])
    for key, value in told.items():
        if history.about.get(key) is None:
            history.about[key] = value
    return history


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names for the runs: that of the folder, or the whole path where two are alike."""
    names = [path.resolve().name for path in paths]
    alike = len(set(names)) < len(names)
    labels = [str(path) for path in paths] if alike else names
    if len(set(labels)) < len(labels):
        labels = [f"{number}: {label}" for number, label in enumerate(labels, start=1)]
    return labels


def _timeline(chosen: ShowOptions, runs: Sequence[RunFolder]) -> None:
    """Of each run: a table of who waited for whom, and a picture of some steps."""
    import io

    from .. import storage
    from ..timeline import TIMELINE
    from ..timeline_figure import draw as draw_timeline
    from ..timeline_figure import window
    from ..training import BadInput

    if chosen.out is not None and len(runs) > 1:
        raise BadInput("--out is for the picture of one timeline; show one run, or leave it out")
    for run in runs:
        timeline = run.waits()
        if timeline is None or not timeline.waits:
            raise BadInput(
                f"{run.path} has no timeline ({TIMELINE}): runs on several ranks leave one when they end; leave out "
                "--timeline"
            )
        between = window(timeline.waits) if chosen.between is None else chosen.between
        if not between[0] < between[1]:
            raise BadInput(f"--between takes two moments, the earlier first; got {between[0]:g} and {between[1]:g}")
        _print_shares(run, timeline)
        picture = io.BytesIO()
        title = f"{_harmless(run.path.resolve().name)}: who waits for whom"
        draw_timeline(timeline.waits, picture, between, title=title)
        path = Path(chosen.out) if chosen.out is not None else run.path / TIMELINE_PICTURE
        storage.replace_bytes(path, picture.getvalue())
        print(f"figure   {path}: {between[0]:.4g} to {between[1]:.4g} s; --between S S for another part")


def _print_shares(run: RunFolder, timeline: Timeline) -> None:
    from ..timeline_figure import shares
    from .tables import console, table

    headings = ["rank", "at work", "waits", "messages", "most for", "longest", "in step"]
    rows = [
        (
            str(one.rank),
            f"{1 - one.waiting - one.messages:.1%}",
            f"{one.waiting:.1%}",
            f"{one.messages:.1%}",
            "-" if one.most_for is None else f"rank {one.most_for} ({one.part_for:.0%})",
            f"{1000 * one.longest:.1f} ms",
            str(one.longest_step),
        )
        for one in shares(timeline.waits)
    ]
    left_out = f", and {timeline.left_out:,} in the middle that were not kept" if timeline.left_out else ""
    print(f"timeline {run.path}: {len(timeline.waits):,} waits{left_out}; at work is all that was no waiting")
    console().print(table(headings, rows))


def _print(labels: Sequence[str], histories: Sequence[History]) -> None:
    from .tables import clean, console, duration, figure, number, score_word, table

    summaries = [history.summary() for history in histories]
    words = {score_word(summary.get("score_name")) for summary in summaries}
    score = words.pop() if len(words) == 1 else "score"
    headings = ["run", "method", "data", "ended by", f"train {score}", "validation", f"test {score}", "test loss"]
    headings += ["steps", "seconds", "parameters"]
    rows = [
        (
            label,
            clean(summary.get("method") or "-", 30),
            clean(summary.get("data") or "-", 40),
            clean(summary.get("stopped_by") or "not ended", 20),
            *(figure(summary.get(part), "score") for part in ("train", "validation", "test")),
            figure(summary.get("test"), "loss", ".4g"),
            number(summary.get("steps"), ",d"),
            duration(summary.get("seconds")),
            number(summary.get("parameters"), ",d"),
        )
        for label, summary in zip(labels, summaries, strict=True)
    ]
    console().print(table(headings, rows, left=4))


def _recipe_line(run: RunFolder) -> None:
    from .tables import clean

    recipe = run.recipe
    told = recipe.get("settings")
    settings = told if isinstance(told, dict) else {}
    said = ", ".join(f"{key}={value}" for key, value in settings.items())
    print(f"settings {clean(said, 300)}" if said else "no settings")
    if recipe.get("command"):
        print(f"command  {clean(recipe['command'], 300)}")


def draw(
    histories: Mapping[str, Any],
    path: Path,
    *,
    floors: Mapping[str, float] | None = None,
    title: str = "",
    say: bool = True,
) -> None:
    """Draw the runs into a PNG file and say where it is. What has that name is replaced, a link too, not followed."""
    from .. import storage
    from ..history import figure

    part = _part(histories)
    if part is None:
        print("no figure: no run has a row yet")
        return
    drawn = {_harmless(label): history for label, history in histories.items()}
    with tempfile.TemporaryDirectory() as folder:
        picture = os.path.join(folder, "figure.png")
        figure(drawn, picture, floors=floors, title=_harmless(title), part=part)
        storage.replace_bytes(path, Path(picture).read_bytes())
    if say:
        print(f"figure   {path}")


def _part(histories: Mapping[str, Any]) -> str | None:
    """The part that all runs have scores of: test if possible."""
    runs = [run for some in histories.values() for run in (some if isinstance(some, list) else [some])]
    scored = [run for run in runs if run.rows]
    for part in ("test", "validation", "train"):
        if scored and all(any(_score(row, part) is not None for row in run.rows) for run in scored):
            return part
    return None


def _score(row: Mapping[str, Any], part: str) -> Any:
    return (row.get(part) or {}).get("score")


def _harmless(label: str) -> str:
    """A label without matplotlib's special signs: it would read formulas, and leave out what begins with _."""
    from .tables import clean

    return clean(label, 80).replace("$", r"\$").lstrip("_") or "run"
