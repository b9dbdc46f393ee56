"""One tile of rows at a time: forward pass, backward targets and tangents in buffers that are allocated once.

Legend: T rows of a tile, l = 0..L-1 the layers, a[l] the input of layer l with a column of ones where the layer has a
bias, z[l] its output. Everything that needs a tile's matrices is accumulated before the next tile is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ...training import Batch
from .network import Network

TILE_NUMBERS = 320_000
"""Numbers a thread in the widest matrix of a tile: 1024 rows of 300 units, the fastest of several on two processes.

Larger ones fill the cache that the cores share, which two processes on one machine fight for; smaller cost calls."""
FAR = 1e15
"""Times a positive activation: beyond anything that is compared with it."""


class Tiles:
    """The buffers of one network. Nothing here is kept from one tile to the next."""

    def __init__(
        self, network: Network, *, gamma: float, beta: float, flips: bool, rows: int | None, threads: int = 1
    ) -> None:
        first = network.linears[0].weight
        self.network, self.gamma, self.beta, self.flips = network, gamma, beta, flips
        self.dtype, self.device = first.dtype, first.device
        self.widths = network.widths
        widest = max(self.widths)
        self.rows = rows or min(8192, max(128, TILE_NUMBERS * threads // widest // 64 * 64))
        self.a = [
            self._ones(d, linear.bias is not None) for d, linear in zip(self.widths, network.linears, strict=False)
        ]
        self.z = [self._empty(d) for d in self.widths[1:]]
        jumps = [l for l, activation in enumerate(network.activations) if activation.piecewise_constant]
        self.relax = dict.fromkeys(jumps, 1.0)
        """Factor of a' - h(z) at activations that jump: what is smaller than a jump moves nothing there."""
        self.spread = {l: torch.zeros(1, dtype=torch.float64, device=self.device) for l in jumps}
        """Sum of squares of a' - h(z) there, before that factor; a pass over the data adds to it."""
        self._e, self._below, self._keep = ([self._empty(d) for d in self.widths[1:-1]] for _ in range(3))
        self._t = [self._empty(d) for d in self.widths[1:]]

    def _empty(self, width: int) -> Tensor:
        return torch.empty(self.rows, width, dtype=self.dtype, device=self.device)

    def _ones(self, width: int, bias: bool) -> Tensor:
        """(rows, width + bias) ones; rows begin at multiples of 16 numbers, which the matrix products like."""
        stride = -(-(width + bias) // 16) * 16
        return torch.ones(self.rows, stride, dtype=self.dtype, device=self.device)[:, : width + bias]

    def zeros(self, *shape: int) -> Tensor:
        """A float64 accumulator beside the weights."""
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def of(self, batch: Batch, *, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Every so many tiles of the batch in order, on the device of the weights: features, targets, rows."""
        for start in range(first * self.rows, len(batch), every * self.rows):
            rows = slice(start, min(start + self.rows, len(batch)))
            yield batch.x[rows].to(self.device), batch.y[rows].to(self.device), rows

    def forward(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The network's outputs (T, d_L); fills a and z with this tile's activations and pre-activations."""
        self.hidden(x, weights)
        return torch.mm(self.a[-1][: len(x)], weights[-1].t(), out=self.z[-1][: len(x)])

    def hidden(self, x: Tensor, weights: list[Tensor]) -> None:
        """The forward pass as far as the output layer's inputs a[L-1]."""
        n = len(x)
        self.a[0][:n, : self.widths[0]] = self.network.preparing(x)
        for l, w in enumerate(weights[:-1]):
            z = torch.mm(self.a[l][:n], w.t(), out=self.z[l][:n])
            self._activate(l, z, self.a[l + 1][:n, : self.widths[l + 1]])

    def _activate(self, l: int, z: Tensor, out: Tensor) -> None:
        activation = self.network.activations[l]
        if activation.name == "relu":
            torch.clamp_min(z, 0, out=out)
        else:
            out.copy_(activation.forward(z))

    def displacements(self, output: Tensor, gains: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """z' - z of the hidden layers, from the last to the first, given t_L - z_L of the output layer (T, d_L).

        gains[l] is K = V^T (V V^T + gamma/beta I)^-1 of layer l + 1, (d_{l+1}, d_{l+2}): the closed-form a-update is
        a' - h(z_l) = K (t_{l+1} - z_{l+1}). Unrelaxed displacements are passed down, so layers do not compound."""
        e, n = output, len(output)
        for l in range(len(gains) - 1, -1, -1):
            da = torch.mm(e, gains[l].t(), out=self._e[l][:n])
            e = self._relu_step(l, da) if self.network.activations[l].name == "relu" else self._z_step(l, da)
            yield l, e

    def _z_step(self, l: int, da: Tensor) -> Tensor:
        n = len(da)
        z = self.z[l][:n]
        if l in self.spread:
            self.spread[l] += da.double().square().sum()
            da.mul_(self.relax[l])
        target = da.add_(self.a[l + 1][:n, : self.widths[l + 1]])
        activation = self.network.activations[l]
        return torch.sub(activation.z_update(target, z, self.gamma, self.beta), z, out=self._e[l][:n])

    def _relu_step(self, l: int, da: Tensor) -> Tensor:
        """z' - z for ReLU without forming z', so that nothing cancels; overwrites da.

        With c = gamma/(gamma + beta), r = sqrt(beta/(beta + gamma)): z > 0 gives max(c da, -z); z <= 0 gives
        c (da - z) where the unit is flipped up, which is where (1 - r) da + r z > 0, and 0 elsewhere. Masks are
        numbers whose sign is tested by `threshold_backward`: boolean tensors cost several times as much."""
        n = len(da)
        c, r = self.gamma / (self.gamma + self.beta), math.sqrt(self.beta / (self.beta + self.gamma))
        z, h = self.z[l][:n], self.a[l + 1][:n, : self.widths[l + 1]]
        below, keep = self._below[l][:n], self._keep[l][:n]
        if self.flips:
            torch.sub(z, h, out=below)  # min(z, 0)
            torch.add(below, h, alpha=FAR, out=keep).add_(da, alpha=(1 - r) / r)
            da.sub_(below)
        else:
            keep = z
        torch.maximum(da.mul_(c), torch.neg(h, out=below), out=da)
        return torch.ops.aten.threshold_backward.grad_input(da, keep, 0, grad_input=da)  # type: ignore[no-any-return]

    def tangents(self, moves: list[tuple[int, Tensor]], weights: list[Tensor], n: int) -> Tensor:
        """d outputs / d s of weights[l] + s * move, beside each other in (n, moves * d_L), at the current tile."""
        outputs = []
        for l, move in moves:
            t = torch.mm(self.a[l][:n], move.t(), out=self._tangent(l, n))
            for above in range(l + 1, len(weights)):
                t = self._bend(above - 1, t)
                t = torch.mm(t, weights[above][:, : self.widths[above]].t(), out=self._tangent(above, n))
            outputs.append(t.clone() if len(moves) > 1 else t)
        return torch.cat(outputs, 1)

    def _tangent(self, l: int, n: int) -> Tensor:
        return self._t[l][:n]

    def _bend(self, l: int, t: Tensor) -> Tensor:
        """t times h'(z_l), in place."""
        activation, z = self.network.activations[l], self.z[l][: len(t)]
        if activation.name == "relu":
            return torch.ops.aten.threshold_backward.grad_input(t, z, 0, grad_input=t)  # type: ignore[no-any-return]
        if activation.derivative is None or activation.name == "identity":
            return t
        return t.mul_(activation.derivative(z))


class GramSum:
    """The sum over tiles of a^T a, in float64; only the lower block triangle is multiplied out.

    A plain product would spend half its flops on the mirror image; `BLOCKS` column blocks spend (BLOCKS + 1) / 2 BLOCKS
    of them. Tiles are cast up before they are added."""

    BLOCKS = 5
    WORTH_BLOCKS = 96

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        blocks = self.BLOCKS if size >= self.WORTH_BLOCKS else 1
        edges = [round(size * i / blocks / 16) * 16 for i in range(blocks)] + [size]
        self._spans = list(pairwise(edges))
        self._products = [torch.empty(hi - lo, hi, dtype=dtype, device=device) for lo, hi in self._spans]
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, a: Tensor) -> None:
        for (lo, hi), product in zip(self._spans, self._products, strict=True):
            torch.mm(a[:, lo:hi].t(), a[:, :hi], out=product)
            self.total[lo:hi, :hi] += product
