"""After Assran, Loizou, Ballas, Rabbat, "Stochastic Gradient Push for Distributed Deep Learning", ICML 2019,
arXiv:1811.10792, algorithms 1 (overlap 0) and 2 (overlap and every above 0).

Problem: the mean over n ranks of the losses of their rows. Rank i holds numerators x_i, a weight w_i (at first 1) and
z_i = x_i / w_i, at which gradients are taken. In step k, with p_ji what part rank i gives to rank j of all that it has:

    x_i <- x_i - u(gradient of rank i's mean loss at z_i)         u: the optimiser's movement, its memory the rank's own
    send p_ji (x_i, w_i) to the ranks j that the graph names      every `every` steps
    x_i <- p_ii x_i + sum of the x that came,  w_i likewise       what was sent `overlap` steps ago is waited for
    z_i <- x_i / w_i

Parts of a sender sum to 1, so no mass is lost, whatever the graph, and w repairs that what comes need not be as much as
what went. With the complete graph and no overlap this is data-parallel training; with overlap nobody waits for a
message unless it is that late. `push_sum.py` has the mixing, `graphs.py` the graphs, `outer.py` slow momentum,
`tracking.py` gradient tracking.

Differs from the paper
1. A graph moves on with every send, and not with every step (a send every third step of 8 ranks would always go to the
   same peer).
2. What is waited for is the message of a certain rank and step, and not a number of messages.
3. `on_time` uses each message when it is `overlap` steps old, and not as soon as it is there: the same bits each time.
4. Ranks may leave (`leave`), join (`admit`) and die; see docs/methods/gossip.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import nn

from ...group import Group, current
from ...losses import Loss
from ...ranks.newcomers import Newcomer
from ...ranks.survivors import surviving
from ...training import BadInput
from ..alike import notes_of
from ..parameters import fused_kernels
from ..schedule import Schedule, check_schedule
from .at_work import GossipAtWork
from .attach import Attached
from .graphs import NAMED, Graph, GraphName

__all__ = ["Attached", "Gossip"]

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Gossip:
    """Ranks train models of their own and push parts of them to each other; nobody waits for all. A step is a
    mini-batch.

    Metrics: `loss`, the user's mean loss on this rank's batch before the step; `lr`; `push_weight`; `late`, the mean
    age in steps of the messages that were added; `blocked_seconds`, spent in waiting for one. Rows have
    `consensus_distance`, of the ranks' models from their average, a part of its length."""

    graph: GraphName | Graph = "exponential"
    """Who sends to whom: exponential (one peer a step), ring, complete, mixed-radix (exact averages for any number of
    ranks); in Python also a function (rank, round, size) -> {peer: share}."""

    overlap: int = 1
    """Steps that a message may be late; 0: each step waits for its messages."""

    every: int = 1
    """Steps between two sends; the paper has it equal to `overlap`."""

    on_time: bool = False
    """Use each message when it is exactly `overlap` steps old, which gives the same bits each time; otherwise as soon
    as it is there."""

    step_on: Literal["x", "z"] = "x"
    """What the optimiser moves: the numerators x, as the paper has it, or the estimates z, which fits Adam's scale."""

    wire: Literal["full", "bfloat16"] = "full"
    """Numbers in messages: as they are, or rounded to half the bytes; what rounding takes off stays with the sender."""

    slow_every: int = 0
    """Steps between two outer steps (slow momentum), at which all ranks meet; 0 for none."""

    slow_momentum: float = 0.0
    """Part of the outer movement that is kept, in [0, 1); 0 with slow_lr 1 is periodic averaging."""

    slow_lr: float = 1.0
    """Part of the outer movement that is taken."""

    slow_average: bool = True
    """Whether the outer step starts from the exact average of all ranks, or each rank's from its own estimate."""

    tracking: bool = False
    """Whether the optimiser is given a running estimate of the mean gradient of all ranks, for ranks with unlike rows;
    messages are twice as long."""

    push_weight: bool = True
    """Whether estimates are divided by the push-sum weight. Without it they are biased: there for comparison."""

    optimizer: Factory | None = None
    """Makes the optimiser from the parameters; None: what follows."""

    rule: Literal["sgd", "adam"] = "sgd"
    """The optimiser: torch's SGD with momentum, or Adam (AdamW where there is weight decay)."""

    lr: float = 0.03
    """Learning rate; the highest of the schedule."""

    momentum: float = 0.9
    """Of sgd: part of the last movement that is kept, in [0, 1). It stays each rank's own."""

    nesterov: bool = False
    """Of sgd: whether the gradient counts as if taken after the movement that is kept."""

    weight_decay: float = 0.0
    """Of sgd an L2 penalty, added to the gradient for each unit of weight; of adam decoupled."""

    schedule: Schedule = "constant"
    """How the rate goes on after the warm-up: constant, or down to a hundredth along a line or half a cosine."""

    schedule_steps: int = 0
    """Steps (mini-batches, warm-up included) after which a linear or cosine schedule is at its end and stays there."""

    warmup_steps: int = 0
    """Steps in which the rate first rises linearly from near 0."""

    label_smoothing: float = 0.0
    """Part of each label that is spread evenly over all classes, in [0, 1); for losses that have such a setting."""

    seed: int = 0
    """Decides what random layers (dropout) draw, with the rank and the step."""

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("graph", callable(self.graph) or self.graph in NAMED, f"one of {', '.join(NAMED)}, or a function"),
            ("overlap", self.overlap >= 0, "at least 0"),
            ("every", self.every >= 1, "at least 1"),
            ("step_on", self.step_on in ("x", "z"), "x or z"),
            ("wire", self.wire in ("full", "bfloat16"), "full or bfloat16"),
            ("slow_every", self.slow_every >= 0, "at least 0"),
            ("slow_momentum", 0 <= self.slow_momentum < 1, "in [0, 1)"),
            ("slow_lr", 0 < self.slow_lr < math.inf, "above 0"),
            ("rule", self.rule in ("sgd", "adam"), "sgd or adam"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
        ):
            if not ok:
                raise BadInput(f"gossip: {name} must be {accepted}, got {getattr(self, name)}")
        check_schedule(self.schedule, self.schedule_steps, self.warmup_steps, "gossip")
        if self.slow_every == 0 and (self.slow_momentum != 0 or self.slow_lr != 1):
            raise BadInput("gossip: slow_momentum and slow_lr are of the outer steps; give slow_every, for example 48")
        if self.nesterov and (self.momentum == 0 or self.rule != "sgd"):
            raise BadInput("gossip: nesterov needs the rule sgd and a momentum above 0")
        if self.optimizer is not None and (ignored := self._changed("rule", *_OF_THE_OPTIMISER)):
            warnings.warn(f"gossip: {ignored} is of the rule, and optimizer= was given in its place", stacklevel=3)

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | Newcomer | None = None) -> GossipAtWork:
        """Start a Training from the weights of rank 0; in `ranks.joining` one that has no weight at first.

        Raises CannotTrain for a model without a derivative or for label smoothing with a loss that has none, BadInput
        where ranks were given different settings or models."""
        return GossipAtWork(self, model, loss, self._joined(group, model))

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, group: Group | Newcomer | None = None
    ) -> Attached:
        """Let an optimiser of one's own gossip, in a loop of one's own: each `optimizer.step()` is followed by mixing.

        The parameters of all groups of the optimiser are mixed; start weights are those of rank 0. The settings of the
        optimiser, of the schedule and of the loss are not used. Raises what `bind` raises."""
        if ignored := self._changed("rule", "optimizer", "label_smoothing", "seed", *_OF_THE_OPTIMISER):
            warnings.warn(f"gossip: {ignored} is not used by attach, which takes your own optimiser", stacklevel=2)
        return Attached(self, model, optimizer, self._joined(group, model))

    def _joined(self, group: Group | Newcomer | None, model: nn.Module) -> Group:
        return surviving(current() if group is None else group, lambda: notes_of(self, model))

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of one rank."""
        found = list(parameters)
        if self.optimizer is not None:
            return self.optimizer(found)
        fused = fused_kernels(found)
        if self.rule == "adam":
            kind = torch.optim.AdamW if self.weight_decay > 0 else torch.optim.Adam
            return kind(found, lr=self.lr, weight_decay=self.weight_decay, fused=fused)
        return torch.optim.SGD(
            found,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=fused,
        )

    def _changed(self, *names: str) -> str:
        """The first of these settings that is not at its default; nothing if all are."""
        defaults = {one.name: one.default for one in fields(self)}
        return next((name for name in names if getattr(self, name) != defaults[name]), "")


_OF_THE_OPTIMISER = (
    "lr",
    "momentum",
    "nesterov",
    "weight_decay",
    "schedule",
    "schedule_steps",
    "warmup_steps",
)
