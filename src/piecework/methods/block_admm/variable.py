"""The variable on the input of a block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Cut:
    """The variable X = f + d on the input of a block, all (n, ...), and its scaled dual u.

    f: what the block below gave; d: how far X is from it, None for 0; u: None for 0. X itself is not kept: at a large
    penalty the displacement would drown in its rounding."""

    f: Tensor
    d: Tensor | None = None
    u: Tensor | None = None
    moved: Tensor | None = None
    """How far X went in the last move, where `watched`."""
    watched: bool = False

    @property
    def x(self) -> Tensor:
        return self.f if self.d is None else self.f + self.d

    @property
    def reach(self) -> Tensor | None:
        """d - u: where the block below is to move its output, from what it gave; None for nowhere."""
        if self.u is None:
            return self.d
        return -self.u if self.d is None else self.d - self.u

    def gradient_step(self, gradient: Tensor, alpha: float | Tensor, beta: float | Tensor) -> None:
        """X <- X - alpha [gradient + beta (X - f - u)], the gradient being that of what lies above, a sample."""
        move = gradient * -alpha
        kept = 1 - alpha * beta
        if self.u is not None:
            move = move + alpha * beta * self.u
        if self.d is not None and not (isinstance(kept, float) and kept == 0):
            move = move + kept * self.d
        self.put(move)

    def put(self, d: Tensor) -> None:
        """Move X to f + d."""
        if self.watched:
            self.moved = d if self.d is None else d - self.d
        self.d = d

    def refresh(self, f: Tensor, dual_step: float) -> Tensor:
        """The block below gives f now: X stays, the dual moves by dual_step times the residual c = f - X, returned."""
        c = (f - self.f) if self.d is None else (f - self.f) - self.d
        self.f, self.d = f, -c
        if dual_step:
            self.u = dual_step * c if self.u is None else self.u + dual_step * c
        return c
