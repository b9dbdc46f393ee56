"""A block at work with its head: the mini-batches under way in it, and its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...training import CannotTrain
from ..blocks import Block
from .head import Head


@dataclass
class Flight:
    """A mini-batch in a block, from its forward pass until nothing more is to be derived.

    x: input, a leaf; out: output, with its graph; leaves: what stands for the block's parameters in that graph;
    row, down: those of the stage in the step of the mini-batch; waiting: the losses whose derivative at the output has
    not come; total: their weighted sum so far; true: the gradient of the deployed network's loss, where it is to be
    compared; late: whether the leaves are copies; stepped: whether the block has stepped."""

    x: Tensor
    out: Tensor
    leaves: list[Tensor]
    row: dict[int, float]
    down: tuple[int, ...]
    waiting: set[int]
    total: Tensor | None = None
    gradients: list[Tensor] | None = None
    true: list[Tensor] | None = None
    late: bool = False
    stepped: bool = False


@dataclass
class Stage:
    """block, head: at work; the last block has no head, its output is judged as it is.

    row: losses that it learns from, with weights; down: losses whose derivative goes to the block below."""

    block: Block
    head: Head | None = None
    row: dict[int, float] = field(default_factory=dict)
    down: tuple[int, ...] = ()
    late: bool = False
    """Whether derivatives come after further forward passes: each mini-batch then keeps a copy of the weights."""
    flights: dict[int, Flight] = field(default_factory=dict)
    cosine: Tensor | None = None

    @property
    def number(self) -> int:
        return self.block.number

    def forward(self, step: int, x: Tensor) -> Tensor:
        """The block's output for the mini-batch of this step, without its graph, contiguous."""
        self.block.begin(step)
        if not self.row and not self.down:
            with torch.no_grad():
                return self.block(x.detach()).contiguous()
        self.flights[step] = flight = self._depart(x, None)
        return flight.out.detach().contiguous()

    def _depart(self, x: Tensor, copies: list[Tensor] | None) -> Flight:
        x = x.detach()
        if self.down:
            x.requires_grad_()
        weights: dict[str, Tensor] | None = None
        leaves: list[Tensor] = list(self.block.parameters)
        if self.late or copies is not None:
            leaves = [one.detach().clone() for one in leaves] if copies is None else [one.detach() for one in copies]
            leaves = [one.requires_grad_() for one in leaves]
            weights = dict(zip(self._names(), leaves, strict=True))
        with torch.enable_grad():
            out = self.block(x, weights)
        waiting = set(self.row) | set(self.down)
        return Flight(x, out, leaves, self.row, self.down, waiting, late=weights is not None)

    def _names(self) -> list[str]:
        return [name for name, one in self.block.module.named_parameters() if one.requires_grad]

    def hand_down(self, step: int, loss: int, cotangent: Tensor) -> Tensor | None:
        """The derivative of a loss at the block's input, from that at its output; None where nobody below wants it.

        Where the block learns from this loss alone, one pass gives its gradient too, which waits for `learn`."""
        flight = self.flights[step]
        flight.waiting.discard(loss)
        if loss not in flight.down:
            return None
        if flight.row == {loss: 1.0}:
            found = self._derive(flight, [*flight.leaves, flight.x], cotangent, keep=bool(flight.waiting))
            flight.gradients = found[:-1]
        else:
            more = bool(flight.waiting) or bool(flight.row and flight.gradients is None)
            found = self._derive(flight, [flight.x], cotangent, keep=more)
        return found[-1].contiguous()

    def learn(self, step: int, loss: int, cotangent: Tensor) -> None:
        """Step, if this was the last loss of the block's row; let the graph go when nothing more comes."""
        flight = self.flights[step]
        if loss in flight.row:
            weight = flight.row[loss]
            term = cotangent if weight == 1.0 else weight * cotangent
            flight.total = term if flight.total is None else flight.total + term
            if not flight.waiting & flight.row.keys() and flight.gradients is None:
                flight.gradients = self._derive(flight, flight.leaves, flight.total, keep=bool(flight.waiting))
        # What is still to be derived needs the weights of the forward pass, unless there are copies of them.
        if flight.gradients is not None and not flight.stepped and (flight.late or not flight.waiting):
            self._step(flight, flight.gradients)
        if not flight.waiting:
            del self.flights[step]

    def _step(self, flight: Flight, gradients: list[Tensor]) -> None:
        if flight.true is not None:
            self.cosine = cosine(gradients, flight.true)
        self.block.step(gradients)
        flight.stepped = True

    def _derive(self, flight: Flight, wanted: list[Tensor], cotangent: Tensor, *, keep: bool) -> list[Tensor]:
        found: Any = (None,)
        if flight.out.requires_grad:
            found = torch.autograd.grad(flight.out, wanted, cotangent, retain_graph=keep, allow_unused=True)
        if any(one is None for one in found):
            names = [*self._names(), "its input"][-len(wanted) :] if wanted[-1] is flight.x else self._names()
            missing = next(name for name, one in zip(names, found, strict=False) if one is None)
            raise CannotTrain(
                f"no derivative of the losses reaches {missing} of block {self.number}; freeze what lies before the "
                "layer without a derivative with requires_grad_(False), or train with block-admm"
            )
        return list(found)

    def state_dict(self) -> dict[str, Any]:
        """The mini-batches under way; their graphs are made again from what is kept here."""
        return {
            str(step): {
                "x": flight.x.detach().clone(),
                "leaves": [one.detach().clone() for one in flight.leaves],
                "row": [[loss, weight] for loss, weight in flight.row.items()],
                "down": list(flight.down),
                "late": flight.late,
                "waiting": sorted(flight.waiting),
                "stepped": flight.stepped,
                "total": None if flight.total is None else flight.total.clone(),
                "true": None if flight.true is None else [one.clone() for one in flight.true],
            }
            for step, flight in self.flights.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self.flights = {}
        now = self.row, self.down
        for number, kept in state.items():
            self.block.begin(int(number), again=True)
            self.row = {int(loss): float(weight) for loss, weight in kept["row"]}
            self.down = tuple(kept["down"])
            flight = self._depart(kept["x"].clone(), list(kept["leaves"]))
            flight.waiting, flight.total, flight.true = set(kept["waiting"]), kept["total"], kept["true"]
            flight.stepped, flight.late = kept["stepped"], kept["late"]
            self.flights[int(number)] = flight
        self.row, self.down = now


def cosine(given: list[Tensor], true: list[Tensor]) -> Tensor:
    """The cosine, 0-d, between two gradients of the same parameters; not a number where one is 0."""
    product = sum_(a.double().mul(b).sum() for a, b in zip(given, true, strict=True))
    squares = [sum_(a.double().square().sum() for a in one) for one in (given, true)]
    return product / (squares[0] * squares[1]).sqrt()


def sum_(terms: Any) -> Tensor:
    """The sum of 0-d tensors."""
    return torch.stack(list(terms)).sum()
