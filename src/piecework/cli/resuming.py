"""What `resume` needs to know before it goes on: the plan that a run folder records, and that nothing has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import RECIPE, SUMMARY, RunFolder
from ..data import Dataset
from ..group import Group
from ..training import BadInput
from . import folders
from .options import ResumeOptions
from .plan import Plan, Record, fingerprint
from .tables import stop


def plan_of(path: Path, chosen: ResumeOptions) -> tuple[Plan, Mapping[str, Any]]:
    """The plan of a run, with the limits asked for in place of its own, and its recipe. Raises BadInput."""
    folders.existing(str(path))
    recipe = RunFolder(path).recipe
    plan = Plan.from_recipe(recipe, path / RECIPE)
    plan = dataclasses.replace(
        plan, network=dataclasses.replace(plan.network, model=own_function(plan, chosen.model, path))
    )
    if chosen.steps is None and chosen.seconds is None:
        return plan, recipe
    training = dataclasses.replace(plan.training, steps=chosen.steps, seconds=chosen.seconds, epochs=None)
    return dataclasses.replace(plan, training=training), recipe


def own_function(plan: Plan, given: str | None, path: Path) -> str | None:
    """The function that makes the network, which must be named again: a folder's word is not enough to import it."""
    recorded = plan.network.model
    if recorded is None:
        if given is not None:
            raise BadInput(f"{path} has a network of layers, not one of a function; leave out --model")
        return None
    if given is None:
        raise BadInput(
            f"the network of {path} was made by {recorded[:80]!r}, which is not imported unasked; "
            f"give --model {recorded[:80]}"
        )
    return given


def require_ranks(run: RunFolder, group: Group) -> None:
    """Raise BadInput if the run was made by another number of ranks."""
    recorded = run.recipe.get("ranks")
    if recorded != group.size:
        raise BadInput(
            f"{run.path} was trained on {str(recorded)[:10]} rank(s) and cannot go on with {group.size}; start as many "
            "(torchrun --nproc-per-node ...)"
        )


def require_same(data: Dataset, recipe: Mapping[str, Any], path: Path) -> None:
    """Raise BadInput if the rows are not those that the run was started with."""
    recorded = Record(recipe, path / RECIPE).inside("data").values.get("fingerprint")
    if recorded != fingerprint(data):
        raise BadInput(f"the data has changed since {path} was started: {data.name} has other rows; start a new run")


def require_something_to_do(plan: Plan, run: RunFolder, chosen: ResumeOptions) -> None:
    """Raise BadInput if the run is already beyond the limit asked for, or has ended by itself and is given none."""
    state = run.load().fit
    step, seconds = state["step"], float(state["seconds"])
    if chosen.steps is None and chosen.seconds is None:
        ended = run.summary().get("stopped_by") if (run.path / SUMMARY).exists() else None
        if ended in ("steps", "epochs", "seconds", "stop_at", "patience"):
            raise BadInput(
                f"{run.path} has ended after {step} steps and {seconds:.3g} s ({stop(ended)}); give --steps N or "
                "--seconds S, in all, to go on"
            )
    if chosen.steps is not None and step > chosen.steps:
        raise BadInput(f"{run.path} has {step} steps already, more than --steps {chosen.steps}; give a larger number")
    if chosen.seconds is not None and seconds > chosen.seconds:
        raise BadInput(
            f"{run.path} has {seconds:.3g} training seconds already, more than --seconds {chosen.seconds:g}; give more"
        )
