"""What is kept of the variables and multipliers between mini-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ...training import BadInput, Batch
from .variable import Cut


class Memory(Protocol):
    """Where the variables of a batch start, and what is kept of them when it is done. Penalties may have changed in
    between: what is kept is the multiplier beta u, in loss units."""

    def begin(self, number: int, f: Tensor, batch: Batch, beta: float | Tensor) -> Cut: ...

    def end(self, number: int, cut: Cut, batch: Batch, beta: float | Tensor) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """Nothing is kept: X = f and u = 0 at the start of each batch."""

    def begin(self, number: int, f: Tensor, batch: Batch, beta: float | Tensor) -> Cut:
        return Cut(f)

    def end(self, number: int, cut: Cut, batch: Batch, beta: float | Tensor) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


class OfClasses:
    """A multiplier for each class: a running mean over the rows of that class, the start of their duals."""

    def __init__(self, decay: float, dual_step: float) -> None:
        self._decay, self._dual_step = decay, dual_step
        self._means: dict[int, Tensor] = {}

    def begin(self, number: int, f: Tensor, batch: Batch, beta: float | Tensor) -> Cut:
        if batch.y.is_floating_point():
            raise BadInput("dual_memory='class' keeps a multiplier for each class, and these targets are real numbers")
        known = self._means.get(number)
        if known is None:
            return Cut(f)
        return Cut(f, u=_grown(known, int(batch.y.max()) + 1)[batch.y] / beta)

    def end(self, number: int, cut: Cut, batch: Batch, beta: float | Tensor) -> None:
        dual = beta * _moved_on(cut, self._dual_step)
        flat, size = dual.reshape(len(batch), -1), int(batch.y.max()) + 1
        before = self._means.get(number)
        means = dual.new_zeros(size, *dual.shape[1:]) if before is None else _grown(before, size)
        sums = flat.new_zeros(len(means), flat.shape[1]).index_add_(0, batch.y, flat)
        rows = torch.bincount(batch.y, minlength=len(means)).to(flat.dtype)[:, None]
        fresh = (sums / rows.clamp_min(1)).view(means.shape)
        seen = (rows > 0).view(-1, *[1] * (means.dim() - 1))
        self._means[number] = torch.where(seen, self._decay * means + (1 - self._decay) * fresh, means)

    def state_dict(self) -> dict[str, Any]:
        return {"means": {str(number): means.clone() for number, means in self._means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._means = {int(number): means.clone() for number, means in state["means"].items()}


class OfSamples:
    """A multiplier for each row of the data, found again by `Batch.index`; with `variables` also X itself.

    It fades by `decay` at each visit. A row that comes for the first time starts from a forward pass. Where X is kept
    the residual is known, and the dual moves, at the next visit, else when the batch is done."""

    def __init__(self, decay: float, dual_step: float, *, variables: bool) -> None:
        self._decay, self._dual_step, self._variables = decay, dual_step, variables
        self._kept: dict[str, Tensor] = {}

    def begin(self, number: int, f: Tensor, batch: Batch, beta: float | Tensor) -> Cut:
        index = _index(batch)
        known = self._kept.get(f"seen {number}")
        if known is None:
            return Cut(f)
        rows = int(index.max()) + 1
        seen = _grown(known, rows)[index].view(-1, *[1] * (f.dim() - 1))
        u = _grown(self._kept[f"dual {number}"], rows)[index] * (self._decay / beta)
        if not self._variables:
            return Cut(f, u=u)
        x = torch.where(seen, _grown(self._kept[f"x {number}"], rows)[index], f)
        return Cut(f, d=x - f, u=u + self._dual_step * (f - x))

    def end(self, number: int, cut: Cut, batch: Batch, beta: float | Tensor) -> None:
        index = _index(batch)
        values = {
            "dual": beta * _moved_on(cut, 0.0 if self._variables else self._dual_step),
            "seen": torch.ones_like(index, dtype=torch.bool),
        }
        if self._variables:
            values["x"] = cut.x
        for name, value in values.items():
            key = f"{name} {number}"
            before = self._kept.get(key, value.new_zeros(0, *value.shape[1:]))
            self._kept[key] = kept = _grown(before, int(index.max()) + 1)
            kept[index] = value

    def state_dict(self) -> dict[str, Any]:
        return {"kept": {name: value.clone() for name, value in self._kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = {name: value.clone() for name, value in state["kept"].items()}


def _moved_on(cut: Cut, dual_step: float) -> Tensor:
    """The dual after one more step along the residual as last known, -d."""
    u = torch.zeros_like(cut.f) if cut.u is None else cut.u
    return u if cut.d is None else u - dual_step * cut.d


def _index(batch: Batch) -> Tensor:
    if batch.index is None:
        raise BadInput(
            "block-admm keeps something for each row here (mode='batch' or dual_memory='sample'), and this Batch has "
            "no index; give Batch(x, y, index) the numbers of the rows in the data set, or take mode='online'"
        )
    return batch.index


def _grown(table: Tensor, rows: int) -> Tensor:
    """The table with at least so many rows, new ones 0; it grows by half, so that this is rare."""
    if len(table) >= rows:
        return table
    more = max(rows, len(table) * 3 // 2) - len(table)
    return torch.cat([table, table.new_zeros(more, *table.shape[1:])])
