"""The three passes over the data of a sweep, each summed over the ranks in one packed message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...group import Group
from ...training import Batch
from .tiles import GramSum, Tiles

if TYPE_CHECKING:
    from .output import OutputLoss


@dataclass(frozen=True)
class Fit:
    """Sums for the least-squares refit of the output layer at given hidden weights."""

    gram: Tensor
    """(d + 1, d + 1) of the output layer's inputs."""
    cross: Tensor
    """(d_L, d + 1) of targets with inputs."""
    square: float
    """Sum of squared targets."""
    rows: int


@dataclass(frozen=True)
class Directions:
    """Sums of one forward pass with backward targets."""

    crosses: list[Tensor]
    """(d_l, d_{l-1} + 1) of displacements with inputs; for the output layer, of minus the loss's gradient with them."""
    grams: list[Tensor | None]
    """(d_{l-1} + 1, d_{l-1} + 1) of the inputs, a layer each; None where it was not asked for."""
    other_rows: bool
    """Whether any rank said that it works on other rows than before."""


@dataclass(frozen=True)
class Line:
    """The loss along the directions, to second order at the outputs and first order in the network."""

    slope: Tensor
    """(m,) minus the derivative of the total loss."""
    curvature: Tensor
    """(m, m)."""
    inputs: Tensor | None
    """(m, d_L, d + 1) cross products of the tangents with the output layer's inputs, where that layer is refitted."""


def sum_packed(group: Group, grams: list[Tensor], others: list[Tensor]) -> None:
    """Sum over the ranks in place, in one message: of a Gram matrix its lower triangle, (d + 1) d / 2 numbers.

    The Gram matrices come as lower triangles and leave whole and symmetric."""
    corners = [torch.tril_indices(len(g), len(g), device=g.device) for g in grams]
    if group.size > 1:
        parts = [g[i[0], i[1]] for g, i in zip(grams, corners, strict=True)] + [o.flatten() for o in others]
        flat = torch.cat(parts)
        group.sum_(flat)
        pieces = torch.split(flat, [len(p) for p in parts])
        for g, i, piece in zip(grams, corners, pieces, strict=False):
            g[i[0], i[1]] = piece
        for o, piece in zip(others, pieces[len(grams) :], strict=True):
            o.copy_(piece.view_as(o))
    for g in grams:
        g.copy_(torch.tril(g) + torch.tril(g, -1).t())


def fit_output(tiles: Tiles, batch: Batch, weights: list[Tensor], loss: OutputLoss, group: Group) -> Fit:
    """One pass: forward through the hidden layers, Gram and cross product of the output layer."""
    last = len(weights) - 1
    gram = GramSum(tiles.a[last].shape[1], dtype=tiles.dtype, device=tiles.device)
    cross = tiles.zeros(tiles.widths[-1], tiles.a[last].shape[1])
    square, count = tiles.zeros(1), tiles.zeros(1) + len(batch)
    for x, y, _ in tiles.of(batch):
        tiles.hidden(x, weights)
        a = tiles.a[last][: len(x)]
        targets = loss.targets(y)
        gram.add(a)
        cross += targets.t() @ a
        square += targets.double().square().sum()
    sum_packed(group, [gram.total], [cross, square, count])
    return Fit(gram.total, cross, float(square), int(count))


def directions(
    tiles: Tiles,
    batch: Batch,
    weights: list[Tensor],
    loss: OutputLoss,
    group: Group,
    *,
    gains: list[Tensor],
    skip: set[int],
    move_dual: bool = True,
    other_rows: bool = False,
) -> Directions:
    """One pass: forward, targets backward; cross products of all layers and Grams of those not in `skip`.

    other_rows: this rank's word on whether its rows changed; it travels with the sums and costs no message."""
    size = [a.shape[1] for a in tiles.a]
    grams = {l: GramSum(size[l], dtype=tiles.dtype, device=tiles.device) for l in range(len(weights)) if l not in skip}
    crosses = [
        torch.zeros(len(w), s, dtype=torch.float64, device=tiles.device) for w, s in zip(weights, size, strict=True)
    ]
    changed = tiles.zeros(1) + float(other_rows)
    for spread in tiles.spread.values():
        spread.zero_()
    for x, y, rows in tiles.of(batch):
        n = len(x)
        m = tiles.forward(x, weights)
        crosses[-1] += loss.fall(m, y).t() @ tiles.a[-1][:n]
        if gains:
            for l, e in tiles.displacements(loss.displacement(m, y, rows, move_dual=move_dual), gains):
                crosses[l] += e.t() @ tiles.a[l][:n]
        for l, gram in grams.items():
            gram.add(tiles.a[l][:n])
    found = [grams[l].total if l in grams else None for l in range(len(weights))]
    sum_packed(group, [g for g in found if g is not None], [*crosses, changed, *tiles.spread.values()])
    return Directions(crosses, found, float(changed) > 0)


def line(
    tiles: Tiles,
    batch: Batch,
    weights: list[Tensor],
    loss: OutputLoss,
    group: Group,
    *,
    moves: list[tuple[int, Tensor]],
) -> Line:
    """One pass: tangents of the outputs along each move, and what the closed-form step needs of them."""
    m, inputs = len(moves), tiles.a[-1].shape[1]
    slope, curvature = tiles.zeros(m), tiles.zeros(m, m)
    crosses = tiles.zeros(m, tiles.widths[-1], inputs) if loss.exact else None
    for x, y, _ in tiles.of(batch):
        n = len(x)
        z = tiles.forward(x, weights)
        tangents = tiles.tangents(moves, weights, n)
        if crosses is not None:
            crosses += (tangents.t() @ tiles.a[-1][:n]).view_as(crosses)
        each = tangents.view(n, m, -1)
        flat = each.transpose(0, 1).flatten(1).double()
        bent = torch.stack([loss.curve(z, y, t) for t in each.unbind(1)]).flatten(1).double()
        slope += flat @ loss.fall(z, y).flatten().double()
        curvature += flat @ bent.t()
    sum_packed(group, [], [slope, curvature] if crosses is None else [slope, curvature, crosses])
    return Line(slope, curvature, crosses)


def total_loss(tiles: Tiles, batch: Batch, weights: list[Tensor], loss: OutputLoss, group: Group) -> tuple[float, int]:
    """One pass: the total loss of the deployed network, and the number of rows it is of."""
    total, count = tiles.zeros(1), tiles.zeros(1) + len(batch)
    for x, y, _ in tiles.of(batch):
        total += loss.total(tiles.forward(x, weights), y)
    sum_packed(group, [], [total, count])
    return float(total), int(count)
