"""`piecework compare`: several methods on the same rows, in one table and one figure."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import CompareOptions
from .parse import options, read, share_out
from .results import Outcome

if TYPE_CHECKING:
    from ..data import Dataset
    from ..group import Group
    from ..progress import Progress
    from .plan import Plan
    from .running import Prepared
    from .specs import Entry

COMPARE = "piecework compare [DATA] [run options] --methods METHOD[:SETTING=VALUE,...] ..."
SECONDS = 10.0
"""Training seconds of each run, unless a limit is given."""

METHODS = ("admm", "adam", "lbfgs")
VALIDATION = 0.1
"""The part of the training rows that --tune chooses by, unless another is given."""


def compare_command(argv: Sequence[str]) -> int:
    """`piecework compare`."""
    from ..training import BadInput
    from . import specs

    words = share_out(argv, options(CompareOptions))
    chosen = read(CompareOptions, words, usage=COMPARE, about=_about())
    if len(words.standing) > 1:
        raise BadInput(f"'{words.standing[1]}' stands alone; the methods follow --methods: {COMPARE}")
    comparison = chosen.comparison
    found = specs.entries(comparison.methods or METHODS)
    notes = specs.require_known(found, comparison.tune)
    for entry in found:
        specs.candidates(entry, comparison.tune)  # values that do not fit are refused before any training
    if comparison.seeds < 1:
        raise BadInput(f"--seeds must be at least 1, got {comparison.seeds}")
    from . import folders
    from .running import ranks

    folders.refuse_existing(chosen.output.out, overwrite=chosen.output.overwrite)
    with ranks(chosen.training) as group:
        work = _Comparison(words.standing[0] if words.standing else "digits", chosen, found, group)
        return work.run(notes)


def _about() -> str:
    return (
        f"Train several methods on the same rows, {SECONDS:g} training seconds each unless a limit is given, and leave "
        "a folder with a run folder per method, compare.json and compare.png. Simple models on the same rows are "
        f"floors in the table. Without --methods: {' '.join(METHODS)}."
    )


class _Comparison:
    """The runs of one comparison, in order: seed by seed, method by method."""

    def __init__(self, source: str, chosen: CompareOptions, entries: Sequence[Entry], group: Group) -> None:
        self.source, self.entries, self.group = source, list(entries), group
        self.output, self.tune, self.seeds = chosen.output, chosen.comparison.tune, chosen.comparison.seeds
        training, data = chosen.training, chosen.data
        if all(limit is None for limit in (training.steps, training.epochs, training.seconds, training.patience)):
            training = dataclasses.replace(training, seconds=SECONDS)
        if self.tune and not data.validation:
            data = dataclasses.replace(data, validation=VALIDATION)
        self.training, self.data, self.network = training, data, chosen.network
        self.say = group.rank == 0 and not self.output.json
        self.outcomes: list[Outcome] = []
        self.floors: list[dict[str, Any]] = []
        self.best: dict[str, tuple[dict[str, list[str]], list[dict[str, Any]]]] = {}
        self.root = Path()

    def run(self, notes: Sequence[str]) -> int:
        """Everything; the exit status."""
        from ..progress import Progress
        from . import results
        from .running import load

        seeds = range(self.training.seed, self.training.seed + self.seeds)
        data = load(self._plan(self.entries[0], seeds[0]), self.group)
        prepared = [self._prepare(entry, seeds[0], data) for entry in self.entries]  # refusals come before any training
        batch_size = self.training.batch_size
        if batch_size is not None and all(one.training.batches == "full" for one in prepared):
            from ..training import BadInput

            raise BadInput("all these methods take all rows in each step, so --batch-size means nothing; leave it out")
        self._start()
        if self.say:
            self._introduce(prepared, notes)
        del prepared
        try:
            with Progress(quiet=not self.say) as progress:
                for seed in seeds:
                    if seed != seeds[0]:
                        data = load(self._plan(self.entries[0], seed), self.group)
                    for entry in self.entries:
                        self._one(entry, seed, data, progress)
                    self._floors(seed, data, progress)
        finally:
            if self.group.rank == 0 and any(outcome.history for outcome in self.outcomes):
                results.write(self.root, self.outcomes, self.floors, title=self._title(data))
        failed = [outcome for outcome in self.outcomes if outcome.failed]
        if self.group.rank == 0:
            if self.output.json:
                print(json.dumps(results.summaries(self.root, self.outcomes, self.floors), allow_nan=False))
            else:
                results.show(self.root, self.outcomes, self.floors)
            for outcome in failed:
                print(f"piecework: error: {outcome.entry.label}: {outcome.failed}", file=sys.stderr)
        return 3 if failed else 0

    def _plan(self, entry: Entry, seed: int) -> Plan:
        from .network import for_method
        from .plan import Plan, seeded

        return Plan(
            source=self.source,
            data=self.data,
            network=for_method(self.network, entry.method),
            training=dataclasses.replace(self.training, seed=seed),
            name=entry.name,
            method=seeded(entry.method, seed, given="--seed" in entry.given),
        )

    def _prepare(self, entry: Entry, seed: int, data: Dataset) -> Prepared:
        """Bind a method; a batch size does not speak to those that take all rows."""
        from .running import prepare

        return prepare(self._plan(entry, seed), data, self.group, mixed=True)

    def _start(self) -> None:
        from . import folders

        self.root = folders.of_comparison(
            self.output.out,
            f"{folders.source(self.source)}-compare",
            overwrite=self.output.overwrite,
            group=self.group,
        )

    def _introduce(self, prepared: Sequence[Prepared], notes: Sequence[str]) -> None:
        from .train import data_line, limits_in_words, network_line

        print(data_line(prepared[0]))
        print(network_line(prepared[0]))
        seeds = f", {self.seeds} seeds" if self.seeds > 1 else ""
        ranks = f", {self.group.size} ranks" if self.group.size > 1 else ""
        labels = ", ".join(
            f"{entry.label} ({one.loss.name} loss)" for entry, one in zip(self.entries, prepared, strict=True)
        )
        print(f"methods  {labels}; {limits_in_words(prepared[0].limits)} each{seeds}{ranks}")
        for note in notes:
            print(f"note     {note}")
        sys.stdout.flush()

    def _title(self, data: Dataset) -> str:
        from . import network

        return f"{data.name}, {network.shape(self.network, data)}, {len(data.train):,} training rows"

    def _one(self, entry: Entry, seed: int, data: Dataset, progress: Progress) -> None:
        """Tune a method, with the first seed, and run it."""
        from . import specs
        from .folders import short

        if entry.label not in self.best:
            self.best[entry.label] = self._tuned(entry, seed, data, progress)
        best, tried = self.best[entry.label]
        chosen = entry.with_settings(best) if best else entry
        name = short(entry.label) + (f"-seed{seed}" if self.seeds > 1 else "")
        title = entry.label + (f" {specs.in_words(best)}" if best else "") + (f" seed {seed}" if self.seeds > 1 else "")
        outcome = self._train(chosen, seed, data, progress, name, title)
        outcome.best, outcome.tried = best, tried
        self.outcomes.append(outcome)

    def _tuned(
        self, entry: Entry, seed: int, data: Dataset, progress: Progress
    ) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
        """The settings with the best validation score (ties: the lower validation loss), and all that were tried."""
        from ..history import improves
        from . import specs
        from .folders import short

        best: dict[str, list[str]] = {}
        figures: dict[str, Any] = {"score": None, "loss": None}
        tried = []
        for number, one in enumerate(specs.candidates(entry, self.tune)):
            more = {option: values for option, values in one.given.items() if option not in entry.given}
            words = specs.in_words(more)
            name = f"tuning/{short(f'{entry.label} {words}')}"
            outcome = self._train(one, seed, data, progress, name, f"{entry.label} tuning {words}")
            found = outcome.figures.get("validation") or {"score": None, "loss": None}
            tried.append({"settings": words, "validation": found})
            if number == 0 or improves(found, figures):
                best, figures = more, found
        return best, tried

    def _train(self, entry: Entry, seed: int, data: Dataset, progress: Progress, name: str, title: str) -> Outcome:
        """A run in its folder. A method that cannot go on is reported, and does not end the comparison."""
        from ..training import DidNotSolve
        from . import folders
        from .running import train

        prepared = self._prepare(entry, seed, data)
        path = self.root / name
        run, resume = folders.start(str(path), "", prepared.recipe(), overwrite=self.output.overwrite, group=self.group)
        limits = {key: prepared.limits[key] for key in ("steps", "epochs", "seconds")}
        _forget_peak()
        try:
            history = train(prepared, run, resume=resume, on_row=progress.run(title, **limits))
        except DidNotSolve as error:
            return Outcome(entry, seed, path, None, failed=str(error))
        return Outcome(entry, seed, path, history, history.summary())

    def _floors(self, seed: int, data: Dataset, progress: Progress) -> None:
        """Simple models on the rows of this seed; rows that are the same again are not fitted again."""
        from .. import floors
        from . import network
        from .plan import fingerprint

        if self.group.rank != 0:
            return
        progress.run("floors")
        print_of = fingerprint(data)
        known = [one for one in self.floors if one["fingerprint"] == print_of]
        simple = [one for one in known if one["method"] != "floor: random features"]
        added = [{**one, "seed": seed} for one in simple] or [
            {**floor.summary(data), "seed": seed, "fingerprint": print_of} for floor in floors.simple(data)
        ]
        if any(entry.name == "admm" for entry in self.entries):
            refitted = floors.random_features(data, network.build(self.network, data, seed))
            added += [{**refitted.summary(data), "seed": seed, "fingerprint": print_of}] if refitted else []
        self.floors += added


def _forget_peak() -> None:
    """Let the process's high-water mark start again, where the system can (Linux): else a run would report that of the
    runs before it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return
