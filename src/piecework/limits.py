"""What stops a run, and which of its networks is deployed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .formats import whole
from .history import Row, improves
from .training import BadInput

if TYPE_CHECKING:
    from .data import Dataset


@dataclass(frozen=True)
class Limits:
    """The limits of a run, in all, and how often it is evaluated.

    steps: None without one; steps_word: "steps" or "epochs", whichever gave that limit; seconds of training;
    stop_at: a validation score; patience: evaluations; evaluate_every: steps; rest, pause: training seconds between
    evaluations, at least and at most."""

    steps: int | None
    steps_word: str
    seconds: float | None
    stop_at: float | None
    patience: int | None
    evaluate_every: int
    rest: float
    pause: float

    def spacing(self, seconds: float) -> float:
        """Training seconds between two evaluations at least, that long after the start: none at first, because most
        happens there, and 5 % of what has passed until that is more than `rest`."""
        return min(self.rest, 0.05 * seconds)

    def due(self, step: int, seconds: float, since: float) -> bool:
        """Whether to evaluate after this step: `seconds` up to the last evaluation, `since` from then on."""
        if self.seconds is not None and seconds + since >= self.seconds:
            return True
        return since >= self.pause or (step % self.evaluate_every == 0 and since >= self.spacing(seconds))

    def reached(self, step: int, seconds: float) -> str | None:
        """The limit that is used up, if any."""
        if self.steps is not None and step >= self.steps:
            return self.steps_word
        if self.seconds is not None and seconds >= self.seconds:
            return "seconds"
        return None

    def verdict(self, row: Row, best: Best | None) -> str | None:
        """What this row says about going on: None, "diverged", "stop_at" or "patience"."""
        if row["train"]["loss"] is None:
            return "diverged"
        if (
            self.stop_at is not None
            and row["validation"]["score"] is not None
            and row["validation"]["score"] >= self.stop_at
        ):
            return "stop_at"
        if self.patience is not None and best is not None and best.waited >= self.patience:
            return "patience"
        return None


def limits(
    data: Dataset,
    *,
    steps: int | None,
    epochs: int | None,
    seconds: float | None,
    stop_at: float | None,
    patience: int | None,
    evaluate_every: int | None,
    steps_per_epoch: int,
    full: bool,
    part: float,
) -> Limits:
    """The limits of `fit` after a look at them. Raises BadInput for one without sense, and when nothing ends the run.

    full: whether a step takes all rows. part: the part of a limit in seconds that passes at most between two
    evaluations, and a twentieth of it at least, where `evaluate_every` is left open."""
    counts = {"steps": steps, "epochs": epochs, "patience": patience, "evaluate_every": evaluate_every}
    for name, count in counts.items():
        if count is not None and (not isinstance(count, Integral) or isinstance(count, bool) or count < 1):
            raise BadInput(f"{name} must be a whole number, at least 1, got {count}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise BadInput(f"seconds must be positive, got {seconds}")
    if stop_at is not None and not math.isfinite(stop_at):
        raise BadInput(f"stop_at must be a score, got {stop_at}")
    for name, given in (("stop_at", stop_at), ("patience", patience)):
        if given is not None and data.validation is None:
            raise BadInput(
                f"{name} looks at validation rows, and there are none; keep a part of the training rows for it "
                "(--validation 0.1, data.load(..., validation=0.1))"
            )
    if steps is None and epochs is None and seconds is None and patience is None:
        raise BadInput("nothing ends this run; give steps, epochs, seconds or patience")
    steps, word = None if steps is None else int(steps), "steps"
    if epochs is not None and (steps is None or epochs * steps_per_epoch < steps):
        steps, word = int(epochs) * steps_per_epoch, "epochs"
    shortest, longest = 0.0, math.inf
    if seconds is not None and evaluate_every is None:
        shortest, longest = part / 20 * seconds, part * seconds
    every = int(evaluate_every or (1 if full else steps_per_epoch))
    return Limits(steps, word, seconds, stop_at, patience, every, shortest, longest)


class Best:
    """The best network on validation so far, kept aside so that training can go on past it."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.figures: dict[str, float | None] = {"score": None, "loss": None}
        self.waited = 0
        self.weights: dict[str, Tensor] | None = None

    def look(self, row: Row, model: nn.Module) -> None:
        """Take the model, which is the deployed network of this row, if it is better; otherwise count."""
        if self.weights is None or improves(row["validation"], self.figures):
            self.step, self.figures, self.waited = row["step"], dict(row["validation"]), 0
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        else:
            self.waited += 1

    def deploy(self, model: nn.Module) -> None:
        """Put the best weights into the model, in place."""
        if self.weights is not None:
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    tensor.copy_(self.weights[name])

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; the weights are its deployed network."""
        return {"step": self.step, **self.figures, "waited": self.waited}

    @classmethod
    def of(cls, state: Any, weights: Mapping[str, Tensor], path: Path) -> Best:
        """The counterpart of `state`. Raises BadInput naming the file."""
        fine = isinstance(state, dict) and whole(state.get("step")) and whole(state.get("waited"))
        if not fine or not all(isinstance(state.get(key), float | None) for key in ("score", "loss")):
            raise BadInput(f"{path} is damaged: it lacks the best score of the run")
        best = cls()
        best.step, best.waited = state["step"], state["waited"]
        best.figures = {"score": state["score"], "loss": state["loss"]}
        best.weights = dict(weights)
        return best
