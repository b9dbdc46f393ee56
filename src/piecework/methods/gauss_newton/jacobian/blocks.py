"""The Jacobian of some parameters as a block that is used, and need not be stored, as a matrix.

Rows are residuals: row i * C + c is sample i and column c of the curvature root B, so N = n C rows. Legend:
n samples, C rows a sample, T uses of a weight within a sample, P_l the block's columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ....solvers import sketch
from ....solvers.kronecker import Moments
from ....training import BadInput

Kind = Literal["count", "sparse-sign", "srht", "tensorsketch", "tensor-srht"]
"""Which sketch; the last two are for outer products, and mean `sparse-sign` in a block that has none."""
KINDS: tuple[Kind, ...] = ("count", "sparse-sign", "srht", "tensorsketch", "tensor-srht")

TILE = 2**22
"""Elements of a temporary at most, but for a single row: what a block makes beside what it holds."""

B = TypeVar("B", bound="Block")


class Block(ABC):
    """The rows of J that belong to a few parameters: (N, P_l), N = n C, columns in the order of the parameters.

    A block holds `tensors()`, each with the samples along its first dimension, and nothing else of size."""

    @property
    @abstractmethod
    def num_samples(self) -> int: ...

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """C, the rows of a sample."""

    @property
    @abstractmethod
    def num_columns(self) -> int: ...

    @abstractmethod
    def mv(self, w: Tensor) -> Tensor:
        """J w: (P_l,) -> (N,)."""

    @abstractmethod
    def t_mv(self, v: Tensor) -> Tensor:
        """J^T v: (N,) -> (P_l,)."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The squared norms of the rows, (N,)."""

    @abstractmethod
    def explicit(self) -> Tensor:
        """The rows themselves, (N, P_l): for blocks that were cut to a tile before."""

    @abstractmethod
    def add_gram_(self, out: Tensor, other: Block, *, lower: bool) -> None:
        """out += J_l J_other^T in tiles of rows, in the dtype of out, (N, N_other).

        lower: only what lies on and below the diagonal is asked for; the rest of `out` is then undefined."""

    @abstractmethod
    def moments(self) -> Moments:
        """Sums over the samples from which `solvers.kronecker` makes the block of J^T J."""

    @abstractmethod
    def matrix(self, w: Tensor) -> Tensor:
        """Weights (P_l,) in the form that the moments are of."""

    @abstractmethod
    def flat(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`, (P_l,)."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What the block holds, samples first, so that it can be cut, joined and sent."""

    @abstractmethod
    def from_tensors(self: B, tensors: Sequence[Tensor]) -> B:
        """The same kind of block of other samples; the counterpart of `tensors`."""

    @abstractmethod
    def at(self: B, index: Tensor) -> B:
        """The rows `index` (M,) int64 as a block of M samples with one row each."""

    def sampled_units(self, num: int, seed: int) -> Block:
        """A block whose gram matrix is that of this one on average, with `num` of its hidden units; self where the
        block has no units, or not more of them."""
        return self

    @property
    def num_rows(self) -> int:
        return self.num_samples * self.num_outputs

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors()[-1].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors()[-1].device

    @property
    def bytes(self) -> int:
        """What the block keeps in memory; a tensor that it shares with others (the input) counts as well."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def samples(self: B, part: slice) -> B:
        """Some samples, as views."""
        return self.from_tensors([tensor[part] for tensor in self.tensors()])

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows from `start` up to `stop` as a matrix, (stop - start, P_l)."""
        whole = self.num_outputs
        if start % whole == 0 and stop % whole == 0:
            return self.samples(slice(start // whole, stop // whole)).explicit()
        return self.at(torch.arange(start, stop, device=self.device)).explicit()

    def gram(self, other: Block, dtype: torch.dtype | None = None) -> Tensor:
        """J_l J_other^T, (N, N_other), in that dtype (the block's own without); the symmetric half only where `other`
        is this block."""
        out = torch.zeros(self.num_rows, other.num_rows, dtype=dtype or self.dtype, device=self.device)
        self.add_gram_(out, other, lower=other is self)
        if other is self:
            mirror_(out)
        return out

    def features(self, kind: Kind, num: int, seed: int) -> Tensor:
        """A sketch of the rows, (N, num): Y with E[Y Y^T] = J J^T."""
        return self.row_features(kind, num, seed)

    def row_features(self, kind: Kind, num: int, seed: int) -> Tensor:
        """`features` from explicit rows, a tile at a time."""
        make = {"count": sketch.count, "srht": sketch.srht}.get(check_kind(kind), sketch.sparse_sign)
        out = torch.empty(self.num_rows, num, dtype=self.dtype, device=self.device)
        for part in spans(self.num_rows, self.num_columns):
            out[part] = make(self.rows(part.start, part.stop), num, seed)
        return out

    def units(self, num: int, seed: int) -> Tensor:
        """An unbiased estimate of the gram matrix, (N, N), from `num` hidden units."""
        some = self.sampled_units(num, seed)
        return some.gram(some)


def concatenate(blocks: Sequence[B]) -> B:
    """The samples of several blocks of one kind, one after the other."""
    parts = zip(*(block.tensors() for block in blocks), strict=True)
    return blocks[0].from_tensors([torch.cat(same) for same in map(_equally_long, parts)])


def _equally_long(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pad with zeros where samples use a weight more or less often: what is not there has no derivative."""
    most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    if all(list(tensor.shape[1:]) == most for tensor in tensors):
        return list(tensors)
    found = []
    for tensor in tensors:
        whole = tensor.new_zeros(len(tensor), *most)
        whole[(slice(None), *map(slice, tensor.shape[1:]))] = tensor
        found.append(whole)
    return found


@dataclass(frozen=True, eq=False)
class Rows(Block):
    """Explicit rows, j: (n, C, P_l): affine normalisation, and parameters whose gradient has no structure."""

    j: Tensor

    def __post_init__(self) -> None:
        if self.j.dim() != 3:
            raise BadInput(f"explicit rows are (samples, rows a sample, parameters); got {tuple(self.j.shape)}")

    @property
    def num_samples(self) -> int:
        return self.j.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.j.shape[1]

    @property
    def num_columns(self) -> int:
        return self.j.shape[2]

    def mv(self, w: Tensor) -> Tensor:
        return self.explicit() @ w

    def t_mv(self, v: Tensor) -> Tensor:
        return self.explicit().t() @ v

    def diagonal(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.explicit(), dim=1)
        return norms.square()

    def explicit(self) -> Tensor:
        return self.j.reshape(self.num_rows, self.num_columns)

    def add_gram_(self, out: Tensor, other: Block, *, lower: bool) -> None:
        assert isinstance(other, Rows)
        left, right = self.explicit().to(out.dtype), other.explicit().to(out.dtype)
        for part in spans(self.num_rows, other.num_rows, shares=8):
            end = part.stop if lower else other.num_rows
            out[part, :end].addmm_(left[part], right[:end].t())

    def moments(self) -> Moments:
        """The diagonal."""
        return (self.explicit().square().sum(0),)

    def matrix(self, w: Tensor) -> Tensor:
        return w

    def flat(self, matrix: Tensor) -> Tensor:
        return matrix

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.j,)

    def from_tensors(self, tensors: Sequence[Tensor]) -> Rows:
        return Rows(tensors[0])

    def at(self, index: Tensor) -> Rows:
        return Rows(self.explicit()[index][:, None])


def check_kind(kind: str) -> str:
    if kind not in KINDS:
        raise BadInput(f"a sketch is one of {', '.join(KINDS)}; got {kind!r}")
    return kind


def spans(num: int, width: int, *, shares: int = 1, least: int = 128) -> Iterator[slice]:
    """Cut `num` rows so that a tile of `width` elements a row stays within TILE.

    shares: also into about that many tiles, which a triangle needs to cost half a square; but not into tiles below
    `least` rows, where a product of matrices loses its speed."""
    size = max(1, min(TILE // max(1, width), max(least, math.ceil(num / shares))))
    for start in range(0, num, size):
        yield slice(start, min(start + size, num))


def mirror_(matrix: Tensor) -> None:
    """Overwrite what is above the diagonal by what is below, in place and in tiles."""
    for part in spans(len(matrix), len(matrix), shares=8):
        corner = matrix[part, part]
        corner.copy_(corner.tril() + corner.tril(-1).t())
        matrix[: part.start, part] = matrix[part, : part.start].t()
