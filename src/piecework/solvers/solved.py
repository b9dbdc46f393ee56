"""What every solver returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Solved:
    """A solution and how far it can be trusted.

    x: the solution; reason: empty where all is well, else a full sentence with advice; iterations: how many were
    needed (1 for a direct solver that needed no repair); residual: relative, |Ax - b| / |b|, of the system asked
    for, not of a repaired one; inf where there is no solution."""

    x: Tensor
    reason: str
    iterations: int
    residual: float

    @property
    def ok(self) -> bool:
        return not self.reason
