"""Taylor, Burmeister, Xu, Singh, Patel, Goldstein, "Training Neural Networks Without Gradients: A Scalable ADMM
Approach", ICML 2016, arXiv 1605.02026, Algorithm 1 (`mode="taylor2016"`); the default is a resynchronised sweep.

Problem, with layers l = 1..L, activations h, samples in rows here and columns in the paper, sums over samples:

    min  l(z_L, y) + <z_L, lambda> + beta ||z_L - W_L a_{L-1}||^2
         + sum_{l<L} gamma ||a_l - h(z_l)||^2 + beta ||z_l - W_l a_{l-1}||^2                                        (5)

The default sweep starts from a forward pass of the deployed network, so that every constraint holds, and then
    output    W_L = argmin of the loss at a_{L-1}                      a linear system for the squared loss
    targets   t_L = prox of the loss at z_L;  a' - h(z_l) = K (t_{l+1} - z_{l+1}),  K = V^T (V V^T + gamma/beta I)^-1
              z' = argmin gamma (a' - h(z))^2 + beta (z - z_l)^2       closed forms, from the last layer to the first
    weights   D_l = (sum (z' - z_l) a_{l-1}^T) (sum a_{l-1} a_{l-1}^T + ridge I)^-1,   W_l += s_l D_l
with the s_l from one small linear system and halted by the deployed network's loss.

Differs from the paper
1. z and a are recomputed by a forward pass in every sweep: carried over, they fit activations that do not exist at
   test time, and every forward pass of random weights is a fixed point of the published multiplier.
2. The least-squares move is a direction with a closed-form length; the paper's unit step is far too short (s = 1).
3. Ridges in place of the pseudo-inverse, biases, any smooth or piecewise-linear activation, any of four losses.
4. `acceleration` adds the previous move of each layer to the moves whose lengths are solved for.
5. No number a sample is kept between sweeps (with `multiplier=True` one row of outputs is).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from ...group import Group, current
from ...losses import Loss
from ...training import BadInput, Batch, Training
from .sweep import Resynchronised, check_loss
from .taylor2016 import Taylor2016


@dataclass(frozen=True, kw_only=True)
class ADMM:
    """Closed-form sub-problems, no gradient of the network: full batch, chains of linear layers and activations."""

    mode: Literal["resynchronised", "taylor2016"] = "resynchronised"
    """The default sweep, or Algorithm 1 as published, which keeps a and z of every sample."""
    gamma: float | None = None
    """Penalty of a_l = h(z_l), no unit; None means 1, and the paper's 10 in mode taylor2016."""
    beta: float = 1.0
    """Penalty of z_l = W_l a_{l-1}, no unit; keep it at most gamma."""
    ridge: float = 1.0
    """Ridge of the hidden layers' least squares, in units of the mean diagonal of the Gram matrix."""
    output_ridge: float = 0.1
    """Ridge of the output layer, in units of each input's own mean square; the bias is free."""
    acceleration: bool = True
    """Solve for the lengths of the new moves and of the previous ones together."""
    flips: bool = True
    """Let the closed-form z-update wake ReLU units that are off."""
    multiplier: bool = False
    """Keep a multiplier of the output constraint: the one setting with state a sample, (rows, outputs)."""
    max_trials: int = 6
    """Trials of a step length in a sweep, each a quarter of the one before and one pass over the data."""
    tile: int | None = None
    """Rows of a tile; None chooses them so that a tile of the widest layer stays in cache."""
    warm_sweeps: int = 10
    """taylor2016: sweeps before the multiplier moves."""
    seed: int = 0
    """taylor2016: seed of the Gaussian start of a and z."""

    auto_loss: ClassVar[Mapping[str, str]] = {"binary": "squared", "multiclass": "squared", "regression": "squared"}
    """What `--loss auto` means here: the squared loss, whose refit of the output layer is one linear system."""

    def __post_init__(self) -> None:
        for name in ("gamma", "beta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{name} is a penalty and must be positive, got {value}")
        for name in ("ridge", "output_ridge", "warm_sweeps"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_trials < 1 or (self.tile is not None and self.tile < 1):
            raise BadInput(f"max_trials and tile count from 1, got {self.max_trials} and {self.tile}")
        gamma = self.gamma or (10.0 if self.mode == "taylor2016" else 1.0)
        if gamma < self.beta:
            warnings.warn(f"ADMM does badly with gamma ({gamma:g}) below beta ({self.beta:g})", stacklevel=3)

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training[Batch]:
        """ADMM at work on a chain of nn.Linear and element-wise activations; rows are sharded over the ranks.

        Raises CannotTrain for another model or a loss without a proximal map."""
        check_loss(loss)
        kind = Taylor2016 if self.mode == "taylor2016" else Resynchronised
        return kind(self, model, loss, group or current())
