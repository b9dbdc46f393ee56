"""The total loss of all ranks' rows as a sum of squares, at the model's present weights and around them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...group import Group
from ...layers import layers
from ...losses import CurvedLoss, Loss
from ...nn import Standardise
from ...training import BadInput, Batch, CannotTrain, stream
from ..parameters import packed, refuse_noise_and_coupling, start_from_rank_0, trainable, unpack_
from .jacobian import (
    PROBE_ROWS,
    Jacobian,
    MatrixFree,
    Plan,
    capture,
    concatenate,
    plan,
    refuse_early,
    spread,
    values_of,
)
from .systems import Pull

CURVATURE = ("residual", "root_mv", "root_t_mv")


TILE, LEAST_ROWS, MOST_ROWS = 2**20, 16, 8192
"""Numbers of a tile: few enough to stay near a core, and the fewest and most rows that it may have."""


@dataclass(frozen=True)
class Evaluation:
    """One forward pass. z: (n, k) outputs of this rank's rows; total: the loss summed over all ranks' rows and the
    penalty, which a step lowers; floats that are equal on all ranks; rows: how many those are."""

    z: Tensor
    total: float
    rows: int
    penalty: float

    @property
    def loss(self) -> float:
        """The mean over all ranks' rows, without the penalty."""
        return (self.total - self.penalty) / self.rows


@dataclass(frozen=True, eq=False)
class Point:
    """The model's weights (P,), a batch, and what was found there: this rank's residuals s (N,)."""

    batch: Batch
    at: Evaluation
    s: Tensor
    weights: Tensor

    @property
    def num_rows(self) -> int:
        """N, of all ranks."""
        return self.at.rows * self.at.z.shape[1]


class LeastSquares:
    """The model, its loss and the ranks: outputs, residuals s and the Jacobian of B^T z by all trainable parameters.

    With B B^T the curvature of the loss at the outputs and B s its gradient, the total loss after a move d of the
    weights is |s - J d|^2 / 2 and a constant, to second order in the outputs and first order in the weights. To it
    comes a penalty of weight_decay / 2 for each row and squared weight."""

    def __init__(
        self, model: nn.Module, loss: Loss, group: Group, *, tile: int | None = None, weight_decay: float = 0.0
    ) -> None:
        """Raises CannotTrain for a loss without curvature and for a model that draws random numbers or couples rows."""
        lacking = [name for name in CURVATURE if not hasattr(loss, name)]
        if lacking:
            raise CannotTrain(
                f"gauss-newton needs a loss with curvature, and the {loss.name} loss lacks {', '.join(lacking)}; "
                "squared, logistic and softmax have it"
            )
        self.model, self.loss, self.group = model, cast(CurvedLoss, loss), group
        self._weight_decay = weight_decay
        self.parameters = trainable(model, "gauss-newton")
        self.tile = tile or _tile_for(self.parameters)
        refuse_noise_and_coupling(model, "gauss-newton")
        _refuse_tokens(model)
        self.num_columns = sum(parameter.numel() for parameter in self.parameters)
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device
        start_from_rank_0(model, group)
        self._probe()
        self._settled: tuple[Plan, Tensor] | None = None
        self._forward_mode: bool | None = None

    def _probe(self) -> None:
        """Refuse now what the first batch would show: a model that draws random numbers or couples rows by itself. Only
        where the first layer tells what goes in."""
        first = next(layers(self.model))[1]
        width = first.in_features if isinstance(first, nn.Linear) else None
        width = len(first.mean) if isinstance(first, Standardise) else width
        if width:
            rows = torch.randn(PROBE_ROWS, width, generator=stream(0), dtype=torch.float64)
            refuse_early(self.model, rows.to(self.device, self.dtype))

    @property
    def weights(self) -> Tensor:
        """(P,), a copy."""
        return packed(self.parameters)

    def move_(self, weights: Tensor) -> None:
        """Let the model have these weights (P,)."""
        unpack_(weights, self.parameters)

    def evaluate(self, batch: Batch) -> Evaluation:
        """Collective."""
        settled = self.plan(batch)
        return self._evaluation(batch, [(values_of(self.model, settled, x), y) for x, y in self.tiles(batch)])

    def _evaluation(self, batch: Batch, tiles: Sequence[tuple[Tensor, Tensor]]) -> Evaluation:
        """From outputs and targets of this rank's rows. Collective."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for z, y in tiles:
            total[0] += self.loss.total(z, y)
        total[1] = len(batch)
        self.group.sum_(total)
        loss, rows = total.tolist()
        if rows == 0:
            raise BadInput("there are no rows to train on, on any rank")
        penalty = self.decay(int(rows)) / 2 * float(self.weights.double().square().sum()) if self._weight_decay else 0.0
        z = torch.cat([z for z, _ in tiles]) if tiles else self._no_rows(batch)
        return Evaluation(z, loss + penalty, int(rows), penalty)

    def decay(self, rows: int) -> float:
        """The penalty's second derivative by any weight, for so many rows."""
        return self._weight_decay * rows

    def pulls(self, point: Point) -> list[Pull]:
        """What the penalty adds to the system there: a step of all the weights would bring it to 0."""
        return [Pull(self.decay(point.at.rows), point.weights)] if self._weight_decay else []

    def point(self, batch: Batch, at: Evaluation | None = None) -> Point:
        """The present weights, evaluated on the batch unless that was done. Collective."""
        at = self.evaluate(batch) if at is None else at
        s = self.loss.residual(at.z, batch.y.to(self.device)).reshape(-1)
        return Point(batch, at, s, self.weights)

    def promised(self, point: Point, step: Tensor, moved: Tensor) -> float:
        """The fall of the quadratic model, 1/2 (|s|^2 - |s - J d|^2) over all ranks' rows and that of the penalty, for
        a step d and this rank's J d; without cancellation, and for an inexact d too. Collective."""
        s, moved = point.s.double(), moved.double()
        found = (moved @ (2 * s - moved)).reshape(1) / 2
        self.group.sum_(found)
        if not self._weight_decay:
            return float(found)
        d = step.double()
        return float(found) + self.decay(point.at.rows) / 2 * float(d @ (2 * point.weights.double() - d))

    def root_t(self, point: Point, moved: Tensor) -> Tensor:
        """B^T of a move of the outputs (n, k): (N,)."""
        return self.loss.root_t_mv(point.at.z, point.batch.y.to(self.device), moved).reshape(-1)

    def plan(self, batch: Batch) -> Plan:
        """How each parameter's derivative is taken: settled at the first batch, from the same rows on all ranks.
        Collective then."""
        return self._probed(batch)[0]

    def _probed(self, batch: Batch) -> tuple[Plan, Tensor]:
        if self._settled is None:
            some = spread(len(batch))
            probe = torch.cat(self.group.gather(batch.x[some].to(self.device)))
            found = plan(self.model, probe)
            if found.idle:
                left = "only lets it decay" if self._weight_decay else "leaves it as it is"
                warnings.warn(
                    f"the outputs do not depend on {', '.join(found.idle)}: gauss-newton {left}",
                    stacklevel=5,
                )
            self._settled = (found, probe)
        return self._settled

    def jacobian(self, batch: Batch) -> Jacobian:
        """J (N, P) of this rank's rows in factors."""
        return self._captured(batch)[1]

    def linearised(self, batch: Batch) -> tuple[Point, Jacobian]:
        """`point` and `jacobian` from one forward pass. Collective."""
        tiles, jacobian = self._captured(batch)
        return self.point(batch, self._evaluation(batch, tiles)), jacobian

    def _captured(self, batch: Batch) -> tuple[list[tuple[Tensor, Tensor]], Jacobian]:
        """Outputs and targets tile by tile, and the Jacobian of all."""
        settled, probe = self._probed(batch)
        if not len(batch):
            return [], capture(self.model, settled, probe[:1])[1].samples(slice(0, 0))
        values, parts = [], []
        for x, y in self.tiles(batch):

            def columns(z: Tensor, y: Tensor = y) -> list[Tensor]:
                units = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
                return [self.loss.root_mv(z, y, unit.expand_as(z)) for unit in units]

            z, part = capture(self.model, settled, x, columns)
            values.append((z, y))
            parts.append(part)
        return values, parts[0] if len(parts) == 1 else concatenate(parts)

    def products(self, point: Point, *, keep: bool = False) -> MatrixFree | Jacobian:
        """J of this rank's rows as products; keep: their graphs, which are about as much memory as factors are."""
        batch, z, loss = point.batch, point.at.z, self.loss
        if not len(batch):
            return self.jacobian(batch)
        y = batch.y.to(self.device)
        found = MatrixFree(
            self.model,
            batch.x,
            num_outputs=z.shape[1],
            root_mv=lambda v, part: loss.root_mv(z[part], y[part], v),
            root_t_mv=lambda v, part: loss.root_t_mv(z[part], y[part], v),
            tile=self.tile,
            keep=keep or None,
            forward_mode=self._forward_mode,
        )
        if self._forward_mode is None:  # tested once: the test is a product
            found.mv(torch.zeros(self.num_columns, dtype=self.dtype, device=self.device))
            self._forward_mode = found.forward_mode
        return found

    def tiles(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) of some rows at a time, on the model's device."""
        for start in range(0, len(batch), self.tile):
            rows = slice(start, start + self.tile)
            yield batch.x[rows].to(self.device), batch.y[rows].to(self.device)

    def _no_rows(self, batch: Batch) -> Tensor:
        return torch.zeros(0, self.plan(batch).num_outputs, dtype=self.dtype, device=self.device)


def _tile_for(parameters: Sequence[nn.Parameter]) -> int:
    """Rows such that a tile of the widest layer has about as many numbers as TILE says."""
    widest = max((len(parameter) for parameter in parameters if parameter.dim() > 1), default=1)
    return min(MOST_ROWS, max(LEAST_ROWS, TILE // widest))


def _refuse_tokens(model: nn.Module) -> None:
    found = next((name for name, module in model.named_modules() if isinstance(module, nn.Embedding)), None)
    if found is not None:
        raise CannotTrain(
            f"gauss-newton takes rows of real numbers, and layer {found} (Embedding) takes tokens; train with local, "
            "adam or sgd"
        )
