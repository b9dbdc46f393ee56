"""Blocks of weights whose gradient is a sum of outer products: what goes in (a) and what comes back (d), never d a^T.

Row (i, c) of such a block is sum_t d_ict a_it^T, so that a gram matrix is a sum of Hadamard products.
Legend: n samples, C rows a sample, T uses of the weight within a sample, A and D the widths of the two sides.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ....solvers import sketch
from ....solvers.kronecker import Moments
from ....training import BadInput
from .blocks import Block, Kind, check_kind, spans

F = TypeVar("F", bound="Factors")


class Factors(Block):
    """A weight (D, A) used T times a sample; the kinds differ in how the inputs are kept.

    d: (n, C, T, D), derivatives of the rows by what the weight gave."""

    d: Tensor

    @property
    @abstractmethod
    def num_inputs(self) -> int:
        """A, with the constant input of a bias."""

    @abstractmethod
    def input_gram(self, part: slice, t: int, other: Block, end: int, s: int, dtype: torch.dtype) -> Tensor:
        """Inner products of the inputs: of samples `part` at use t with the other's samples up to `end` at use s."""

    @abstractmethod
    def own_input_gram(self) -> Tensor:
        """Inner products of a sample's inputs with each other, (n, T, T)."""

    @abstractmethod
    def input_norms(self) -> Tensor:
        """Squared norms of the inputs, (n, T)."""

    @abstractmethod
    def unit_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Explicit columns of the output units from `start` up to `stop`: (N, (stop - start) A), the bias last of
        each unit's."""

    @property
    def num_samples(self) -> int:
        return self.d.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.d.shape[1]

    @property
    def num_uses(self) -> int:
        """T."""
        return self.d.shape[2]

    @property
    def num_units(self) -> int:
        """D."""
        return self.d.shape[3]

    @property
    def num_columns(self) -> int:
        return self.num_units * self.num_inputs

    def add_gram_(self, out: Tensor, other: Block, *, lower: bool) -> None:
        """T T' Hadamard products, (D D^T) o (A A^T) for each pair of uses, or explicit rows of a few units at a time:
        whichever is fewer operations."""
        assert isinstance(other, Factors)
        pair = other.num_outputs * self.num_outputs
        products = self.num_uses * other.num_uses * (pair * self.num_units + self._input_width)
        if products <= pair * self.num_columns:
            self._add_products_(out, other, lower)
        else:
            self._add_unit_rows_(out, other, lower)

    @property
    def _input_width(self) -> int:
        return self.num_inputs

    def _add_products_(self, out: Tensor, other: Factors, lower: bool) -> None:
        n, c, _, units = self.d.shape
        m, c2 = other.num_samples, other.num_outputs
        whole = out.view(n, c, m, c2)
        left, right = self.d.to(out.dtype), other.d.to(out.dtype)
        for part in spans(n, c * m * c2, shares=8, least=max(1, 128 // c)):
            end = part.stop if lower else m
            for t in range(self.num_uses):
                rows = left[part, :, t].reshape(-1, units)
                for s in range(other.num_uses):
                    inputs = self.input_gram(part, t, other, end, s, out.dtype)
                    outputs = rows @ right[:end, :, s].reshape(-1, units).t()
                    whole[part, :, :end].addcmul_(outputs.view(len(inputs), c, end, c2), inputs[:, None, :, None])

    def _add_unit_rows_(self, out: Tensor, other: Factors, lower: bool) -> None:
        width = (self.num_rows + other.num_rows) * self.num_inputs
        for part in spans(self.num_units, width):
            left = self.unit_rows(part.start, part.stop, out.dtype)
            right = left if other is self else other.unit_rows(part.start, part.stop, out.dtype)
            for rows in spans(self.num_rows, other.num_rows, shares=8):
                end = rows.stop if lower else other.num_rows
                out[rows, :end].addmm_(left[rows], right[:end].t())

    def diagonal(self) -> Tensor:
        n, c, uses, _ = self.d.shape
        if uses == 1:
            return (self.d.square().sum((2, 3)) * self.input_norms()).view(-1)
        out = torch.empty(n, c, dtype=self.dtype, device=self.device)
        if uses * (self.num_units + self._input_width) <= self.num_columns:
            for part in spans(n, c * uses * max(uses, self.num_units), least=1):
                d, inputs = self.d[part], self.samples(part).own_input_gram()
                out[part] = ((d @ d.mT) * inputs[:, None]).sum((2, 3))
            return out.view(-1)
        for part in spans(n, c * self.num_columns, least=1):
            rows = self.samples(part).unit_rows(0, self.num_units, self.dtype)
            out[part] = torch.linalg.vector_norm(rows, dim=1).square().view(-1, c)
        return out.view(-1)

    def sampled_units(self: F, num: int, seed: int) -> F:
        """Output units drawn by their part of the trace (uses of one sample counted as if they were orthogonal)."""
        if num >= self.num_units:
            return self
        inputs = self.input_norms()
        norms = torch.zeros(self.num_units, dtype=self.dtype, device=self.device)
        for part in spans(self.num_samples, self.num_outputs * self.num_uses * self.num_units, least=1):
            norms += (self.d[part].square() * inputs[part, None, :, None]).sum((0, 1, 2))
        index, weight = sketch.sample_units(norms, num, seed)
        return self._with_d(self.d[..., index] * weight.to(self.dtype).sqrt())

    def _output_moments(self) -> Tensor:
        """The sum of d d^T, (D, D), for one use: positions are taken as independent, with the inputs summed over them
        (Grosse and Martens, arXiv 1602.01407)."""
        d = self.d.reshape(-1, self.num_units)
        return d.t() @ d / self.num_uses

    @abstractmethod
    def _with_d(self: F, d: Tensor) -> F: ...

    def _rows_combined(self, v: Tensor) -> Tensor:
        """sum_c v_ic d_ict, (n, T, D): what J^T v needs of the outputs' side where C > 1."""
        n, c, uses, units = self.d.shape
        return (v.view(n, 1, c) @ self.d.reshape(n, c, uses * units)).view(n, uses, units)


@dataclass(frozen=True, eq=False)
class Outer(Factors):
    """A linear map (a layer, or a convolution by its patches): row (i, c) is sum_t d_ict a_it^T, then sum_t d_ict for a
    bias, flattened as torch flattens a weight (D, A) and a bias (D,).

    a: (n, T, A), A = 0 where only the bias is trained; d: (n, C, T, D)."""

    a: Tensor
    d: Tensor
    bias: bool

    def __post_init__(self) -> None:
        a, d = self.a.shape, self.d.shape
        if len(a) != 3 or len(d) != 4 or a[0] != d[0] or a[1] != d[2]:
            raise BadInput(
                f"factors are a (n, T, A) and d (n, C, T, D) of the same n and T; got {tuple(a)}, {tuple(d)}"
            )

    @property
    def num_inputs(self) -> int:
        return self.a.shape[2] + self.bias

    def mv(self, w: Tensor) -> Tensor:
        """With one row a sample the wider side is contracted first, 2 N P_l operations and no (n, max(A, D))
        temporary. With C > 1 the inputs are: C times fewer, and what arises is the C-th part of d."""
        n, c, uses, units = self.d.shape
        width = self.a.shape[2]
        weight, shift = w[: units * width].view(units, width), w[units * width :]
        d, a = self.d.reshape(n * c * uses, units), self.a.reshape(n * uses, width)
        if c == 1 and units > width:
            found = ((d @ weight).view(n, uses * width) * self.a.reshape(n, uses * width)).sum(1)
        else:
            # A product and a sum: a batch of matrices with one column each is several times slower.
            found = (self.d.reshape(n, c, uses * units) * (a @ weight.t()).view(n, 1, uses * units)).sum(2).view(-1)
        return found + (d @ shift).view(n * c, uses).sum(1) if self.bias else found

    def t_mv(self, v: Tensor) -> Tensor:
        n, c, uses, units = self.d.shape
        width = self.a.shape[2]
        a, d = self.a.reshape(n * uses, width), self.d.reshape(n * c * uses, units)
        if c > 1:
            combined = self._rows_combined(v).view(n * uses, units)
            return self._joined(combined.t() @ a, combined.sum(0))
        v = v[:, None].expand(n, uses).reshape(-1)
        if units > width:
            return self._joined(d.t() @ (a * v[:, None]), d.t() @ v)
        scaled = d * v[:, None]
        return self._joined(scaled.t() @ a, scaled.sum(0))

    def _joined(self, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([weight.reshape(-1), bias]) if self.bias else weight.reshape(-1)

    def explicit(self) -> Tensor:
        n, c, uses, units = self.d.shape
        weight = (self.d.mT.reshape(n, c * units, uses) @ self.a).view(n * c, units * self.a.shape[2])
        return torch.cat([weight, self.d.sum(2).view(n * c, units)], 1) if self.bias else weight

    def unit_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        n, c, uses, _ = self.d.shape
        d = self.d[..., start:stop].to(dtype).mT.reshape(n, c * (stop - start), uses)
        return (d @ self._inputs().to(dtype)).view(n * c, (stop - start) * self.num_inputs)

    def _inputs(self) -> Tensor:
        return torch.cat([self.a, self.a.new_ones(*self.a.shape[:2], 1)], 2) if self.bias else self.a

    def input_gram(self, part: slice, t: int, other: Block, end: int, s: int, dtype: torch.dtype) -> Tensor:
        assert isinstance(other, Outer)
        found = self.a[part, t].to(dtype) @ other.a[:end, s].to(dtype).t()
        return found.add_(1) if self.bias else found

    def own_input_gram(self) -> Tensor:
        found = self.a @ self.a.mT
        return found.add_(1) if self.bias else found

    def input_norms(self) -> Tensor:
        return self.a.square().sum(2).add_(self.bias)

    def features(self, kind: Kind, num: int, seed: int) -> Tensor:
        """The two kinds for outer products sketch each use and add up: both are linear in the outer product."""
        make = {"tensorsketch": sketch.tensorsketch, "tensor-srht": sketch.tensor_srht}.get(check_kind(kind))
        if make is None:
            return self.row_features(kind, num, seed)
        n, c, uses, units = self.d.shape
        out = torch.empty(n * c, num, dtype=self.dtype, device=self.device)
        for part in spans(n, c * uses * (num + units + self.num_inputs)):
            some = self.samples(part)
            a = some._inputs()[:, None].expand(-1, c, -1, -1).reshape(-1, self.num_inputs)
            found = make(a, some.d.reshape(-1, units), num, seed)
            out[part.start * c : part.stop * c] = found.view(some.num_rows, uses, num).sum(1)
        return out

    def moments(self) -> Moments:
        a = self._inputs().reshape(-1, self.num_inputs)
        return (a.t() @ a, self._output_moments())

    def matrix(self, w: Tensor) -> Tensor:
        """(D, A), the bias as the last input."""
        units, width = self.num_units, self.a.shape[2]
        weight = w[: units * width].view(units, width)
        return torch.cat([weight, w[units * width :, None]], 1) if self.bias else weight

    def flat(self, matrix: Tensor) -> Tensor:
        return self._joined(matrix[:, : self.a.shape[2]], matrix[:, -1])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.d)

    def from_tensors(self, tensors: Sequence[Tensor]) -> Outer:
        return Outer(tensors[0], tensors[1], self.bias)

    def at(self, index: Tensor) -> Outer:
        sample, row = index // self.num_outputs, index % self.num_outputs
        return Outer(self.a[sample], self.d[sample, row][:, None], self.bias)

    def _with_d(self, d: Tensor) -> Outer:
        return replace(self, d=d)


@dataclass(frozen=True, eq=False)
class Lookup(Factors):
    """An embedding: an `Outer` whose inputs are unit vectors, of which only the place is kept.

    index: (n, T) int64, rows of the table; d: (n, C, T, D), zero where the index is the padding's. Columns in the order
    of the table (num_embeddings, D)."""

    index: Tensor
    d: Tensor
    num_embeddings: int

    @property
    def num_inputs(self) -> int:
        return self.num_embeddings

    @property
    def _input_width(self) -> int:
        return 1  # comparing two places

    def mv(self, w: Tensor) -> Tensor:
        n, c, uses, units = self.d.shape
        taken = functional.embedding(self.index, w.view(-1, units)).view(n, uses * units, 1)
        return (self.d.reshape(n, c, uses * units) @ taken).view(-1)

    def t_mv(self, v: Tensor) -> Tensor:
        table = v.new_zeros(self.num_embeddings, self.num_units)
        return table.index_add_(0, self.index.reshape(-1), self._rows_combined(v).flatten(0, 1)).view(-1)

    def explicit(self) -> Tensor:
        rows = self.unit_rows(0, self.num_units, self.dtype).view(-1, self.num_units, self.num_embeddings)
        return rows.mT.reshape(self.num_rows, self.num_columns)

    def unit_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        n, c, uses, _ = self.d.shape
        num, table = stop - start, self.num_embeddings
        found = torch.zeros(n, c, num, table, dtype=dtype, device=self.device)
        place = self.index[:, None, None].expand(n, c, num, uses)
        return found.scatter_add_(3, place, self.d[..., start:stop].to(dtype).mT).view(n * c, num * table)

    def input_gram(self, part: slice, t: int, other: Block, end: int, s: int, dtype: torch.dtype) -> Tensor:
        assert isinstance(other, Lookup)
        return (self.index[part, t, None] == other.index[:end, s]).to(dtype)

    def own_input_gram(self) -> Tensor:
        return (self.index[:, :, None] == self.index[:, None]).to(self.dtype)

    def input_norms(self) -> Tensor:
        return torch.ones(self.index.shape, dtype=self.dtype, device=self.device)

    def moments(self) -> Moments:
        counts = torch.bincount(self.index.reshape(-1), minlength=self.num_embeddings)
        return (counts.to(self.dtype), self._output_moments())

    def matrix(self, w: Tensor) -> Tensor:
        """(D, A)."""
        return w.view(-1, self.num_units).t()

    def flat(self, matrix: Tensor) -> Tensor:
        return matrix.t().reshape(-1)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.index, self.d)

    def from_tensors(self, tensors: Sequence[Tensor]) -> Lookup:
        return Lookup(tensors[0], tensors[1], self.num_embeddings)

    def at(self, index: Tensor) -> Lookup:
        sample, row = index // self.num_outputs, index % self.num_outputs
        return Lookup(self.index[sample], self.d[sample, row][:, None], self.num_embeddings)

    def _with_d(self, d: Tensor) -> Lookup:
        return replace(self, d=d)
