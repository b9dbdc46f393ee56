"""After Laskin, Metz, Nabarro, Saroufim, Noune, Luschi, Sohl-Dickstein, Abbeel, "Parallel Training of Deep Networks
with Local Updates", arXiv:2012.03837; interlocking after Gomez et al., "Interlocking Backpropagation", JMLR 2022.

A network is cut into blocks f_1..f_K with parameters theta_k: h_0 = x, h_k = f_k(h_{k-1}). Behind each block but the
last stands a head a_k with parameters phi_k; a_K is the identity. With l_k = loss(a_k(h_k), y), the mean over the rows
of a mini-batch, and D_kj = d l_j / d theta_k through f_k..f_j and a_j, a step goes along

    g(theta_k) = sum_j C_kj D_kj,          g(phi_k) = d l_k / d phi_k,          by an optimiser for each

    greedy          C_kk = 1                          overlap      C_kk = C_k,k+1 = 1 (the own loss may be left out)
    chunk of c      C_ke = 1, e the end of its chunk  interlock N  C_k,min(k+N-1,K) = 1, and N = K is backpropagation

Block k sends h_k on before it does anything else, and the derivative of l_j at its input only if a lower block learns
from l_j. So greedy blocks never wait for one above, and ranks give the bits of one process.

Differs from the paper
1. No numbers of processes are assumed: blocks share ranks in any way, and one rank holds one graph at a time if greedy.
2. Heads are small by default: a linear map, a convolution, or normalisation and an unembedding of their own.
3. The coupling may grow during the run (`anneal`), and derivatives may be a fixed number of steps late (`staleness`).
4. Heads may reconstruct the rows as well, after Wang et al., "Revisiting Locally Supervised Learning", ICLR 2021.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import get_args

import torch
from torch import nn

from ...group import Group, current
from ...losses import Loss
from ...training import BadInput
from ..blocks import Factory
from ..parameters import fused_kernels
from ..schedule import Schedule, check_schedule
from .at_work import LocalAtWork
from .credit import Coupling
from .head import HeadFactory
from .heads import Kind

__all__ = ["Local"]


@dataclass(frozen=True, kw_only=True)
class Local:
    """Blocks with losses and optimisers of their own, on one process or in a pipeline without bubbles.

    Ranks hold blocks, and all see the same rows. Metrics: `loss`, the user's mean loss on the batch before the step, on
    the rank of the last block; `local_loss_K`, that of the head of block K (counted from 0), with what it reconstructs;
    `lr`; and on a probe batch `cosine_K` of what block K steps along to its gradient in backpropagation."""

    coupling: Coupling = "greedy"
    """greedy: each block learns from its own loss; overlap: and from the next one's; chunk: from that at the end of its
    chunk; interlock: from that `reach` - 1 blocks above."""

    blocks: int | None = None
    """How many blocks, of equal cost; None: two."""

    at: tuple[int | str, ...] = ()
    """Where blocks begin, in place of `blocks`: positions or names of layers, as `piecework.split` takes them."""

    reach: int = 2
    """Blocks of a chunk, or N of interlocking: 1 is greedy, all of them backpropagation."""

    use_own_loss: bool = True
    """overlap: whether a block's own loss counts beside the next one's."""

    anneal: tuple[int, int] | None = None
    """Two steps: from the first on the coupling grows, block by block, and by the second it is backpropagation."""

    staleness: int = 0
    """Steps by which a derivative is late for each block that it goes down, so that no block waits for one above."""

    heads: Kind = "auto"
    """Behind blocks: linear, mlp, conv, unembedding (normalisation and a matrix); infopro and contrastive also
    reconstruct the rows; auto goes by the shape."""

    head_width: int = 128
    """Hidden units of an mlp head, or channels of a convolution."""

    make_head: HeadFactory | None = None
    """Makes a head in place of `heads`, from one row of what the block gives and the number of outputs."""

    every_head: bool = False
    """Whether heads are trained, for early exits, also where no block learns from their loss."""

    reconstruct: tuple[float, float] = (1.0, 0.1)
    """infopro, contrastive: weight of the reconstruction behind the first and behind the last head, linear between."""

    supervise: tuple[float, float] = (1.0, 1.0)
    """infopro, contrastive: weight of the loss, or of the contrast, behind the first and behind the last head."""

    optimizer: Factory | tuple[Factory, ...] | None = None
    """Makes an optimiser from a block's parameters, and another from its head's; one for all blocks, or one each.
    None: Adam with what follows."""

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

    buffers: int = 3
    """Mini-batches by which a rank may be ahead of the next one before it waits."""

    probe_every: int = 200
    """Steps between looks at the true gradient, for which the pipeline stops once; 0 for none."""

    seed: int = 0
    """Decides the heads, and what random layers (dropout) draw, with the block and the step."""

    def __post_init__(self) -> None:
        ramps = (*self.reconstruct, *self.supervise)
        for name, ok, accepted in (
            (
                "coupling",
                self.coupling in get_args(Coupling),
                "greedy, overlap, chunk or interlock",
            ),
            ("blocks", self.blocks is None or self.blocks >= 1, "at least 1"),
            ("reach", self.reach >= 1, "at least 1"),
            ("staleness", self.staleness >= 0, "at least 0"),
            ("heads", self.heads in get_args(Kind), ", ".join(get_args(Kind))),
            ("head_width", self.head_width >= 1, "at least 1"),
            ("reconstruct", all(0 <= one < math.inf for one in ramps[:2]), "at least 0"),
            ("supervise", all(0 < one < math.inf for one in ramps[2:]), "above 0"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("buffers", self.buffers >= 1, "at least 1"),
            ("probe_every", self.probe_every >= 0, "at least 0"),
        ):
            if not ok:
                raise BadInput(f"local: {name} must be {accepted}, got {getattr(self, name)}")
        check_schedule(self.schedule, self.schedule_steps, self.warmup_steps, "local")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.at and self.blocks is not None:
            raise BadInput("local takes either at=, the places to cut, or blocks=, how many; got both")
        if self.anneal is not None and not (len(self.anneal) == 2 and 0 <= self.anneal[0] < self.anneal[1]):
            raise BadInput(f"local: anneal takes two rising steps, from 0 on, got {self.anneal}")
        own = {one.name: one.default for one in fields(self)}
        if self.optimizer is not None:
            names = ("lr", "weight_decay", "schedule", "schedule_steps", "warmup_steps")
            if ignored := [name for name in names if getattr(self, name) != own[name]]:
                warnings.warn(f"local: {ignored[0]} is Adam's, and optimizer= was given in its place", stacklevel=4)
        if self.make_head is not None and self.heads != "auto":
            warnings.warn("local: heads= does nothing beside make_head=, which makes them", stacklevel=4)

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> LocalAtWork:
        """Start a Training from the weights of rank 0. Raises CannotTrain for a model that cannot be cut like this, for
        more ranks than blocks, or for label smoothing with a loss that has none.

        Heads are made when the first rows are seen; the first step raises CannotTrain for one that does not fit."""
        return LocalAtWork(self, model, loss, current() if group is None else group)

    def factories(self, num_blocks: int) -> list[Factory]:
        """What makes the optimisers of each block. Raises BadInput."""
        if self.optimizer is None:
            return [self._adam] * num_blocks
        if callable(self.optimizer):
            return [self.optimizer] * num_blocks
        if len(self.optimizer) != num_blocks:
            raise BadInput(f"local: {num_blocks} blocks need as many optimisers, got {len(self.optimizer)}")
        return list(self.optimizer)

    def _adam(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        found = list(parameters)
        kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if self.weight_decay > 0 else torch.optim.Adam
        return kind(found, lr=self.lr, weight_decay=self.weight_decay, fused=fused_kernels(found))
