"""DeepFacto, after Khorram, Fu, Danesh, Qi, Fuxin, arXiv:2105.00339, a reconstruction from its abstract: an NMF layer
in a classifier, trained with the label.

An encoder f gives non-negative features A = f(X), the layer their codes S on a dictionary M, and the head h sees the
codes alone; J is its loss, D a linear decoder that is only trained with, x what it is to give, tau the weight of
density:

    min  J(h(S)) + gamma ||x - D(S)||^2 + tau ||S||_1/||S||_2 + lambda/2 ||A - S M^T||^2
    s.t.  A = f(X),  S >= 0,  M >= 0

The label-free code S_0 of A minimises the last term alone; it is what a deployed network has. Four ways to the encoder:

    block-admm   S, then A = (beta (f + U) + lambda S M^T) / (beta + lambda), then the encoder's own steps on
                 beta/2 ||f - A + U||^2, then U += dual_step (f - A); `sweeps` times
    envelope     dA = lambda (A - S_lambda M^T), S_lambda the exact minimiser: where the sweeps converge
    contrast     dA = nu (A - S_0 M^T) + lambda (S_0 - S_lambda) M^T; tends to `implicit` as lambda grows
    implicit     the derivative of S_0 by A through its active set (Mairal, Bach, Ponce, arXiv:1009.5358), and
                 nu (A - S_0 M^T)

Head and decoder learn from S_0 in all four, and the dictionary follows its statistics.

Differs from the obvious reading
1. The head never learns from codes that have seen the label: at test time there are none. `code_gap` says what those
   codes would have scored more.
2. Without the decoder the codes keep only what the label needs. Its loss is relative to the variance of its target.
3. Reconstruction and supervision have weights of their own (nu, lambda) in `contrast` and `implicit`.
4. The ratio of norms (the measure of Hoyer, "Non-negative matrix factorization with sparseness constraints", JMLR 5,
   2004) asks for few factors a row whatever their scale. Where codes that have seen the label are minimised for, it
   counts by its slope at the label-free codes: the problem stays convex, and `contrast` still tends to `implicit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from ...group import Group, current
from ...losses import Loss
from ...training import BadInput, Batch, Training
from ..blocks import Factory
from ..parameters import fused_kernels
from ..schedule import Schedule, check_schedule
from .at_work import FactorsAtWork

__all__ = ["DeepFacto"]


@dataclass(frozen=True, kw_only=True)
class DeepFacto:
    """A classifier whose head sees non-negative factors alone: an NMF layer, trained with the label.

    Metrics: `loss`, the user's mean loss on the batch before the step, with label-free codes; `nmf_error`, of the
    features, relative; `zeros`, the share of codes that are 0; `free_score`, `informed_score`, `code_gap`: the
    accuracy on the batch with label-free codes, with codes that have seen the label, and their difference."""

    through: Literal["block-admm", "envelope", "contrast", "implicit"] = "contrast"
    """How the encoder learns through the layer."""

    coupling: float = 30.0
    """lambda: weight of half the squared reconstruction error beside the loss, where codes see the label."""

    reconstruction: float = 1.0
    """nu: weight of half the squared error of label-free codes; of contrast and implicit."""

    decoder: float = 1.0
    """Weight of the part of the input's variance that a linear decoder leaves unexplained; 0 for no decoder."""

    sparsity: float = 0.0
    """Weight of a sample's ||s||_1 / ||s||_2, from 1 (one factor) to the root of the rank (all alike); 0 for none."""

    beta: float = 1.0
    """block-admm: penalty of A = f(X)."""

    dual_step: float = 1.0
    """block-admm: step length of the dual of A = f(X), in [0, 1.618]; 0 for none."""

    sweeps: int = 2
    """block-admm: sweeps over a mini-batch."""

    local_steps: int = 1
    """block-admm: steps of the encoder's optimiser in a sweep."""

    code_steps: int = 20
    """Steps of FISTA for codes that see the label, from those that do not."""

    two_sided: bool = False
    """contrast: between codes that the label pulls to and codes that it pushes away; error 1/lambda^2, not 1/lambda."""

    optimizer: Factory | None = None
    """Makes the optimisers of encoder, head and decoder from their parameters. None: Adam with what follows."""

    lr: float = 3e-3
    """Learning rate of Adam; the highest of the schedule."""

    schedule: Schedule = "constant"
    """How the rate goes on after the warm-up: constant, or down to a hundredth along a line or half a cosine."""

    schedule_steps: int = 0
    """Steps (mini-batches, warm-up included) after which a linear or cosine schedule is at its end and stays there."""

    warmup_steps: int = 0
    """Steps in which the rate first rises linearly from near 0."""

    label_smoothing: float = 0.0
    """Part of each label that is spread evenly over all classes, in [0, 1); for losses that have such a setting."""

    seed: int = 0
    """Decides where the decoder starts and what random layers (dropout) draw."""

    auto_factors: ClassVar[int] = 16
    """Rank of the NMF layer that the command line puts before the last layer, where --factors does not say."""

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("through", self.through in ("block-admm", "envelope", "contrast", "implicit"), "one of the four ways"),
            ("coupling", 0 < self.coupling < math.inf, "above 0"),
            ("reconstruction", 0 <= self.reconstruction < math.inf, "at least 0"),
            ("decoder", 0 <= self.decoder < math.inf, "at least 0"),
            ("sparsity", 0 <= self.sparsity < math.inf, "at least 0"),
            ("beta", 0 < self.beta < math.inf, "above 0"),
            ("dual_step", 0 <= self.dual_step <= 1.618, "in [0, 1.618]"),
            ("sweeps", self.sweeps >= 1, "at least 1"),
            ("local_steps", self.local_steps >= 1, "at least 1"),
            ("code_steps", self.code_steps >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
        ):
            if not ok:
                raise BadInput(f"deepfacto: {name} must be {accepted}, got {getattr(self, name)}")
        check_schedule(self.schedule, self.schedule_steps, self.warmup_steps, "deepfacto")

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training[Batch]:
        """Start a Training from the weights of rank 0. The model is an nn.Sequential with one `piecework.nn.NMF` in it.

        Raises CannotTrain for another model, and, unless through implicit derivatives, for a head that is not made of
        linear layers and ReLUs or a loss without a bound of its curvature."""
        return FactorsAtWork(self, model, loss, current() if group is None else group)

    def factory(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of some parameters."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        found = list(parameters)
        return torch.optim.Adam(found, lr=self.lr, fused=fused_kernels(found))
