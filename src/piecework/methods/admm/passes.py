"""The three passes over the data of a sweep, each summed over the ranks in one packed message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...group import Group
from ...training import Batch
from .crew import Crew, Share
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
    spread: dict[int, float]
    """Sum of squares of a' - h(z) at the activations that jump, before it is scaled."""
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


def fit_output(crew: Crew, batch: Batch, weights: list[Tensor], loss: OutputLoss, group: Group) -> Fit:
    """One pass: forward through the hidden layers, Gram and cross product of the output layer."""
    last = len(weights) - 1

    def sums(tiles: Tiles, share: Share) -> list[Tensor]:
        gram = GramSum(crew.columns[last], dtype=tiles.dtype, device=tiles.device)
        cross, square = tiles.zeros(crew.widths[-1], crew.columns[last]), tiles.zeros(1)
        for x, y, _ in share:
            tiles.hidden(x, weights)
            a = tiles.a[last][: len(x)]
            targets = loss.targets(y)
            gram.add(a)
            cross += targets.t() @ a
            square += targets.double().square().sum()
        return [gram.total, cross, square]

    gram, cross, square = crew.sum(batch, sums)
    count = crew.zeros(1) + len(batch)
    sum_packed(group, [gram], [cross, square, count])
    return Fit(gram, cross, float(square), int(count))


def directions(
    crew: Crew,
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
    layers = range(len(weights))
    with_gram = [l for l in layers if l not in skip]
    jumps = list(crew.relax)

    def sums(tiles: Tiles, share: Share) -> list[Tensor]:
        grams = {l: GramSum(crew.columns[l], dtype=tiles.dtype, device=tiles.device) for l in with_gram}
        crosses = [tiles.zeros(len(w), columns) for w, columns in zip(weights, crew.columns, strict=True)]
        for spread in tiles.spread.values():
            spread.zero_()
        for x, y, rows in share:
            n = len(x)
            m = tiles.forward(x, weights)
            crosses[-1] += loss.fall(m, y).t() @ tiles.a[-1][:n]
            if gains:
                for l, e in tiles.displacements(loss.displacement(m, y, rows, move_dual=move_dual), gains):
                    crosses[l] += e.t() @ tiles.a[l][:n]
            for l, gram in grams.items():
                gram.add(tiles.a[l][:n])
        return [gram.total for gram in grams.values()] + crosses + [tiles.spread[l] for l in jumps]

    found = crew.sum(batch, sums)
    changed = crew.zeros(1) + float(other_rows)
    grams, others = found[: len(with_gram)], found[len(with_gram) :]
    sum_packed(group, grams, [*others, changed])
    crosses, spread = others[: len(layers)], others[len(layers) :]
    gram_of = dict(zip(with_gram, grams, strict=True))
    return Directions(
        crosses, [gram_of.get(l) for l in layers], {l: float(s) for l, s in zip(jumps, spread, strict=True)},
        float(changed) > 0,
    )  # fmt: skip


def line(
    crew: Crew,
    batch: Batch,
    weights: list[Tensor],
    loss: OutputLoss,
    group: Group,
    *,
    moves: list[tuple[int, Tensor]],
) -> Line:
    """One pass: tangents of the outputs along each move, and what the closed-form step needs of them."""
    m, inputs = len(moves), crew.columns[-1]

    def sums(tiles: Tiles, share: Share) -> list[Tensor]:
        slope, curvature = tiles.zeros(m), tiles.zeros(m, m)
        crosses = tiles.zeros(m, crew.widths[-1], inputs) if loss.exact else None
        for x, y, _ in share:
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
        return [slope, curvature] if crosses is None else [slope, curvature, crosses]

    found = crew.sum(batch, sums)
    sum_packed(group, [], found)
    slope, curvature = found[:2]
    return Line(slope, curvature, found[2] if loss.exact else None)


def total_loss(crew: Crew, batch: Batch, weights: list[Tensor], loss: OutputLoss, group: Group) -> tuple[float, int]:
    """One pass: the total loss of the deployed network, and the number of rows it is of."""

    def sums(tiles: Tiles, share: Share) -> list[Tensor]:
        total = tiles.zeros(1)
        for x, y, _ in share:
            total += loss.total(tiles.forward(x, weights), y)
        return [total]

    (total,) = crew.sum(batch, sums)
    count = crew.zeros(1) + len(batch)
    sum_packed(group, [], [total, count])
    return float(total), int(count)
