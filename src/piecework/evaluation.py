"""The loss and the score of a deployed network, rank by rank and tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .losses import Loss
from .training import Batch, Task

TILE = 8192
"""Rows that pass through the network at once."""

Sums = list[float]
"""What one rank adds to an evaluation; entry by entry, ranks add up."""


@contextmanager
def deployed(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode and without a graph; each module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters (or else its buffers) are."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def score_name(task: Task) -> str:
    """`accuracy` for classes, `r2` for real targets."""
    return "r2" if task == "regression" else "accuracy"


def sums(model: nn.Module, part: Batch, rows: slice, loss: Loss, task: Task) -> Sums:
    """What these rows of a part add to its loss and score, in float64: [rows, total loss, ...].

    For classes the third entry counts the rows decided right (of a sequence, the part of its tokens); what has an
    output that is not finite is not right.
    For real targets the rest are, for each of the k outputs, the squared residuals, and the targets and their squares
    counted from the part's first row (so that a large mean costs no digits)."""
    device = device_of(model)
    width = 3 * part.y.shape[1] if task == "regression" else 1
    found = torch.zeros(2 + width, dtype=torch.float64, device="cpu")
    with deployed(model):
        size = TILE if part.y.is_floating_point() else max(1, TILE // max(1, part.y[:1].numel()))
        for start in range(rows.start, rows.stop, size):
            tile = slice(start, min(start + size, rows.stop))
            y = part.y[tile].to(device)
            z = model(part.x[tile].to(device))
            if task == "regression":
                figures = _squares(z, y, part.y[:1])
            else:
                right = (loss.decide(z) == y) & z.isfinite().all(-1)
                figures = (right.double().flatten(1).mean(1) if right.dim() > 1 else right).sum().reshape(1)
            total = loss.total(z, y).reshape(1)
            found[0] += len(y)
            found[1:] += torch.cat([total.to("cpu", torch.float64), figures.to("cpu", torch.float64)])
    return list(map(float, found.tolist()))


def _squares(prediction: Tensor, y: Tensor, pivot: Tensor) -> Tensor:
    prediction, y, pivot = (tensor.to("cpu", torch.float64) for tensor in (prediction, y, pivot))
    residual = (prediction - y).square().sum(0)
    centred = y - pivot
    return torch.cat([residual, centred.sum(0), centred.square().sum(0)])


def merged(parts: Sequence[Sums], task: Task) -> dict[str, float | None]:
    """{"loss": mean loss a row, "score": accuracy or R²} of all ranks' sums; None where a figure is not finite.

    R² is the mean over outputs of 1 - residual / variance; an output that never varies has 1 if it is met exactly,
    else 0, as in scikit-learn."""
    total = [math.fsum(column) if all(map(math.isfinite, column)) else math.nan for column in zip(*parts, strict=True)]
    rows, loss, figures = total[0], total[1], total[2:]
    if rows == 0:
        return {"loss": None, "score": None}
    if task != "regression":
        return {"loss": finite(loss / rows), "score": finite(figures[0] / rows)}
    k = len(figures) // 3
    scores = []
    for residual, first, second in zip(figures[:k], figures[k : 2 * k], figures[2 * k :], strict=True):
        spread = second - first * first / rows
        constant = not spread > 1e-12 * second
        scores.append(float(residual == 0) if constant else 1 - residual / spread)
    return {"loss": finite(loss / rows), "score": finite(math.fsum(scores) / k)}


def finite(value: float) -> float | None:
    """The value, or None for what JSON cannot write."""
    return value if math.isfinite(value) else None
