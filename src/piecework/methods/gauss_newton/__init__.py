"""van den Brand, Peng, Song, Weinstein, "Training (Overparametrized) Neural Networks in Near-Linear Time", ITCS 2021,
arXiv 2006.11648, Algorithm 1 (`faithful=True`); the default is Levenberg-Marquardt with a choice of solvers.

Problem: the total loss F over all rows of all ranks. At the outputs z its gradient is B s and its curvature B B^T (for
the squared loss s = sqrt(2) (z - y), B = sqrt(2) I), so that with J = B^T dz/dtheta, (N, P), a move d of the weights
gives

    F(theta - d) = |s - J d|^2 / 2 + const,   to second order in z and first order in theta                        (1)
    (K + damping I) g = s,  d = J^T g,   K = J J^T;    the same as    (J^T J + damping I) d = J^T s                 (2)
    a = -1/2 (J^T J + damping I)^-1 J^T s_dd           s_dd: the second derivative of the residuals along d          (3)
    theta <- theta - d + a   where the loss falls, and 2 |a| <= 3/4 |d|;  else the damping is raised, and again
    damping <- damping max(1/3, 1 - (2 rho - 1)^3)     rho: the fall of F over that of (1)                           (4)

With `weight_decay` the loss of n rows has a penalty of n weight_decay/2 |theta|^2 beside it; (2) is then solved for
what is left of s after the move to the mean of 0 and theta, weighted by damping and penalty.

(2) by the solver that is cheapest for these N, P and damping; (3) is the geodesic acceleration of Transtrum and Sethna
(arXiv 1201.5885), (4) Nielsen's rule (1999). With `sample_rows` steps are on some rows only (sampled.py).

Differs from the paper
1. Any network and any loss with curvature, damping, a gain ratio and rejection: the paper's undamped unit step has no
   defence against a bad start outside its regime of width n^4.
2. The sketch is one of several solvers, and rarely the fastest: for plain layers K is a sum of Hadamard products of
   small factors and needs no Jacobian, so that what the sketch saves does not exist: docs/methods/gauss_newton.md.
3. Conjugate gradients where the published pseudo-code descends on the squared system; the latter is in `faithful`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

from ...group import Group, current
from ...losses import Loss
from ...training import BadInput, Batch, Training
from .cost import Solver
from .levenberg_marquardt import LevenbergMarquardt
from .objective import LeastSquares
from .sketches import Sketch

PUBLISHED = ("faithful", "sketch_rows", "tile", "seed")
"""Settings of `faithful=True`."""


@dataclass(frozen=True, kw_only=True)
class GaussNewton:
    """Gauss-Newton with Levenberg-Marquardt damping on all rows, for any model and a loss with curvature.

    A step solves one linear system, and moves to where the loss, with the penalty of weight decay, is lower: it never
    rises; on samples that is the sample's. Metrics: `loss`, the mean over all ranks' rows where the step ended, without
    penalty (on samples where it began, of the sample); `damping`, relative to the mean diagonal of K; `gain_ratio`;
    `rejected`, trials of the step that were not taken; `iterations` and `linear_residual` of the solver;
    `effective_dimension` where it is known; `predicted_seconds` and `solve_seconds` of the solver; `stalled`, 1 where
    the weights did not move (not on samples). The row's `solver` says which one it was."""

    solver: Literal["auto"] | Solver = "auto"
    """exact: Cholesky of K; qr, cholesky: of J and of J^T J, where parameters are fewer than rows; cg, rpchol, nystrom,
    sketch, kfac: conjugate gradients, plain, or preconditioned by a randomly pivoted Cholesky factor, a Nystrom
    approximation, a sketch or Kronecker factors of the layers; auto: the cheapest by a cost model that measures the
    machine. Where kfac is asked for on samples, without inner_tolerance, it takes one iteration, with factors averaged
    over the samples."""
    damping: float | None = None
    """Relative to the mean diagonal of K: at the start, from where it follows the gain ratio; on samples the least.
    None is 1e-3, and 30 where a damping that proves too small would cost many products (cg, rpchol, nystrom, kfac;
    not on samples)."""
    adapt: bool = True
    """Change the damping by the gain ratio and take back steps that do not lower the loss; without, a fixed damping and
    every step is taken."""
    geodesic: bool | None = None
    """Correct the step by the curvature of the residuals along it: one forward pass and one more right-hand side. None
    is yes where the system is factored, no where it is solved by conjugate gradients."""
    weight_decay: float = 0.0
    """An L2 penalty of weight_decay/2 times the squared weights, added to the mean loss."""
    eliminate_output: bool = False
    """After each step solve for the last linear layer in closed form, the others held."""
    sample_rows: int | None = None
    """Rows, over all ranks, that a step draws; None takes all. The damping is then `damping`, raised where the loss on
    the sample rises or falls by much less than predicted, and lowered back."""
    sample_steps: int | None = None
    """Steps on samples, over which lr falls linearly to 0; then steps take all rows, damped from where `damping` says.
    None goes on with samples at a constant lr."""
    lr: float = 1.0
    """Factor of a step on a sample."""
    hold: float = 0.0
    """Part of sample_steps, in [0, 1), over which lr stays before it falls."""
    momentum: float = 0.0
    """SPRING's decay of the step before, in [0, 1), on samples; with it, lr below 1 is safer."""
    sketch: Sketch = "units"
    """Of solver sketch: sampled hidden units, or a random projection of the rows of J."""
    sketch_rows: float | None = None
    """Columns of the sketch for each row; below 1 it is of low rank. None is 4, 8 or 16, by cost."""
    inner_tolerance: float | None = None
    """Relative residual at which iterative solvers stop; on all rows it tightens by itself where steps contract better.
    None is 0.1 for cg and kfac, and 0.01 for the others."""
    inner_iterations: int = 250
    """Iterations of one linear system at most."""
    max_retries: int = 16
    """Raises of the damping in a step at most; each is one solve and one forward pass."""
    tile: int | None = None
    """Rows that pass through the network at once; it bounds the memory and decides how sums are rounded. None chooses
    them so that a tile of the widest layer is some megabytes."""
    memory: float | None = None
    """GiB that the Jacobian and the system may take; None is three quarters of the machine's."""
    faithful: bool = False
    """The published algorithm literally: undamped, a fresh SRHT, QR, descent to the paper's tolerance, unit steps; for
    `piecework.models.two_layer_relu` and the squared loss."""
    seed: int = 0
    """Of sketches, pivots and samples."""

    def __post_init__(self) -> None:
        for name in ("damping", "lr", "inner_tolerance", "sketch_rows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"gauss-newton: {name} must be positive, got {value}")
        for name in ("inner_iterations", "max_retries", "tile", "sample_rows", "sample_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"gauss-newton: {name} must be at least 1, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise BadInput(f"gauss-newton: weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.momentum < 1:
            raise BadInput(f"gauss-newton: momentum must be in [0, 1), got {self.momentum}")
        if not 0 <= self.hold < 1:
            raise BadInput(f"gauss-newton: hold must be in [0, 1), got {self.hold}")
        if self.hold and self.sample_steps is None:
            raise BadInput("gauss-newton: hold is a part of sample_steps; give them too, or leave it out")
        if self.solver == "kfac" and self.momentum and self.inner_tolerance is None:
            raise BadInput(
                "gauss-newton: the one iteration of solver kfac has no momentum; leave it out, or give inner_tolerance"
            )
        if self.sample_rows is None:
            ignored = [name for name in ("sample_steps", "momentum") if getattr(self, name)]
            ignored += ["lr"] if self.lr != 1 else []
            if ignored:
                raise BadInput(
                    f"gauss-newton: {ignored[0]} is of steps on samples; give sample_rows too, or leave it out"
                )
        elif self.sample_steps is None and (self.geodesic or self.eliminate_output):
            name = "geodesic" if self.geodesic else "eliminate_output"
            warnings.warn(f"gauss-newton: {name} does nothing on samples of the rows", stacklevel=3)
        if self.faithful:
            given = [f.name for f in fields(self) if f.name not in PUBLISHED and getattr(self, f.name) != f.default]
            if given:
                raise BadInput(f"gauss-newton: the published algorithm has no {given[0]}; leave it out, or faithful")
        if self.memory is not None and not self.memory > 0:
            raise BadInput(f"gauss-newton: memory is a number of GiB, more than 0, got {self.memory}")

    def bind(self, model: nn.Module, loss: Loss, *, group: Group | None = None) -> Training[Batch]:
        """Start a Training from the weights of rank 0; rows are sharded over the ranks.

        Raises CannotTrain for a loss without curvature, and for a model without a derivative, with random layers
        (dropout), with batch normalisation, or with parameters of several dtypes or devices."""
        group = current() if group is None else group
        if self.faithful:
            from .faithful import Faithful

            return Faithful(self, model, loss, group)
        objective = LeastSquares(model, loss, group, tile=self.tile, weight_decay=self.weight_decay)
        return LevenbergMarquardt(self, objective)
