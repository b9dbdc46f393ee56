"""What every method promises, said once. A new method joins by one line of CASES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from piecework import losses
from piecework.group import Group, Solo
from piecework.losses import Loss
from piecework.methods import (
    ADMM,
    CG,
    LBFGS,
    METHODS,
    SGD,
    Adam,
    BlockADMM,
    DeepFacto,
    GaussNewton,
    Gossip,
    Local,
)
from piecework.methods.gauss_newton.choice import SOLVERS
from piecework.models import mlp
from piecework.testing.check import LAWS, Case, check_training, classes
from piecework.training import Batch, Method, Metrics
from plain_sgd import PlainSGD, PlainTraining

# name: (recipe, steps that must lower the loss by a tenth)
CASES: dict[str, tuple[Callable[[], Method], int]] = {
    "plain-sgd": (partial(PlainSGD, lr=0.3), 12),
    "plain-gradient": (partial(PlainSGD, lr=0.5, full=True), 8),
    "plain-sgd-same-rows": (partial(PlainSGD, lr=0.3, same=True), 12),
    "plain-sgd-averaged": (partial(PlainSGD, lr=0.5, averaged=True), 12),
    "admm": (ADMM, 6),
    "admm-multiplier": (partial(ADMM, multiplier=True), 6),
    "admm-taylor2016": (partial(ADMM, mode="taylor2016"), 20),
    "gauss-newton": (GaussNewton, 4),
    **{f"gauss-newton-{solver}": (partial(GaussNewton, solver=solver), 4) for solver in SOLVERS},
    "block-admm": (partial(BlockADMM, at=(1, 2), lr=0.03), 12),
    "block-admm-implicit": (partial(BlockADMM, at=(1, 2), lr=0.03, sweeps=3, alpha_beta=0.5, dual_step=0.5), 12),
    "block-admm-batch": (partial(BlockADMM, at=(1, 2), lr=0.03, mode="batch", dual_step=1.0), 12),
    "block-admm-classes": (partial(BlockADMM, at=(1, 2), lr=0.03, dual_memory="class", dual_step=1.0), 12),
    "block-admm-jacobi": (partial(BlockADMM, at=(1, 2), lr=0.03, order="jacobi", sweeps=3), 12),
    "block-admm-pipelined": (partial(BlockADMM, at=(1, 2), lr=0.03, order="pipelined"), 16),
    "deepfacto": (partial(DeepFacto, lr=0.03), 12),
    "deepfacto-envelope": (partial(DeepFacto, through="envelope", lr=0.03), 12),
    "deepfacto-contrast": (partial(DeepFacto, through="contrast", lr=0.03), 12),
    "deepfacto-implicit": (partial(DeepFacto, through="implicit", lr=0.03), 12),
    "deepfacto-sparse": (partial(DeepFacto, sparsity=0.3, lr=0.03), 12),
    "gossip": (partial(Gossip, lr=0.1), 12),
    "gossip-blocking": (partial(Gossip, overlap=0, lr=0.1), 12),
    "gossip-on-time": (partial(Gossip, overlap=2, on_time=True, lr=0.1), 12),
    "gossip-slow": (partial(Gossip, overlap=1, on_time=True, slow_every=3, slow_momentum=0.5, lr=0.1), 12),
    "gossip-tracking": (partial(Gossip, overlap=1, every=2, on_time=True, tracking=True, lr=0.1), 12),
    "gossip-adam": (partial(Gossip, overlap=0, rule="adam", step_on="z", graph="mixed-radix", lr=0.03), 12),
    "local": (partial(Local, at=(1, 2), lr=0.03), 12),
    "local-overlap": (partial(Local, at=(1, 2), lr=0.03, coupling="overlap"), 12),
    "local-chunk": (partial(Local, at=(1, 2), lr=0.03, coupling="chunk"), 12),
    "local-interlock": (partial(Local, at=(1, 2), lr=0.03, coupling="interlock"), 12),
    "local-late": (partial(Local, at=(1, 2), lr=0.03, coupling="overlap", staleness=1, probe_every=1), 16),
    "local-mlp-heads": (partial(Local, at=(1, 2), lr=0.03, heads="mlp", head_width=5), 12),
    "local-infopro": (partial(Local, at=(1, 2), lr=0.03, heads="infopro", head_width=5), 12),
    "local-annealed": (partial(Local, at=(1, 2), lr=0.03, anneal=(3, 9), every_head=True, probe_every=2), 12),
    "sgd": (SGD, 12),
    "adam": (partial(Adam, lr=0.03), 12),
    "lbfgs": (LBFGS, 6),
    "cg": (CG, 6),
}


@cache
def _case(name: str) -> Case:
    recipe, steps = CASES[name]
    model = partial(mlp, 5, [7], 3, activation="tanh", seed=1, dtype=torch.float64)
    if name.startswith("deepfacto"):
        model = partial(mlp, 5, [7], 3, activation="relu", factors=4, seed=1, dtype=torch.float64)
    return Case(method=recipe(), model=model, loss=losses.named("softmax"), data=classes(), steps=steps)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_law_holds(law: Callable[[Case], None], name: str) -> None:
    law(_case(name))


def test_every_method_of_the_library_has_its_line() -> None:
    assert METHODS.keys() <= CASES.keys()


def test_a_users_method_is_held_to_all_laws_by_one_call() -> None:
    check_training(PlainSGD(lr=0.3), steps=12)


class _Idle(PlainTraining):
    def step(self, batch: Batch) -> Metrics:
        start = [weight.clone() for weight in self.weights]
        metrics = super().step(batch)
        self._copy(self.weights, start)
        return metrics


class _Drawing(PlainTraining):
    def step(self, batch: Batch) -> Metrics:
        self.weights[0].add_(1e-9 * torch.randn(()))
        return super().step(batch)


class _Forgetful(PlainTraining):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "velocity": [torch.zeros_like(one) for one in self.velocity]}


class _Rounding(PlainTraining):
    def sync(self) -> None:
        for weight in self.weights:
            weight.copy_(weight.float())
        super().sync()


class _Drifting(PlainTraining):
    def sync(self) -> None:
        super().sync()
        self.weights[0].add_(1.0)


class _Graphic(PlainTraining):
    def step(self, batch: Batch) -> Metrics:
        super().step(batch)
        return {"loss": self.loss(self.model(batch.x), batch.y)}


class _Shapely(PlainTraining):
    def step(self, batch: Batch) -> Metrics:
        return {name: value.reshape(1) for name, value in super().step(batch).items()}


class _Lonely(PlainTraining):
    def __init__(self, recipe: PlainSGD, model: nn.Module, loss: Loss, group: Group) -> None:
        super().__init__(recipe, model, loss, Solo())


class _Everyones(PlainTraining):
    def __init__(self, recipe: PlainSGD, model: nn.Module, loss: Loss, group: Group) -> None:
        for parameter in model.parameters():
            group.sum_(parameter.data)
        super().__init__(recipe, model, loss, group)


class _Switching(PlainTraining):
    def step(self, batch: Batch) -> Metrics:
        self.model.eval()
        return super().step(batch)


class _Defaulting(PlainTraining):
    def step(self, batch: Batch) -> Metrics:
        torch.set_num_threads(3)
        return super().step(batch)


class _Pickling(PlainTraining):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "group": Solo()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)


@dataclass(frozen=True)
class _Faulty:
    kind: type[PlainTraining]
    full: bool = False

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> PlainTraining:
        return self.kind(PlainSGD(lr=0.3, full=self.full), model, loss, group or Solo())


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (_Idle, "it_learns"),
        (_Drawing, "same_seed_gives_the_same_model"),
        (_Drawing, "it_leaves_no_global_state"),
        (_Forgetful, "stop_and_resume_is_one_run"),
        (_Rounding, "evaluating_more_often_changes_nothing"),
        (_Drifting, "sync_twice_is_sync_once"),
        (_Graphic, "metrics_carry_no_graph"),
        (_Shapely, "metrics_carry_no_graph"),
        (_Lonely, "ranks_agree_after_sync"),
        (_Everyones, "ranks_agree_after_sync"),
        (_Switching, "the_model_keeps_its_modes"),
        (_Defaulting, "it_leaves_no_global_state"),
        (_Pickling, "the_state_is_plain"),
        (PlainTraining, "it_refuses_in_a_sentence"),
    ],
)
def test_a_method_that_breaks_a_law_is_told_so(kind: type[PlainTraining], law: str) -> None:
    threads = torch.get_num_threads()
    case = replace(_case("plain-sgd"), method=_Faulty(kind))
    try:
        with pytest.raises(AssertionError, match=r"\w+ \w+ \w+"):
            LAWS[law](case)
    finally:
        torch.set_num_threads(threads)


def test_a_broken_law_is_named() -> None:
    with pytest.raises(AssertionError, match=r"^same seed gives the same model: two runs with one seed ended"):
        check_training(_Faulty(_Drawing), steps=12)
