"""Stochastic gradient descent and Adam on mini-batches: end-to-end backpropagation, the baseline of every comparison.

Sources: Sutskever et al. 2013 (momentum, as `torch.optim.SGD` has it); Kingma, Ba: Adam, arXiv:1412.6980, algorithm 1;
Loshchilov, Hutter: Decoupled weight decay regularization, arXiv:1711.05101, algorithm 2; Szegedy et al.,
arXiv:1512.00567, section 7 (label smoothing); Loshchilov, Hutter: SGDR, arXiv:1608.03983, equation 5 (cosine).

Problem: the mean loss over all rows. With g the gradient of the mean loss over the mini-batches of all ranks and r the
rate of the step,

    SGD     h = g + weight_decay w,  v = momentum v + h        w -= r v,  or with nesterov  w -= r (h + momentum v)
    Adam    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2   w -= r weight_decay w + r m' / (sqrt(v') + eps)

where m', v' are m, v without the bias of their start at 0. `torch.optim` does these lines.

On several ranks every rank has its own rows, equally many; gradients are averaged. In the processes of a torch process
group `DistributedDataParallel` does that, in buckets that travel while the backward pass goes on; each bucket counts as
one round with its bytes. (The order of the buckets, which DDP settles once in the second step, is not counted.)
In-memory ranks send all gradients as one message of each dtype.

Differs from the usual loop
1. The metrics' loss is the user's loss, also where the labels that are trained on are smoothed.
2. Layers that know only torch's global generator (dropout) run on a fork of it, seeded by (seed, rank, step); so does
   any module of a class that is not torch's or piecework's, because it may draw too.
3. Running statistics (batch normalisation) stay each rank's own during training; the deployed network has rank 0's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..evaluation import device_of
from ..group import Group, Ranks, current
from ..losses import Loss, smoothed
from ..training import BadInput, Batch, CannotTrain, Metrics, stream
from .data_parallel import DataParallel
from .noise import forked_generator, may_draw
from .optimizer_state import entries_of, put_entries
from .parameters import dictionaries, fused_kernels, no_gradient, share_from_rank_0, start_from_rank_0, trainable
from .schedule import Schedule, check_schedule, set_rate


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum: `torch.optim.SGD` on one rank or many. A step is a mini-batch.

    Metrics: `loss`, the user's mean loss on this rank's batch before the step; `lr`, the rate of this step."""

    lr: float = 0.03
    """Learning rate: weight units moved for a gradient of one loss unit a weight unit; the highest of the schedule."""

    momentum: float = 0.9
    """Part of the last movement that is kept, in [0, 1); 0 for none."""

    nesterov: bool = False
    """Whether the gradient counts as if taken after the movement that is kept (needs momentum)."""

    weight_decay: float = 0.0
    """Added to the gradient for each unit of weight: an L2 penalty of weight_decay/2 times the squared weights."""

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
        _check_settings(self, "sgd")
        if not 0 <= self.momentum < 1:
            raise BadInput(f"sgd: momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise BadInput("sgd: nesterov needs a momentum above 0")

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> _Training:
        """Start a Training from the weights of rank 0. Raises CannotTrain for a model without a derivative, or for
        label smoothing with a loss that has none."""
        parameters = trainable(model, "sgd")
        optimizer = torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=fused_kernels(parameters),
        )
        return _Training(self, optimizer, model, loss, current() if group is None else group)


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam, and AdamW where the weight decay is above 0: `torch.optim` on one rank or many. A step is a mini-batch.

    Metrics: `loss`, the user's mean loss on this rank's batch before the step; `lr`, the rate of this step."""

    lr: float = 1e-3
    """Learning rate: about the weight units each weight moves in a step; the highest of the schedule."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Part that the running means of the gradient and of its square keep in a step, each in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the mean square, in gradient units."""

    weight_decay: float = 0.0
    """Decoupled decay (AdamW) where above 0: each step also multiplies the weights by 1 - rate * weight_decay."""

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
        _check_settings(self, "adam")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            raise BadInput(f"adam: betas must be two numbers in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise BadInput(f"adam: eps must be above 0, got {self.eps}")

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> _Training:
        """Start a Training from the weights of rank 0. Raises CannotTrain for a model without a derivative, or for
        label smoothing with a loss that has none."""
        parameters = trainable(model, "adam")
        kind = torch.optim.AdamW if self.weight_decay > 0 else torch.optim.Adam
        optimizer = kind(
            parameters,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=fused_kernels(parameters),
        )
        return _Training(self, optimizer, model, loss, current() if group is None else group)


class _Training:
    data: Literal["shard", "same"] = "shard"
    batches: Literal["mini", "full"] = "mini"
    deterministic = True

    def __init__(
        self, recipe: SGD | Adam, optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, group: Group
    ) -> None:
        self.model, self.group = model, group
        self._recipe, self._optimizer = recipe, optimizer
        self._loss, self._objective = loss, smoothed(loss, recipe.label_smoothing)
        self._parameters: list[Tensor] = optimizer.param_groups[0]["params"]
        self._device = device_of(model)
        self._draws = may_draw(model)
        self._step = 0
        self._looked = False
        if group.size > 1 and (moving := dictionaries(model)):
            raise CannotTrain(
                f"the dictionary of NMF layer {moving[0]} follows the rows it sees, and each of {group.size} ranks "
                "sees others; train with deepfacto, which adds them up, or on one rank"
            )
        start_from_rank_0(model, group)
        self._buffers = [(buffer, buffer._version) for buffer in model.buffers()]
        self._parallel = DataParallel(model, group) if isinstance(group, Ranks) and group.size > 1 else None

    def step(self, batch: Batch) -> Metrics:
        if len(batch) == 0:
            raise BadInput("a mini-batch has no rows; give every rank the same number, at least one")
        if not self.model.training:
            self.model.train()
        lr = set_rate(self._recipe, self._step, self._optimizer)
        x, y = batch.x.to(self._device), batch.y.to(self._device)
        self._optimizer.zero_grad(set_to_none=True)
        seed = stream(self._recipe.seed, self.group.rank, self._step).initial_seed() if self._draws else None
        with forked_generator(seed, self._device):
            z = self._parallel.forward(x) if self._parallel is not None else self.model(x)
        loss = self._objective(z, y)
        self._backward(loss)
        self._optimizer.step()
        self._step += 1
        if self._objective is not self._loss:
            loss = self._loss(z.detach(), y)
        return {"loss": loss.detach(), "lr": torch.tensor(lr, dtype=torch.float64)}

    def sync(self) -> None:
        """Running statistics become rank 0's on every rank; they do not act on the training."""
        now = list(self.model.buffers())
        kept = len(now) == len(self._buffers) and all(
            buffer is before and buffer._version == version
            for buffer, (before, version) in zip(now, self._buffers, strict=True)
        )
        if not kept:
            share_from_rank_0(now, self.group)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "optimizer": entries_of(self._optimizer, self._parameters)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        put_entries(self._optimizer, self._parameters, list(state["optimizer"]))
        self._step = int(state["step"])

    def _backward(self, loss: Tensor) -> None:
        """Leave the gradient of the mean over all ranks in the parameters."""
        if not loss.requires_grad:
            raise no_gradient(self.model)
        if self._parallel is not None:
            self._parallel.backward(loss)
        else:
            (loss / self.group.size if self.group.size > 1 else loss).backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not self._looked and len(gradients) < len(self._parameters):
            raise no_gradient(self.model)
        self._looked = True
        if self._parallel is None:
            self.group.sum_(*gradients)


def _check_settings(recipe: SGD | Adam, name: str) -> None:
    if not 0 < recipe.lr < math.inf:
        raise BadInput(f"{name}: lr must be above 0, got {recipe.lr}")
    if not 0 <= recipe.weight_decay < math.inf:
        raise BadInput(f"{name}: weight_decay must be at least 0, got {recipe.weight_decay}")
    if not 0 <= recipe.label_smoothing < 1:
        raise BadInput(f"{name}: label_smoothing must be in [0, 1), got {recipe.label_smoothing}")
    check_schedule(recipe.schedule, recipe.schedule_steps, recipe.warmup_steps, name)
