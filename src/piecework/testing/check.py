"""What every method promises, as functions to call: `check_training(MyMethod())` runs them all.

A law takes a Case and returns nothing, or raises AssertionError with a sentence that says what does not hold."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import losses
from ..batches import deal
from ..checkpoint import RunFolder
from ..evaluation import merged, sums
from ..fit import fit
from ..formats import require_plain
from ..group import Group, Solo
from ..losses import Loss
from ..models import mlp
from ..training import Batch, CannotTrain, Method, Training, stream
from . import threads

if TYPE_CHECKING:
    from ..data import Dataset
    from ..history import History

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method and a small problem.

    method: the recipe; model: makes a network, with the same weights at each call; loss, data: what to learn;
    steps: how many (even) must lower the training loss by a tenth; batch_size: of mini-batch methods, a rank;
    ranks: numbers of ranks to run on; refused: makers of networks that the method must refuse."""

    method: Method
    model: Callable[[], nn.Module]
    loss: Loss
    data: Dataset
    steps: int = 6
    batch_size: int = 24
    ranks: tuple[int, ...] = (2, 3)
    refused: tuple[Callable[[], nn.Module], ...] = (nn.Flatten,)

    def bind(self, group: Group | None = None) -> Training[Batch]:
        """A fresh Training."""
        return self.method.bind(self.model(), self.loss, group=group or Solo())

    def fit(self, training: Training[Batch], group: Group | None = None, **settings: Any) -> History:
        """`fit` with this case's loss, data and batch size; for `steps` steps unless told otherwise."""
        settings = {"steps": self.steps, "batch_size": self.batch_size, "seed": 3, **settings}
        return fit(training, self.data, loss=self.loss, group=group or Solo(), **settings)


def check_training(
    method: Method,
    *,
    model: Callable[[], nn.Module] | None = None,
    loss: Loss | None = None,
    data: Dataset | None = None,
    steps: int = 6,
    batch_size: int = 24,
    ranks: Sequence[int] = (2, 3),
    refused: Sequence[Callable[[], nn.Module]] = (nn.Flatten,),
) -> None:
    """Hold a method to every law of the library, on one rank and on several in this process.

    method: a recipe, for example MyMethod(lr=0.1); model: makes a network, with the same weights at each call;
    loss, data: what to learn, by default three classes in five features; steps: how many must lower the training loss
    by a tenth; batch_size: of mini-batch methods; ranks: numbers of ranks; refused: makers of networks that `bind` must
    refuse with CannotTrain (one without parameters, unless told otherwise).

    Raises AssertionError, with the law and a sentence. A Training that is not deterministic is spared the laws that
    compare bits."""
    problem = data or classes()
    case = Case(
        method=method,
        model=model or partial(mlp, problem.num_features, [7], problem.num_outputs, seed=1, dtype=torch.float64),
        loss=loss or losses.auto(problem.task),
        data=problem,
        steps=steps,
        batch_size=batch_size,
        ranks=tuple(ranks),
        refused=tuple(refused),
    )
    for name, law in LAWS.items():
        try:
            law(case)
        except AssertionError as broken:
            raise AssertionError(f"{name.replace('_', ' ')}: {broken}") from broken


def classes(rows: int = 107, *, seed: int = 0) -> Dataset:
    """Three classes in five features, float64: the angle of the first two features, with noise."""
    from ..data import Dataset

    generator = stream(seed, rows)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    angle = torch.atan2(x[:, 1], x[:, 0]) + 0.1 * torch.randn(rows, generator=generator, dtype=torch.float64)
    y = ((angle + torch.pi) / (2 * torch.pi) * 3).long().clamp(0, 2)
    first, second = rows * 6 // 10, rows * 8 // 10
    parts = [Batch(x[rows], y[rows]) for rows in (slice(0, first), slice(first, second), slice(second, None))]
    return Dataset(
        name="angles",
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        task="multiclass",
        mean=torch.zeros(5, dtype=torch.float64),
        scale=torch.ones(5, dtype=torch.float64),
        classes=("left", "middle", "right"),
        target_mean=None,
        target_scale=None,
        note="made for tests",
    )


def weights(model: nn.Module) -> Weights:
    """A copy of a model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _hold(fact: bool, sentence: str) -> None:
    if not fact:
        raise AssertionError(sentence)


def _first_batch(case: Case, training: Training[Batch], group: Group) -> Batch:
    size = case.batch_size
    return deal(training, case.data.train, rank=group.rank, size=group.size, batch_size=size, seed=3).batch(0)


def it_learns(case: Case) -> None:
    """The deployed network's training loss falls by a tenth within the case's steps."""
    training = case.bind()
    rows, task = slice(0, len(case.data.train)), case.data.task
    before = merged([sums(training.model, case.data.train, rows, case.loss, task)], task)["loss"]
    after = case.fit(training).rows[-1]["train"]["loss"]
    _hold(
        before is not None and after is not None and after < 0.9 * before,
        f"the training loss went from {before} to {after} in {case.steps} steps",
    )


def same_seed_gives_the_same_model(case: Case) -> None:
    """Two runs are equal bit for bit, whatever the global generators hold."""
    found = []
    for seed in (0, 1):
        training = case.bind()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            case.fit(training)
        found.append(weights(training.model))
    _hold(not training.deterministic or same(*found), "two runs with one seed ended with different weights")


def stop_and_resume_is_one_run(case: Case) -> None:
    """Half the steps, a new process's worth of fresh objects, and the rest: the bits of an uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        whole = case.bind()
        rows = case.fit(whole, evaluate_every=1).rows
        case.fit(case.bind(), steps=case.steps // 2, evaluate_every=1, run=Path(folder) / "run")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            resumed = case.bind()
            # Other weights than the start's: everything that matters must come from the folder.
            with torch.no_grad():
                for parameter in resumed.model.parameters():
                    parameter.add_(1.0)
            history = case.fit(resumed, evaluate_every=1, run=Path(folder) / "run", resume=True)
        saved = RunFolder(Path(folder) / "run").weights()
    _hold([row["step"] for row in history.rows] == [row["step"] for row in rows], "the resumed run has other rows")
    if whole.deterministic:
        _hold(same(weights(resumed.model), weights(whole.model)), "the resumed run ended with different weights")
        _hold(same(saved, weights(whole.model)), "the resumed run's folder holds different weights")
        timeless = [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
        again = [{key: value for key, value in row.items() if "seconds" not in key} for row in history.rows]
        _hold(timeless == again, "the resumed run's rows differ from those of a run that was never stopped")


def evaluating_more_often_changes_nothing(case: Case) -> None:
    """A run evaluated at each step ends with the bits of one evaluated once."""
    often, once = case.bind(), case.bind()
    case.fit(often, evaluate_every=1)
    case.fit(once, evaluate_every=case.steps)
    _hold(
        not once.deterministic or same(weights(often.model), weights(once.model)),
        "a run evaluated at each step ended with other weights than one evaluated at its end",
    )


def sync_twice_is_sync_once(case: Case) -> None:
    """A second `sync` changes no bit of the model, on one rank and on two."""

    def work(group: Group) -> bool:
        training = case.bind(group)
        training.step(_first_batch(case, training, group))
        training.sync()
        once = weights(training.model)
        training.sync()
        return same(once, weights(training.model))

    _hold(work(Solo()), "a second sync changed the model")
    for size in case.ranks[:1]:
        _hold(all(threads(size, work)), f"a second sync changed the model on {size} ranks")


def metrics_carry_no_graph(case: Case) -> None:
    """A step reports detached 0-d tensors, and `loss` among them on one rank."""
    training = case.bind()
    metrics = training.step(_first_batch(case, training, Solo()))
    for name, value in metrics.items():
        _hold(isinstance(value, Tensor), f"{name} is a {type(value).__name__}, not a tensor")
        _hold(value.dim() == 0, f"{name} has shape {tuple(value.shape)}, not ()")
        _hold(not value.requires_grad and value.grad_fn is None, f"{name} still carries its graph")
    _hold("loss" in metrics, f"the step does not report its loss, only {', '.join(metrics) or 'nothing'}")


def ranks_agree_after_sync(case: Case) -> None:
    """Every rank ends with the same bits, though each started from weights of its own: those of rank 0 count."""

    def work(group: Group, start: float) -> tuple[Weights, bool]:
        model = case.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(start * group.rank)
        training = case.method.bind(model, case.loss, group=group)
        case.fit(training, group, evaluate_every=2)
        return weights(training.model), training.deterministic

    for size in case.ranks:
        (first, deterministic), *others = threads(size, partial(work, start=0.5))
        _hold(all(same(first, other) for other, _ in others), f"{size} ranks ended with different weights")
        if deterministic:
            alike = threads(size, partial(work, start=0.0))
            _hold(same(first, alike[0][0]), f"on {size} ranks the start weights of a rank other than 0 counted")


def a_rank_without_rows_is_no_trouble(case: Case) -> None:
    """Full-batch methods run with fewer rows than ranks."""
    few = Batch(case.data.train.x[:2], case.data.train.y[:2])
    small = replace(case, data=replace(case.data, train=few))
    training = small.bind()
    if training.batches == "mini" or training.data == "same":
        return

    def work(group: Group) -> Weights:
        training = small.bind(group)
        small.fit(training, group, steps=2)
        return weights(training.model)

    first, *others = threads(3, work)
    _hold(all(same(first, other) for other in others), "three ranks with two rows ended with different weights")
    _hold(
        all(bool(value.isfinite().all()) for value in first.values()), "three ranks with two rows left infinite weights"
    )


def one_rank_stops_all(case: Case) -> None:
    """When rank 0 wishes to stop, every rank ends after the same step, and none waits for another."""

    def work(group: Group) -> tuple[int, str | None]:
        history = case.fit(case.bind(group), group, steps=50, evaluate_every=1, on_row=lambda row: row["step"] == 2)
        return history.rows[-1]["step"], history.stopped_by

    for size in case.ranks:
        ends = threads(size, work)
        _hold(set(ends) == {(2, "on_row")}, f"asked to stop after step 2, {size} ranks ended with {ends}")


def it_refuses_in_a_sentence(case: Case) -> None:
    """`bind` says CannotTrain, in words, for what it cannot train."""
    for make in case.refused:
        model = make()
        try:
            case.method.bind(model, case.loss, group=Solo())
        except CannotTrain as refusal:
            words = str(refusal).split()
            _hold(len(words) >= 5, f"the refusal of {type(model).__name__} is not a sentence: {refusal}")
        else:
            raise AssertionError(f"{type(model).__name__} was not refused with CannotTrain")


def it_leaves_no_global_state(case: Case) -> None:
    """Random generators, default type, threads and modes are as before; on ranks too."""
    with _unchanged():
        case.fit(case.bind())
    for size in case.ranks[:1]:
        with _unchanged():
            threads(size, lambda group: len(case.fit(case.bind(group), group)))


@contextmanager
def _unchanged() -> Iterator[None]:
    def look() -> dict[str, Any]:
        return {
            "torch's generator": torch.get_rng_state().tolist(),
            "numpy's generator": str(np.random.get_state()),
            "Python's generator": random.getstate(),
            "the default type": torch.get_default_dtype(),
            "the number of threads": torch.get_num_threads(),
            "the gradient mode": torch.is_grad_enabled(),
            "the inference mode": torch.is_inference_mode_enabled(),
            "the deterministic mode": torch.are_deterministic_algorithms_enabled(),
            "the anomaly mode": torch.is_anomaly_enabled(),
        }

    before = look()
    yield
    after = look()
    changed = [name for name in before if before[name] != after[name]]
    _hold(not changed, f"a run changed {', '.join(changed)}")


def the_model_keeps_its_modes(case: Case) -> None:
    """Training, and evaluation, leave each module in the mode it had, and each parameter as trainable as it was."""
    training = case.bind()
    training.model.train()
    before = [
        (module.training, [one.requires_grad for one in module.parameters()]) for module in training.model.modules()
    ]
    case.fit(training)
    after = [
        (module.training, [one.requires_grad for one in module.parameters()]) for module in training.model.modules()
    ]
    _hold(before == after, "a run changed the modes of the model or which of its parameters are trainable")


def the_state_is_plain(case: Case) -> None:
    """`state_dict` holds tensors and plain values, and loads with weights_only=True."""

    def work(group: Group) -> str:
        training = case.bind(group)
        training.step(_first_batch(case, training, group))
        training.sync()
        state = training.state_dict()
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / "state.pt")
            try:
                require_plain(state, "state_dict()")
                case.bind(group).load_state_dict(torch.load(Path(folder) / "state.pt", weights_only=True))
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        return ""

    for problem in [work(Solo()), *(said for size in case.ranks[:1] for said in threads(size, work))]:
        _hold(not problem, f"the state cannot be saved and loaded: {problem}")


LAWS: dict[str, Callable[[Case], None]] = {
    law.__name__: law
    for law in (
        it_learns,
        same_seed_gives_the_same_model,
        stop_and_resume_is_one_run,
        evaluating_more_often_changes_nothing,
        sync_twice_is_sync_once,
        metrics_carry_no_graph,
        ranks_agree_after_sync,
        a_rank_without_rows_is_no_trouble,
        one_rank_stops_all,
        it_refuses_in_a_sentence,
        it_leaves_no_global_state,
        the_model_keeps_its_modes,
        the_state_is_plain,
    )
}
"""Every law by its name."""
