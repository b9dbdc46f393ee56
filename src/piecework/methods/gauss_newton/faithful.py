"""van den Brand, Peng, Song, Weinstein, arXiv 2006.11648, Algorithms 1 and 2, literally: for reproduction.

    g_t with |J_t J_t^T g_t - r_t| <= eps0 |r_t|,  eps0 = (lambda_0 / n)^(1/2) / 6;   W_{t+1} = W_t - J_t^T g_t

by descent z <- z - M^T (M z - R^T r) with M = R^T J J^T R, R^-1 the triangle of QR of S J^T, S a fresh SRHT with
`sketch_rows` rows for each sample (at least 64: the unit step of the descent diverges below about 40), r = f - y.
lambda_0 is the least eigenvalue of the infinitely wide network's kernel, x_i x_j (pi - arccos x_i x_j) / (2 pi).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...group import Group
from ...losses import Loss, Squared
from ...models.two_layer_relu import FixedSigns
from ...solvers.descent import gradient_descent
from ...training import BadInput, Batch, CannotTrain, DidNotSolve, Metrics
from .objective import LeastSquares

if TYPE_CHECKING:
    from . import GaussNewton

PUBLISHED_ROWS = 64.0
"""Sketch rows a sample at which the unit step converges: |M|, about 1 / (1 - (1/40)^(1/2))^2 at 40, is below 2^(1/2)
there on average only, and one sketch in some tens is above."""
MOST_DESCENT = 500


class Faithful:
    """The published algorithm at work on one rank."""

    data: Literal["shard", "same"] = "same"
    batches: Literal["mini", "full"] = "full"
    deterministic = True

    def __init__(self, recipe: GaussNewton, model: nn.Module, loss: Loss, group: Group) -> None:
        if not _is_published(model):
            raise CannotTrain(
                "gauss-newton with faithful=True trains the published network only, piecework.models.two_layer_relu; "
                "leave faithful out for any other"
            )
        if not isinstance(loss, Squared):
            raise CannotTrain(
                f"gauss-newton with faithful=True has the squared loss, not {loss.name}; leave faithful out, or take it"
            )
        self.model, self.group = model, group
        self.words = {"solver": "faithful"}
        self._recipe = recipe
        self._objective = LeastSquares(model, loss, group, tile=recipe.tile)
        self._step: int = 0
        self._kept: tuple[Tensor, float] | None = None  # x, and eps0 of it

    def step(self, batch: Batch) -> Metrics:
        objective = self._objective
        eps0 = self._accuracy(batch.x)
        point = objective.point(batch)
        scale = math.sqrt(2.0)  # the residuals of the squared loss are sqrt(2) (f - y)
        r = point.s.double() / scale
        jacobian = objective.jacobian(batch)
        per_row = max(self._recipe.sketch_rows or 0.0, PUBLISHED_ROWS)
        num = math.ceil(per_row * len(r))
        features = jacobian.features("srht", num, self._recipe.seed + self._step).double() / scale

        def product(v: Tensor) -> Tensor:
            image: Tensor = jacobian.product(v) / 2
            return image

        solved = gradient_descent(product, r, features, step=1.0, tolerance=eps0, max_iterations=MOST_DESCENT)
        if not solved.ok:
            raise DidNotSolve(
                f"gauss-newton with faithful=True: the descent left a relative residual of {solved.residual:.1e} after "
                f"{solved.iterations} iterations with {per_row:g} sketch rows a sample; raise sketch_rows"
            )
        objective.move_((point.weights.double() - jacobian.t_mv(solved.x).double() / scale).to(objective.dtype))
        end = objective.evaluate(batch)
        self._step += 1
        values = {
            "loss": end.total / end.rows,
            "contraction": math.sqrt(end.total / point.at.total) if point.at.total > 0 else 0.0,
            "iterations": float(solved.iterations),
            "linear_residual": solved.residual,
            "inner_tolerance": eps0,
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def _accuracy(self, x: Tensor) -> float:
        """eps0, by eigenvalues of the kernel of these samples. Raises BadInput where they are not of unit length."""
        if self._kept is not None and self._kept[0] is x:
            return self._kept[1]
        rows = x.double()
        if not bool(((rows.norm(dim=1) - 1).abs() < 1e-4).all()):
            raise BadInput(
                "gauss-newton with faithful=True needs samples of length 1, as the paper has them; divide each row of "
                "x by its norm"
            )
        values = torch.linalg.eigvalsh(infinite_kernel(rows))
        least = float(values[0])
        if not least > len(rows) * torch.finfo(rows.dtype).eps * float(values[-1]):
            raise BadInput(
                f"the kernel of these samples is singular (least eigenvalue {least:.1e}): two of them are parallel, or "
                "nearly so; drop duplicates"
            )
        self._kept = (x, math.sqrt(least / len(rows)) / 6)
        return self._kept[1]

    def sync(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])


def _is_published(model: nn.Module) -> bool:
    parts = list(model) if isinstance(model, nn.Sequential) else []
    if [type(part) for part in parts] != [nn.Linear, nn.ReLU, FixedSigns]:
        return False
    return getattr(parts[0], "bias", None) is None


def infinite_kernel(x: Tensor) -> Tensor:
    """(n, n) of samples (n, d) of unit length: x_i x_j (pi - arccos x_i x_j) / (2 pi)."""
    inner = (x @ x.t()).clamp(-1, 1)
    return inner * (math.pi - torch.arccos(inner)) / (2 * math.pi)
