"""The Jacobian of a whole model: the blocks of its parameters side by side, and flat vectors in their order.

K = J J^T is the sum of the blocks' gram matrices. Rows are numbered i * C + c (sample i, column c of the curvature
root); columns run through `trainable(model, ...)`, each parameter flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....group import Group
from ....training import BadInput, stream
from . import blocks as block_rows
from .blocks import TILE, Block, Kind, check_kind, mirror_
from .factors import Factors


@dataclass(frozen=True, eq=False)
class Jacobian:
    """J (N, P), in factors where its layers have them.

    blocks: one or more parameters each. places: for each block, where its columns lie in a flat vector of all
    parameters, in the order of its own columns. num_columns: P."""

    blocks: tuple[Block, ...]
    places: tuple[tuple[slice, ...], ...]
    num_columns: int

    def __post_init__(self) -> None:
        if not self.blocks or len({(block.num_samples, block.num_outputs) for block in self.blocks}) > 1:
            shapes = [(block.num_samples, block.num_outputs) for block in self.blocks]
            raise BadInput(f"a Jacobian is at least one block, all of the same samples and rows a sample; got {shapes}")

    @property
    def num_samples(self) -> int:
        """n."""
        return self.blocks[0].num_samples

    @property
    def num_outputs(self) -> int:
        """C, the rows of a sample."""
        return self.blocks[0].num_outputs

    @property
    def num_rows(self) -> int:
        """N = n C."""
        return self.blocks[0].num_rows

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device

    @property
    def bytes(self) -> int:
        """What the blocks keep in memory."""
        return sum(block.bytes for block in self.blocks)

    @property
    def width(self) -> int:
        """Sigma: a structured gram matrix costs N^2 Sigma operations (its symmetric half), for one use a sample and
        C = 1."""
        return sum(
            b.num_units + b.num_inputs if isinstance(b, Factors) and b.num_uses == 1 else b.num_columns
            for b in self.blocks
        )

    # -- products ------------------------------------------------------------------------------------------------------

    def mv(self, w: Tensor) -> Tensor:
        """J w: (P,) -> (N,), or (P, k) -> (N, k); 2 N P operations a column."""
        self._check(w, self.num_columns)
        if w.dim() == 2:
            return torch.stack([self.mv(column) for column in w.t()], 1)
        out = torch.zeros(self.num_rows, dtype=self.dtype, device=self.device)
        for block, places in zip(self.blocks, self.places, strict=True):
            out += block.mv(_taken(w, places).to(self.dtype))
        return out.to(w.dtype)

    def t_mv(self, v: Tensor) -> Tensor:
        """J^T v: (N,) -> (P,), or (N, k) -> (P, k); 2 N P operations a column."""
        self._check(v, self.num_rows)
        if v.dim() == 2:
            return torch.stack([self.t_mv(column) for column in v.t()], 1)
        out = torch.empty(self.num_columns, dtype=v.dtype, device=self.device)
        for block, places in zip(self.blocks, self.places, strict=True):
            _put(out, places, block.t_mv(v.to(self.dtype)))
        return out

    def by_blocks(self, w: Tensor, function: Callable[[int, Block, Tensor], Tensor]) -> Tensor:
        """The flat vector (P,) of what the function makes of each block's columns of w: (number of the block, block,
        (P_l,)) -> (P_l,)."""
        self._check(w, self.num_columns)
        out = torch.empty_like(w)
        for position, (block, places) in enumerate(zip(self.blocks, self.places, strict=True)):
            _put(out, places, function(position, block, _taken(w, places)))
        return out

    def t_mv_in(self, dtype: torch.dtype, v: Tensor) -> Tensor:
        """J^T v in that dtype, some samples at a time, so that their copies stay small; v: (N,) of that dtype."""
        if dtype == self.dtype:
            return self.t_mv(v)
        out = torch.zeros(self.num_columns, dtype=dtype, device=self.device)
        for rows, some in self._tiles_in(dtype):
            out += some.t_mv(v[rows])
        return out

    def mv_in(self, dtype: torch.dtype, w: Tensor) -> Tensor:
        """J w in that dtype, as `t_mv_in`; w: (P,) of that dtype."""
        if dtype == self.dtype:
            return self.mv(w)
        out = torch.empty(self.num_rows, dtype=dtype, device=self.device)
        for rows, some in self._tiles_in(dtype):
            out[rows] = some.mv(w)
        return out

    def _tiles_in(self, dtype: torch.dtype) -> Iterator[tuple[slice, Jacobian]]:
        """Some samples at a time in that dtype, and which rows they are."""
        size, c = max(1, TILE // max(1, self.num_outputs * self.width)), self.num_outputs
        for start in range(0, self.num_samples, size):
            stop = min(start + size, self.num_samples)
            yield slice(start * c, stop * c), self.samples(slice(start, stop))._in(dtype)

    def product(self, v: Tensor) -> Tensor:
        """K v: (N,) or (N, k); 4 N P operations a column, and no forward pass. With C > 1 linear layers take 4 n P."""
        self._check(v, self.num_rows)
        if v.dim() == 2:
            return torch.stack([self.product(column) for column in v.t()], 1)
        cast = v.to(self.dtype)
        out = torch.zeros_like(cast)
        for block in self.blocks:  # a block at a time: no flat vector of all parameters
            out += block.mv(block.t_mv(cast))
        return out.to(v.dtype)

    def _check(self, vector: Tensor, length: int) -> None:
        if vector.dim() not in (1, 2) or len(vector) != length:
            raise BadInput(f"needs a vector ({length},) or columns ({length}, k); got {tuple(vector.shape)}")

    # -- the matrix K and parts of it ----------------------------------------------------------------------------------

    def gram(self, dtype: torch.dtype | None = None, rows: slice | None = None) -> Tensor:
        """K (N, N) in that dtype (the model's own without), exactly symmetric; or its rows `rows`, for ranks that
        build a part each."""
        dtype = dtype or self.dtype
        if rows is None:
            out = torch.zeros(self.num_rows, self.num_rows, dtype=dtype, device=self.device)
            for block in self.blocks:
                block.add_gram_(out, block, lower=True)
            mirror_(out)
            return out
        start, stop, step = rows.indices(self.num_rows)
        index = torch.arange(start, stop, step, device=self.device)
        out = torch.zeros(len(index), self.num_rows, dtype=dtype, device=self.device)
        for block in self.blocks:
            block.at(index).add_gram_(out, block, lower=False)
        return out

    def columns(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """K[:, index], (N, M)."""
        index = index.to(self.device)
        out = torch.zeros(self.num_rows, len(index), dtype=dtype or self.dtype, device=self.device)
        for block in self.blocks:
            block.add_gram_(out, block.at(index), lower=False)
        return out

    def diagonal(self) -> Tensor:
        """The diagonal of K, (N,): the squared norms of the rows of J."""
        out = torch.zeros(self.num_rows, dtype=self.dtype, device=self.device)
        for block in self.blocks:
            out += block.diagonal()
        return out

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of J as a matrix, (stop - start, P)."""
        out = torch.empty(stop - start, self.num_columns, dtype=self.dtype, device=self.device)
        for block, places in zip(self.blocks, self.places, strict=True):
            parts = torch.split(block.rows(start, stop), [place.stop - place.start for place in places], 1)
            for place, part in zip(places, parts, strict=True):
                out[:, place] = part
        return out

    def tiles(self, elements: int = TILE) -> Iterator[tuple[int, Tensor]]:
        """All rows of J, a tile of about that many elements at a time: (number of the first row, (b, P))."""
        size = max(1, elements // max(1, self.num_columns))
        size = max(self.num_outputs, size // self.num_outputs * self.num_outputs)  # whole samples need no copy
        for start in range(0, self.num_rows, size):
            yield start, self.rows(start, min(start + size, self.num_rows))

    # -- randomised approximations -------------------------------------------------------------------------------------

    def features(self, kind: Kind, num: int, seed: int) -> Tensor:
        """A sketch Y (N, num) of the rows with E[Y Y^T] = K: a sum over the blocks, each with its own randomness.

        kind: "tensorsketch" and "tensor-srht" work on factors, without rows; blocks that have none (norms, explicit
        rows, embeddings) then take a sparse-sign sketch. "count", "sparse-sign" and "srht" go through tiles of rows.
        The same seed gives rows the same sketch on every rank."""
        check_kind(kind)
        out = torch.zeros(self.num_rows, num, dtype=self.dtype, device=self.device)
        for position, block in enumerate(self.blocks):
            out += block.features(kind, num, _own_seed(seed, position))
        return out

    def units(self, num: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """An estimate of K (N, N), right on average, from `num` output units of each layer; blocks without units and
        layers with no more than `num` enter exactly."""
        out = torch.zeros(self.num_rows, self.num_rows, dtype=dtype or self.dtype, device=self.device)
        for position, block in enumerate(self.blocks):
            some = block.sampled_units(num, _own_seed(seed, position))
            some.add_gram_(out, some, lower=True)
        mirror_(out)
        return out

    # -- samples -------------------------------------------------------------------------------------------------------

    def samples(self, part: slice) -> Jacobian:
        """The Jacobian of some samples; nothing is copied."""
        return self._with(block.samples(part) for block in self.blocks)

    def at(self, index: Tensor) -> Jacobian:
        """Some rows, each as a sample of its own with C = 1."""
        return self._with(block.at(index.to(self.device)) for block in self.blocks)

    def gathered(self, group: Group) -> Jacobian:
        """The Jacobian of all ranks' samples in rank order, on every rank. Collective: one gather a tensor.

        Ranks may have different numbers of samples; a weight must be used equally often in each."""
        if group.size == 1:
            return self
        found = []
        for block in self.blocks:
            found.append(block.from_tensors([torch.cat(group.gather(t.contiguous())) for t in block.tensors()]))
        return self._with(found)

    def _in(self, dtype: torch.dtype) -> Jacobian:
        parts = ([t.to(dtype) if t.is_floating_point() else t for t in block.tensors()] for block in self.blocks)
        return self._with(block.from_tensors(own) for block, own in zip(self.blocks, parts, strict=True))

    def _with(self, blocks: Iterable[Block]) -> Jacobian:
        return Jacobian(tuple(blocks), self.places, self.num_columns)


def _taken(w: Tensor, places: Sequence[slice]) -> Tensor:
    """Those pieces of a flat vector, as one."""
    return w[places[0]] if len(places) == 1 else torch.cat([w[place] for place in places])


def _put(out: Tensor, places: Sequence[slice], pieces: Tensor) -> None:
    """The counterpart of `_taken`, in place."""
    start = 0
    for place in places:
        stop = start + place.stop - place.start
        out[place] = pieces[start:stop]
        start = stop


def concatenate(parts: Sequence[Jacobian]) -> Jacobian:
    """The samples of several Jacobians of one model, one after the other."""
    joined = [block_rows.concatenate(same) for same in zip(*(part.blocks for part in parts), strict=True)]
    return Jacobian(tuple(joined), parts[0].places, parts[0].num_columns)


def _own_seed(seed: int, position: int) -> int:
    return stream(seed, position).initial_seed()
