"""The loop: step, evaluate the deployed network, write a row, save, stop. It knows nothing about methods.

Whoever dislikes it writes his own:

    while not content:
        training.step(batch)
    training.sync()
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from . import formats
from .batches import FullBatches, MiniBatches, deal
from .checkpoint import HISTORY, MODEL, TRAINING, RunFolder, from_rank_zero, load_into
from .evaluation import device_of, score_name
from .group import Group, current
from .history import History, Row
from .limits import Best, Limits, limits
from .losses import Loss
from .meter import Meter, exchange_notes, merged_metrics, merged_parts, own_sums
from .timeline import waits_of
from .training import BadInput, Batch, PeerLost, Training

if TYPE_CHECKING:
    from .data import Dataset

SLICE = 0.05
"""With a limit in seconds, and without `evaluate_every`, there is a row at least about every this part of the limit."""


def fit(
    training: Training[Batch],
    data: Dataset,
    *,
    loss: Loss,
    group: Group | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    seconds: float | None = None,
    batch_size: int = 128,
    evaluate_every: int | None = None,
    stop_at: float | None = None,
    patience: int | None = None,
    seed: int = 0,
    run: RunFolder | str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_row: Callable[[Row], Any] | None = None,
) -> History:
    """Train until something stops it; on return `training.model` is the deployed network. Collective over the ranks.

    training, loss: a method bound to a model, and the user's loss, which rows report (without label smoothing).
    data: its `train` part is stepped on; `validation` may stop the run and choose the network; `test` is only reported.
    group: the ranks, for a Training that does not say which it was bound with (`group`); by default the running torch
        process group, else one.
    steps, epochs, seconds: limits, in all (a resumed run counts from its first start). A step is one `training.step`;
        an epoch one pass of mini-batches over the training rows, or one step of a full-batch method; seconds are spent
        in steps and in fetching their rows, on rank 0's clock, and evaluation is not counted.
    batch_size: rows of a mini-batch on each rank; not used by full-batch methods. `MiniBatches` says how rows are
        dealt.
    evaluate_every: steps between rows; by default an epoch (for full-batch methods that is a step), and with a limit in
        seconds such that there are some 20 to 600 rows. Several ranks with such a limit look at the clock together, at
        evaluations, so there rows may come more often than asked for.
    stop_at: stop when the validation score is at least this.
    patience: stop after so many evaluations in a row without a better validation score (ties: a lower loss). The best
        weights on validation are then deployed, whatever stopped the run, while the run folder keeps those to go on
        from too. The evaluation at the end of a run counts, wherever it falls.
    seed: decides the order of the rows, with the epoch; the method has its own.
    run: a folder to make (or a `RunFolder` made already), saved at evaluations and at the end.
    resume: go on from that folder, as if never stopped, on as many ranks with the same seed and batch size.
    on_row: called with each row on rank 0; the run ends if it returns True.

    A Training may have `words`, a dictionary of words about its last step; rank 0's are put into the row. A row's step
    figures are, for mini-batch methods, means over the steps since the last row (`loss` weighted by rows),
    for full-batch methods those of the last step; over the ranks that report them, `loss` is again weighted by rows and
    any other figure averaged. `bytes_sent` and `rounds` are those of the rank that sent most, without evaluation.

    A train loss that is not finite stops the run ("diverged"). Ctrl-C, if there is a run folder, ends the step, saves
    and raises KeyboardInterrupt (on several ranks: at the next evaluation, on all); a second one raises at once.
    Raises BadInput for settings, data or a folder that cannot be used, CannotTrain for a loss that does not fit the
    data, PeerLost when a rank is lost."""
    group = getattr(training, "group", None) or group or current()
    device = device_of(training.model)
    batch_size, seed = int(batch_size), int(seed)  # numpy's integers too
    _check(data)
    loss.check(data.task, data.num_outputs)
    feed = deal(training, data.train, rank=group.rank, size=group.size, batch_size=batch_size, seed=seed, device=device)
    bounds = limits(
        data,
        steps=steps,
        epochs=epochs,
        seconds=seconds,
        stop_at=stop_at,
        patience=patience,
        evaluate_every=evaluate_every,
        steps_per_epoch=feed.steps_per_epoch,
        full=training.batches == "full",
        part=SLICE,
    )
    fixed = {"seed": seed, "batch_size": batch_size if training.batches == "mini" else None, "rows": len(data.train)}
    folder = _folder(training, data, run, resume, group)
    loop = _Loop(training, data, loss.plain(), group, feed, bounds, fixed, folder, on_row)
    if resume:
        assert folder is not None
        loop.resume(folder)
    return loop.run()


def _check(data: Dataset) -> None:
    for name, part in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if part is None:
            continue
        if len(part.y) != len(part.x) or len(part.x) == 0:
            raise BadInput(
                f"the {name} part has {len(part.x)} rows and {len(part.y)} targets; it needs as many, and at least one"
            )
        if data.task == "regression" and part.y.dim() != 2:
            raise BadInput(
                f"the {name} targets of a regression must have shape (rows, outputs), got {tuple(part.y.shape)}"
            )


def _folder(
    training: Training[Batch], data: Dataset, run: RunFolder | str | os.PathLike[str] | None, resume: bool, group: Group
) -> RunFolder | None:
    if run is None:
        if resume:
            raise BadInput("resume=True needs run=, the folder to go on from")
        return None
    if isinstance(run, RunFolder):
        return run
    if resume:
        return RunFolder(run)
    recipe = {"method": type(training).__name__, "data": data.name, "model": {"kind": type(training.model).__name__}}
    return RunFolder.create(run, recipe, group=group)


@contextmanager
def _interrupts(deferred: bool) -> Iterator[Callable[[], bool]]:
    """Let a first Ctrl-C only be noted, so that no step is left half done. Only Python's own handler is replaced."""
    asked = False

    def note(_number: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    main = threading.current_thread() is threading.main_thread()
    deferred = deferred and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if deferred:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        if deferred:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _Loop:
    """One run. Everything that decides what happens next is equal on all ranks after each evaluation."""

    def __init__(
        self,
        training: Training[Batch],
        data: Dataset,
        loss: Loss,
        group: Group,
        feed: FullBatches | MiniBatches,
        bounds: Limits,
        fixed: dict[str, Any],
        folder: RunFolder | None,
        on_row: Callable[[Row], Any] | None,
    ) -> None:
        self.training, self.data, self.loss, self.group, self.feed = training, data, loss, group, feed
        self.bounds, self.fixed, self.folder, self.on_row = bounds, fixed, folder, on_row
        self.step, self.seconds, self.bytes_sent, self.rounds = 0, 0.0, 0, 0
        self.pace: tuple[int, float] | None = None  # steps and seconds between the last two evaluations
        self.best = Best() if bounds.patience is not None else None
        self.meter = Meter(mean=training.batches == "mini")
        self.device = device_of(training.model)
        self.next_save = time.monotonic() + (folder.save_every if folder else math.inf)
        self.counted = (0, 0)
        method = type(training).__name__
        if folder is not None:
            recipe = from_rank_zero(group, lambda: str(folder.recipe.get("method", method)).encode())
            method = recipe.decode()
        about = {
            "method": method,
            "data": data.name,
            "task": data.task,
            "rows": len(data.train),
            "ranks": group.size,
            "score_name": score_name(data.task),
            "loss": loss.name,
            "seed": fixed["seed"],
            "note": data.note,
        }
        self.history = History(about=about, path=folder.path / HISTORY if folder and group.rank == 0 else None)

    def run(self) -> History:
        self.history.stopped_by = self.bounds.reached(self.step, self.seconds)
        if self.group.size > 1:
            self.group.any(False)  # the ranks' clocks start together
        self.counted = (self.group.bytes_sent, self.group.rounds)
        if self.history.stopped_by:  # a resumed run that has nothing left to do
            self.training.sync()
        with _interrupts(self.folder is not None) as asked:
            while self.history.stopped_by is None:
                self._advance(asked)
                self._evaluate(asked)
        self._write_timeline()
        if self.best is not None:
            self.best.deploy(self.training.model)
        if self.history.stopped_by == "interrupted" or (asked() and self.group.size == 1):
            raise KeyboardInterrupt
        return self.history

    def _advance(self, asked: Callable[[], bool]) -> None:
        """Step until the next evaluation. On one rank the clock and Ctrl-C are looked at each step; on several never,
        because that would take a message a step."""
        bounds, first = self.bounds, self.step
        target = bounds.steps if self.group.size == 1 else self._next_evaluation()
        waits = waits_of(self.group)
        if waits is not None:
            waits.begin(self.seconds)
        started = time.perf_counter()
        while True:
            batch = self.feed.batch(self.step)
            self.meter.add(self._step(batch), len(batch))
            self.step += 1
            if self.step == target:
                break
            if self.group.size == 1 and (asked() or bounds.due(self.step, self.seconds, time.perf_counter() - started)):
                break
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # queued work is training time too
        spent = time.perf_counter() - started
        if waits is not None:
            waits.pause()
        self.seconds += spent
        self.pace = (self.step - first, spent)

    def _step(self, batch: Batch) -> dict[str, torch.Tensor]:
        number = self.step + 1
        if hasattr(self.group, "step"):
            cast(Any, self.group).step = number
        try:
            return self.training.step(batch)
        except PeerLost as lost:
            if lost.step is not None:
                raise
            cause = str(lost.__cause__ or "")
            raise PeerLost(
                rank=lost.rank, peer=lost.peer, verb=lost.verb, timeout=lost.timeout, step=number, cause=cause
            ) from lost

    def _next_evaluation(self) -> int:
        """The step of several ranks' next evaluation; computed alike on all, from figures that they agreed on."""
        bounds, every = self.bounds, self.bounds.evaluate_every
        soonest, latest = self.step + 1, bounds.steps or sys.maxsize
        if bounds.seconds is not None:
            # What the pace of the last interval allows in 5 % of the budget, or in what is left of it; at most four
            # times as many steps as then, so that one fast interval does not overshoot.
            taken, spent = self.pace or (1, math.inf)
            left = min(SLICE * bounds.seconds, bounds.seconds - self.seconds)
            latest = min(latest, self.step + max(1, min(math.ceil(left * taken / max(spent, 1e-9)), 4 * taken)))
            soonest += int(bounds.spacing(self.seconds) * taken / max(spent, 1e-9))
        return min(latest, -(-soonest // every) * every)

    def _evaluate(self, asked: Callable[[], bool]) -> None:
        group = self.group
        self.bytes_sent += group.bytes_sent - self.counted[0]
        self.rounds += group.rounds - self.counted[1]
        self.training.sync()
        spent = {"seconds": self.seconds, "pace": self.pace, "bytes_sent": self.bytes_sent, "rounds": self.rounds}
        sums = own_sums(self.training.model, self.data, self.loss, group)
        words = dict(getattr(self.training, "words", {}))
        told = exchange_notes(group, {**spent, "sums": sums, "metrics": self.meter.read(), "words": words})
        self.seconds, self.pace = told[0]["seconds"], tuple(told[0]["pace"])
        row = self._row(told)
        self.history.about.setdefault("parameters", sum(one.numel() for one in self.training.model.parameters()))
        if self.best is not None:
            self.best.look(row, self.training.model)
            self.history.deployed_step = self.best.step
        if group.rank == 0 and self.folder is not None:
            self.history.path = self.folder.path / HISTORY  # rank 0 may be another one than at the start
        self.history.append(row)
        wish = "interrupted" if asked() else None
        try:
            if group.rank == 0 and self.on_row is not None and self.on_row(row) is True:
                wish = wish or "on_row"
        except KeyboardInterrupt:
            wish = "interrupted"
        told = exchange_notes(group, {"wish": wish, "save": time.monotonic() >= self.next_save})
        wishes = {note["wish"] for note in told}
        self.history.stopped_by = (
            ("interrupted" if "interrupted" in wishes else None)
            or self.bounds.verdict(row, self.best)
            or self.bounds.reached(self.step, self.seconds)
            or ("on_row" if "on_row" in wishes else None)
        )
        if self.folder is not None and (told[0]["save"] or self.history.stopped_by):
            self._save(self.folder)
        self.counted = (group.bytes_sent, group.rounds)

    def _write_timeline(self) -> None:
        waits, folder = waits_of(self.group), self.folder
        if waits is not None and folder is not None and self.group.size > 1:
            told = exchange_notes(self.group, waits.read())
            from_rank_zero(self.group, lambda: folder.write_timeline(told))

    def _row(self, told: list[dict[str, Any]]) -> Row:
        row: Row = {
            "step": self.step,
            "epoch": self.step / self.feed.steps_per_epoch,
            "seconds": self.seconds,
            "samples": self.feed.samples(self.step),
            **merged_parts([note["sums"] for note in told], self.data.task),
            "bytes_sent": max(note["bytes_sent"] for note in told),
            "rounds": max(note["rounds"] for note in told),
        }
        figures: dict[str, Any] = {**merged_metrics([note["metrics"] for note in told]), **told[0]["words"]}
        if taken := row.keys() & figures.keys():
            raise ValueError(f"the step reports {', '.join(sorted(taken))}, which rows have already; name it otherwise")
        return {**row, **figures}

    def _save(self, folder: RunFolder) -> None:
        started = time.monotonic()
        own = self.training.model.state_dict()
        best = self.best.weights if self.best is not None else None
        state = {
            **self.fixed,
            "step": self.step,
            "seconds": self.seconds,
            "bytes_sent": self.bytes_sent,
            "rounds": self.rounds,
            "parameters": self.history.about["parameters"],
            "best": self.best.state() if self.best is not None else None,
        }
        folder.save(
            own if best is None else best,
            self.training.state_dict(),
            state,
            summary=self.history.summary(),
            trajectory=None if best is None else own,
            group=self.group,
        )
        # A large state takes long to write: then rarer, so that saving stays a tenth of the run at most.
        took = time.monotonic() - started
        self.next_save = started + took + (max(folder.save_every, 9 * took) if folder.save_every else 0.0)

    def resume(self, folder: RunFolder) -> None:
        """Take up a run where its newest whole checkpoint left it; rows that came after it are made again."""
        found = load_into(self.training, folder, group=self.group)
        state, file = found.fit, folder.path / TRAINING
        for name, wanted in self.fixed.items():
            if state.get(name) != wanted:
                raise BadInput(
                    f"{folder.path} was trained with {name} {str(state.get(name))[:40]} and cannot go on with {wanted}"
                )
        if not all(formats.whole(state.get(name)) for name in ("bytes_sent", "rounds", "parameters")):
            raise BadInput(f"{file} is damaged: it lacks the counters of the run")
        self.step, self.seconds = state["step"], float(state["seconds"])
        self.bytes_sent, self.rounds = state["bytes_sent"], state["rounds"]
        self.history.about["parameters"] = state["parameters"]
        if self.best is not None and state.get("best") is not None:
            formats.require_weights(self.training.model, found.deployed, folder.path / MODEL)
            self.best = Best.of(state["best"], found.deployed, file)
            self.history.deployed_step = self.best.step
        rows = from_rank_zero(self.group, lambda: json.dumps(folder.history().rows).encode())
        self.history.rows = json.loads(rows)
        self.history.cut(self.step)
