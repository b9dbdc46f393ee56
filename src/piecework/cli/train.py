"""`piecework fit` and `piecework resume`: train, show progress, leave a run folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import OutputOptions, ResumeOptions, RunOptions
from .parse import near, options, parse, read, share_out

if TYPE_CHECKING:
    from ..checkpoint import RunFolder
    from ..group import Group
    from ..history import History
    from ..progress import Progress
    from .plan import Plan
    from .running import Prepared

FIT = "piecework fit [DATA] [run options] METHOD [settings]"
RESUME = "piecework resume RUN [--steps N | --seconds S]"
DEFAULT_DATA = "digits"


def plan_of(argv: Sequence[str]) -> tuple[Plan, RunOptions]:
    """The plan that the words behind `fit` make. Raises BadInput, and SystemExit(0) after a help."""
    from ..methods import METHODS
    from ..training import BadInput
    from .network import for_method
    from .plan import Plan, seeded

    own = options(RunOptions)
    words = share_out(argv, own, names=METHODS, elsewhere=_setting_of_a_method)
    chosen = read(RunOptions, words, usage=FIT, about=_about(), more=_methods_in_short())
    if len(words.standing) > 1 or words.name is None:
        raise BadInput(_no_method(words.standing))
    recipe = METHODS[words.name]

    def misplaced(option: str, _: Sequence[str]) -> str | None:
        return (
            f"{option} is a run option; it goes before the method: fit DATA {option} ... {words.name}"
            if option in own
            else None
        )

    settings = share_out(words.rest, options(recipe), elsewhere=misplaced)
    usage = f"piecework fit [DATA] [run options] {words.name} [settings]"
    method = read(recipe, settings, usage=usage, about=(recipe.__doc__ or "").strip(), pairs=True)
    if settings.standing:
        raise BadInput(f"'{settings.standing[0]}' stands behind {words.name}; DATA goes before it: {FIT}")
    given = any(option == "--seed" for option, _ in settings.given)
    plan = Plan(
        source=words.standing[0] if words.standing else DEFAULT_DATA,
        data=chosen.data,
        network=for_method(chosen.network, method),
        training=chosen.training,
        name=words.name,
        method=seeded(method, chosen.training.seed, given=given),
    )
    return plan, chosen


def _about() -> str:
    return (
        "Train a network on DATA (a name that `piecework data` lists, openml:NAME, or a csv, parquet or npz file; "
        f"{DEFAULT_DATA} if left out), and leave a run folder. METHOD may follow any option; its settings follow it."
    )


def first_line(recipe: Any) -> str:
    """The first sentence of a docstring, in one line."""
    text = " ".join((recipe.__doc__ or "").strip().split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".").replace("`", "")


def _methods_in_short() -> str:
    from ..methods import METHODS

    width = max(map(len, METHODS))
    lines = [f"  {name:{width}}  {first_line(recipe)}" for name, recipe in METHODS.items()]
    return "\n".join(["methods (piecework fit METHOD --help lists the settings)", *lines])


def _no_method(standing: Sequence[str]) -> str:
    from ..methods import METHODS

    names = ", ".join(METHODS)
    if len(standing) > 1:
        return f"there is no method '{standing[1]}'{near(standing[1], METHODS)}; there are {names}"
    if standing and (close := near(standing[0], METHODS)):
        return f"there is no method '{standing[0]}'{close}; there are {names}"
    return f"which method? {FIT}; the methods are {names}"


def _setting_of_a_method(option: str, behind: Sequence[str]) -> str | None:
    """Where an option that is no run option belongs."""
    from ..methods import METHODS

    having = [name for name, recipe in METHODS.items() if option in options(recipe)]
    named = next((word for word in behind if word in METHODS), None)
    if named in having:
        return f"{option} is a setting of {named}; it goes behind it: fit DATA {named} {option} ..."
    if having and named is None:
        return f"{option} is a setting of {', '.join(having)}, and goes behind the method"
    return None


def fit_command(argv: Sequence[str]) -> int:
    """`piecework fit`."""
    plan, chosen = plan_of(argv)
    from . import folders
    from .running import ranks

    folders.refuse_existing(chosen.output.out, overwrite=chosen.output.overwrite)
    with ranks(plan.training) as group:
        _fit(plan, chosen.output, group)
    return 0


def _fit(plan: Plan, output: OutputOptions, group: Group) -> None:
    from . import folders
    from .running import load, prepare

    prepared = prepare(plan, load(plan, group), group)
    if group.rank == 0 and not output.json:
        introduce(prepared)
    stem = f"{folders.source(plan.source)}-{plan.name}"
    run, resume = folders.start(output.out, stem, prepared.recipe(), overwrite=output.overwrite, group=group)
    _train_and_report(prepared, run, resume=resume, as_json=output.json)


def resume_command(argv: Sequence[str]) -> int:
    """`piecework resume`."""
    chosen, standing = parse(
        ResumeOptions,
        argv,
        usage=RESUME,
        about="Go on with a run, as if it had never stopped, to N steps or S training seconds in all.",
    )
    from ..checkpoint import RunFolder
    from ..training import BadInput
    from . import resuming
    from .running import ranks

    if len(standing) != 1:
        raise BadInput(f"resume takes one run folder, and was given {len(standing)}: {RESUME}")
    plan, record = resuming.plan_of(Path(standing[0]), chosen)
    resuming.require_something_to_do(plan, RunFolder(standing[0]), chosen)
    with ranks(plan.training) as group:
        _resume(plan, record, RunFolder(standing[0]), group, as_json=chosen.json)
    return 0


def _resume(plan: Plan, record: Mapping[str, Any], run: RunFolder, group: Group, *, as_json: bool) -> None:
    from . import resuming
    from .running import load, prepare, together

    resuming.require_ranks(run, group)
    data = load(plan, group)
    together(group, lambda: resuming.require_same(data, record, run.path))
    prepared = prepare(plan, data, group)
    if group.rank == 0 and not as_json:
        introduce(prepared)
    _train_and_report(prepared, run, resume=True, as_json=as_json)


def _train_and_report(prepared: Prepared, run: RunFolder, *, resume: bool, as_json: bool) -> None:
    from ..progress import Progress
    from .running import train

    first = prepared.group.rank == 0
    with Progress(quiet=as_json or not first) as progress:
        on_row = _watch(progress, prepared)
        try:
            history = train(prepared, run, resume=resume, on_row=on_row)
        except KeyboardInterrupt:
            if first:
                print(f"piecework: interrupted; piecework resume {run.path} goes on", file=sys.stderr)
            raise
    if first and as_json:
        print(json.dumps(history.summary(), allow_nan=False))
    elif first:
        report(history, run.path)


def _watch(progress: Progress, prepared: Prepared) -> Any:
    limits = prepared.limits
    return progress.run(prepared.plan.name, **{key: limits[key] for key in ("steps", "epochs", "seconds")})


def introduce(prepared: Prepared) -> None:
    """A line on the data, one on the network, one on the method."""
    plan, group = prepared.plan, prepared.group
    many = f", {group.size} ranks" if group.size > 1 else ""
    kind = "all rows in each step" if prepared.training.batches == "full" else "mini-batches"
    if sample := getattr(plan.method, "sample_rows", None):
        kind = f"{sample:,} rows in each step"
    print(data_line(prepared))
    print(network_line(prepared))
    print(f"method   {plan.name} on the {prepared.loss.name} loss, {kind}{many}; {limits_in_words(prepared.limits)}")
    sys.stdout.flush()


def data_line(prepared: Prepared) -> str:
    """The data set, its rows, and what was inferred."""
    from .tables import clean

    data = prepared.data
    held = f" + {len(data.validation):,} validation" if data.validation is not None else ""
    test = f" + {len(data.test):,} test" if data.test is not None else ""
    return f"data     {clean(data.name)}: {len(data.train):,} training{held}{test} rows; {clean(data.note)}"


def network_line(prepared: Prepared) -> str:
    """The network's widths and size."""
    from . import network

    plan = prepared.plan
    activation = f", {plan.network.activation}" if plan.network.model is None and plan.network.hidden else ""
    shape = network.shape(plan.network, prepared.data)
    return f"network  {shape}{activation}, {prepared.parameters():,} parameters, {plan.network.dtype}"


def limits_in_words(limits: Mapping[str, Any]) -> str:
    """The limits that a run has."""
    return ", ".join(_limit(name, value) for name, value in limits.items() if value is not None)


def _limit(name: str, value: Any) -> str:
    words = {"steps": "{} steps", "epochs": "{} epochs", "seconds": "{:g} s", "stop_at": "until validation {:g}"}
    words |= {"patience": "patience {}", "evaluate_every": "evaluated every {} steps"}
    return words[name].format(value)


def report(history: History, folder: Path) -> None:
    """The figures of a finished run, what they cost, and where the run is."""
    from .tables import console, duration, figure, number, score_word, stop, table

    summary = history.summary()
    shown = [(part, summary[part]) for part in ("train", "validation", "test") if summary[part] is not None]
    rows = [(part, figure(found, "loss", ".4g"), figure(found, "score")) for part, found in shown]
    to = console()
    to.print(table(["", f"{summary.get('loss') or ''} loss".strip(), score_word(summary["score_name"])], rows))
    cost = f"{summary['steps']:,} steps in {duration(summary['seconds'])} s: {stop(summary['stopped_by'])}"
    if (passes := passes_a_step(history.rows)) is not None:
        cost += f"; {number(passes, '.1f')} passes over the data a step"
    if summary["ranks"] and summary["ranks"] > 1:
        cost += (
            f"; each of {summary['ranks']} ranks sent {summary['bytes_sent']:,} bytes in {summary['rounds']:,} rounds"
        )
    if summary["deployed_step"] != summary["steps"]:
        cost += f"; the network of step {summary['deployed_step']:,} is kept, the best on validation"
    print(cost)
    print(f"run      {folder}")


def passes_a_step(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Passes over the training rows a step, on average, for the methods that count them: ADMM those of each step, the
    optimisers those so far."""
    told = [row["passes"] for row in rows if isinstance(row.get("passes"), int | float)]
    if told:
        return float(sum(told) / len(told))
    last = rows[-1] if rows else {}
    steps, total = last.get("step"), last.get("evaluations")
    return total / steps if isinstance(total, int | float) and steps else None
