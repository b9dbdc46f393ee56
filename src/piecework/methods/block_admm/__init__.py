"""After Khorram, Fu, Danesh, Qi, Fuxin, "Stochastic Block-ADMM for Training Deep Networks", arXiv:2105.00339, a
reconstruction from its abstract: the standard scaled augmented Lagrangian that fits it.

Problem: blocks f_1..f_T of a network, joined by variables X_t (rows are samples), J the loss summed over samples:

    min  J(f_T(X_{T-1}))   subject to  c_t = f_t(X_{t-1}) - X_t = 0,  t < T
    L = J + sum_t beta/2 (||c_t + U_t||^2 - ||U_t||^2)                   with scaled duals U_t

A mini-batch starts from a forward pass, X_t = f_t(X_{t-1}) and U = 0. A sweep visits the blocks from the last one down;
with h_t what block t charges for its input (J for the last, beta/2 ||f_t(X) - X_t + U_t||^2 for the others),

    X_{t-1} <- X_{t-1} - alpha [ dh_t/dX + beta (X_{t-1} - f_{t-1} - U_{t-1}) ],    or a proximal step (see below)
    theta_t <- `local_steps` steps of the block's own optimiser on h_t / n, at the input before that move
    U_t     <- U_t + dual_step c_t,                       after another forward pass of each block; then the next sweep

With alpha beta = 1 and one sweep of one local step every block gets exactly the gradient of backpropagation, for any
beta. The method is something else with more sweeps or local steps, alpha beta < 1, or layers without a derivative:
those give argmin_a beta/2 ||a - v||^2 + beta/2 ||f(a) - b||^2 in place of the gradient step (`piecework.nn.ProxLayer`).

Differs from the literal iteration
1. Displacements D = X - f are kept and never X, which loses D to rounding at large beta.
2. Top-down visits: with the weights first, only the last block would learn.
3. All evaluations of a block in one step see the same dropout masks, and running statistics move once.
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
from ...training import BadInput, Batch, Training
from ..blocks import Factory
from ..parameters import fused_kernels
from ..schedule import Schedule, check_schedule
from .at_work import BlocksAtWork

__all__ = ["BlockADMM"]


@dataclass(frozen=True, kw_only=True)
class BlockADMM:
    """Blocks joined by auxiliary variables, each with its own optimiser; also layers without a derivative.

    Ranks hold blocks, and all see the same rows. Metrics: `loss`, the user's mean loss on the batch before the step;
    `lr`; and on a probe batch `cosine` of the step to the true gradient (what the optimisers were given, summed),
    `lagrangian` a sample, `primal_residual`, `dual_residual`, `multiplier`."""

    blocks: int | None = None
    """How many blocks, of equal cost; None: every layer with parameters begins one."""

    at: tuple[int | str, ...] = ()
    """Where blocks begin, in place of `blocks`: positions or names of layers, as `piecework.split` takes them."""

    mode: Literal["online", "batch"] = "online"
    """online: variables start from a forward pass; batch: variables and duals of every row are kept between its
    visits."""

    dual_memory: Literal["none", "class", "sample"] = "none"
    """online: where duals start: at zero, at the mean of the row's class, or where that row's last visit left them."""

    dual_decay: float = 0.9
    """Part of a remembered dual that is left at the next visit, in [0, 1]; for classes the rate of the running mean."""

    beta: float | tuple[float, ...] = 1.0
    """Penalty of the constraints, loss units a squared unit of activation; one for all cuts, or one each."""

    balance: bool = False
    """Double or halve the penalty of a cut whose primal and dual residuals are ten times apart; needs sweeps > 1."""

    alpha_beta: float = 1.0
    """Step length of the variables times the penalty, in (0, 1]; what reaches block t is scaled by its power T - t."""

    sweeps: int = 1
    """Sweeps over a mini-batch."""

    local_steps: int = 1
    """Steps of each block's optimiser in a visit, towards the same target."""

    dual_step: float = 0.0
    """Step length of the duals, a part of the residual, in [0, 1.618]; 0: a quadratic penalty without duals."""

    prox: Literal["linear", "exact"] = "linear"
    """What lies above a layer without a derivative: linearised, or as the square that it is; a layer that knows only
    the latter takes that."""

    order: Literal["backward", "jacobi", "pipelined"] = "backward"
    """backward: from the last block down; jacobi: all blocks at once with the targets of before; pipelined: each block
    on another mini-batch."""

    optimizer: Factory | tuple[Factory, ...] | None = None
    """Makes an optimiser from a block's parameters; one for all blocks, or one each. None: Adam with what follows."""

    lr: float = 1e-3
    """Learning rate of Adam; the highest of the schedule."""

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

    recompute: bool = False
    """Evaluate each block again at its visit, with the memory of one block's graph; else all graphs are
    kept (a pipeline always evaluates again)."""

    probe_every: int = 50
    """Steps between looks at the true gradient, each about as long as a step; 0 for none."""

    stall_sweeps: int | None = None
    """Give up where the mean loss of so many sweeps is not below the lowest of as many before; None: never."""

    seed: int = 0
    """Decides what random layers (dropout) and candidates draw, with the block and the step."""

    def __post_init__(self) -> None:
        betas = self.beta if isinstance(self.beta, tuple) else (self.beta,)
        for name, ok, accepted in (
            ("blocks", self.blocks is None or self.blocks >= 1, "at least 1"),
            ("beta", betas and all(0 < one < math.inf for one in betas), "above 0"),
            ("alpha_beta", 0 < self.alpha_beta <= 1, "in (0, 1]"),
            ("sweeps", self.sweeps >= 1, "at least 1"),
            ("local_steps", self.local_steps >= 1, "at least 1"),
            ("dual_step", 0 <= self.dual_step <= 1.618, "in [0, 1.618]"),
            ("dual_decay", 0 <= self.dual_decay <= 1, "in [0, 1]"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("stall_sweeps", self.stall_sweeps is None or self.stall_sweeps >= 1, "at least 1"),
            ("probe_every", self.probe_every >= 0, "at least 0"),
            ("mode", self.mode in ("online", "batch"), "online or batch"),
            ("dual_memory", self.dual_memory in ("none", "class", "sample"), "none, class or sample"),
            ("prox", self.prox in ("linear", "exact"), "linear or exact"),
            ("order", self.order in ("backward", "jacobi", "pipelined"), "backward, jacobi or pipelined"),
        ):
            if not ok:
                raise BadInput(f"block-admm: {name} must be {accepted}, got {getattr(self, name)}")
        check_schedule(self.schedule, self.schedule_steps, self.warmup_steps, "block-admm")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.at and self.blocks is not None:
            raise BadInput("block-admm takes either at=, the places to cut, or blocks=, how many; got both")
        if self.mode == "batch" and self.dual_memory != "none":
            raise BadInput("block-admm: mode='batch' keeps the duals of every row already; leave dual_memory='none'")
        if self.dual_memory != "none" and self.dual_step == 0:
            raise BadInput("block-admm: dual_memory needs duals that move; give dual_step, for example 0.5")
        if self.order == "pipelined" and (self.sweeps > 1 or self.mode == "batch" or self.dual_memory != "none"):
            raise BadInput(
                "block-admm: order='pipelined' passes a mini-batch once; take sweeps=1, mode='online' and "
                "dual_memory='none'"
            )
        if self.balance and (self.sweeps == 1 or self.order == "pipelined"):
            raise BadInput("block-admm: balance compares the residuals between sweeps; give sweeps=2 or more")
        if self.optimizer is not None:
            own = {one.name: one.default for one in fields(self)}
            names = ("lr", "weight_decay", "schedule", "schedule_steps", "warmup_steps")
            if ignored := [name for name in names if getattr(self, name) != own[name]]:
                warnings.warn(
                    f"block-admm: {ignored[0]} is Adam's, and optimizer= was given in its place", stacklevel=4
                )

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training[Batch]:
        """Start a Training from the weights of rank 0. Raises CannotTrain for a model that cannot be cut like this, for
        more ranks than blocks, or for label smoothing with a loss that has none."""
        return BlocksAtWork(self, model, loss, current() if group is None else group)

    def betas(self, num_blocks: int) -> list[float]:
        """The penalty of the cut on each block's input; the first block's is never used. Raises BadInput."""
        if not isinstance(self.beta, tuple):
            return [self.beta] * num_blocks
        if len(self.beta) != num_blocks - 1:
            raise BadInput(
                f"block-admm: {num_blocks} blocks are joined by {num_blocks - 1} penalties, got {len(self.beta)} (beta)"
            )
        return [1.0, *self.beta]

    def factories(self, num_blocks: int) -> list[Factory]:
        """What makes the optimiser of each block. Raises BadInput."""
        if self.optimizer is None:
            return [self._adam] * num_blocks
        if callable(self.optimizer):
            return [self.optimizer] * num_blocks
        if len(self.optimizer) != num_blocks:
            raise BadInput(f"block-admm: {num_blocks} blocks need as many optimisers, got {len(self.optimizer)}")
        return list(self.optimizer)

    def _adam(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        found = list(parameters)
        kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if self.weight_decay > 0 else torch.optim.Adam
        return kind(found, lr=self.lr, weight_decay=self.weight_decay, fused=fused_kernels(found))
