"""Solver kfac: conjugate gradients on J^T J + damping I, preconditioned by Kronecker factors of the layers.

On samples of the rows the factors are means over the samples so far, and one iteration is taken: K-FAC with the length
of a step by the sample's own J (Martens and Grosse, arXiv 1503.05671, section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...group import Group
from ...solvers import Solved
from ...solvers.damped import pcg
from ...solvers.kronecker import KroneckerFactor, Moments
from ...solvers.precondition import Apply
from .jacobian import Block, Jacobian
from .systems import Direction, Pull, Sharded, System

KEEP = 0.9
"""What the moments so far count beside those of one more sample, once there are many."""
EVERY, FIRST = 10, 5
"""One sample in EVERY counts, and all of the first, where the moments change most."""


class LayerFactors:
    """The moments of the layers, a mean over samples, and their factors; equal on all ranks."""

    def __init__(self) -> None:
        self._seen = 0
        self._means: list[Moments] = []
        self._factors: list[KroneckerFactor] = []

    def look(self, jacobian: Jacobian, group: Group) -> None:
        """At one more sample, all ranks' rows of it. Collective."""
        if self._seen < FIRST or self._seen % EVERY == 0:
            self._add(jacobian, group)
        self._seen += 1

    def _add(self, jacobian: Jacobian, group: Group) -> None:
        found = [block.moments() for block in jacobian.blocks]
        samples = torch.tensor([jacobian.num_samples], dtype=jacobian.dtype, device=jacobian.device)
        group.sum_(samples, *(moment for moments in found for moment in moments))
        counted = min(self._seen, FIRST) + max(0, self._seen - 1) // EVERY
        keep = min(counted / (counted + 1), KEEP)
        share = (1 - keep) / float(samples)
        if not self._means:
            self._means = [tuple(torch.zeros_like(moment) for moment in moments) for moments in found]
        for means, moments in zip(self._means, found, strict=True):
            for mean, moment in zip(means, moments, strict=True):
                mean.mul_(keep).add_(moment, alpha=share)
        self._factors = [KroneckerFactor.of(mean) for mean in self._means]

    def of(self, jacobian: Jacobian, samples: int) -> KroneckerBlocks:
        """A preconditioner for so many samples of all ranks."""
        return KroneckerBlocks(jacobian, self._factors, samples)

    def state(self) -> dict[str, Any]:
        """Copies; of the factors too, since another process may round them otherwise."""
        return {
            "seen": self._seen,
            "means": [_copied(means) for means in self._means],
            "factors": [_copied((one.values, one.outputs, one.inputs)) for one in self._factors],
        }

    def go_on(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._seen = int(state["seen"])
        self._means = [tuple(_copied(means, device)) for means in state["means"]]
        self._factors = [KroneckerFactor(*_copied(parts, device)) for parts in state["factors"]]


def _copied(parts: Sequence[Tensor | None], device: torch.device | None = None) -> list[Any]:
    return [None if part is None else part.to(device, copy=True) for part in parts]


class KroneckerBlocks:
    """A preconditioner of J^T J + damping I, (P, P): a block for each of the Jacobian's."""

    def __init__(self, jacobian: Jacobian, factors: Sequence[KroneckerFactor], samples: int) -> None:
        self._jacobian, self._factors, self._samples = jacobian, factors, samples
        self.rank = jacobian.num_columns

    def at(self, damping: float) -> Apply:
        """The inverse for this damping, of vectors (P,)."""

        def one(position: int, block: Block, w: Tensor) -> Tensor:
            return block.flat(self._factors[position].solve(block.matrix(w), self._samples, damping))

        return lambda v: self._jacobian.by_blocks(v, one)

    def effective_dimension(self, damping: float) -> float:
        """An estimate of tr K (K + damping I)^-1."""
        return sum(factor.dimension(self._samples, damping) for factor in self._factors)


class KroneckerSystem(System):
    """J^T J + damping I by conjugate gradients in the space of the parameters: a product is one sum of P numbers."""

    def __init__(
        self,
        jacobian: Jacobian,
        group: Group,
        preconditioner: KroneckerBlocks,
        *,
        tolerance: float | None,
        max_iterations: int,
    ) -> None:
        """tolerance: relative residual; None for a single iteration, whose residual is not looked at."""
        super().__init__(Sharded(jacobian, group))
        self._preconditioner, self._tolerance, self._max_iterations = preconditioner, tolerance, max_iterations

    def solve(self, v: Tensor, damping: float, pulls: Sequence[Pull] = ()) -> Direction:
        right, total = self._rows.t_mv(v), damping
        for pull in pulls:
            right, total = right + pull.weight * pull.place, total + pull.weight
        if self._tolerance is None:
            return self._first(right, total)
        operator = self._rows.operator
        solved = pcg(
            lambda w: self._rows.t_mv(operator.mv(w)),
            right,
            total,
            self._preconditioner,
            tolerance=self._tolerance,
            max_iterations=self._max_iterations,
        )
        return Direction(solved.x, operator.mv(solved.x), solved)

    def _first(self, right: Tensor, damping: float) -> Direction:
        """The first iterate: what the preconditioner gives, as long as the quadratic model is lowest."""
        found = self._preconditioner.at(damping)(right)
        moved = self._rows.operator.mv(found)
        bend = moved.double().square().sum().reshape(1)
        self._rows.group.sum_(bend)
        curvature = float(bend) + damping * float(found.double().square().sum())
        length = float(right.double() @ found.double()) / curvature if curvature > 0 else math.nan
        fine = math.isfinite(length)
        reason = "" if fine else "the preconditioned gradient or its product with J is not finite; raise the damping"
        step = length * found if fine else torch.zeros_like(found)
        return Direction(step, length * moved, Solved(step, reason, 1, math.nan))

    def effective_dimension(self, damping: float) -> float | None:
        return self._preconditioner.effective_dimension(damping)
