"""The loss as the sweep uses it at the network's outputs, with the optional multiplier."""

from __future__ import annotations

import torch
from torch import Tensor

from ...losses import Loss, Squared


class OutputLoss:
    """A loss l(z, y), summed over samples, and its closed-form targets t = argmin l(z, y) + <z, dual> + beta |z - m|^2.

    A loss without curvature (the hinge) is replaced in the step length, never in an acceptance or a report, by its
    Moreau envelope at beta, whose gradient is 2 beta (m - t) and whose curvature is at most 2 beta."""

    def __init__(self, loss: Loss, num_outputs: int, beta: float, dtype: torch.dtype) -> None:
        self.loss, self.beta, self._num_outputs, self._dtype = loss, beta, num_outputs, dtype
        self.exact = isinstance(loss, Squared)
        """Whether the refit of the output layer is one least-squares solve."""
        bound = loss.curvature_bound
        self.curvature = 2 * beta if bound is None else bound
        """An upper bound of the second derivative at the outputs."""
        self._envelope = bound is None
        self.dual: Tensor | None = None
        """(n, k) multiplier of the output constraint, for `multiplier=True`; None without."""

    def targets(self, y: Tensor) -> Tensor:
        return self.loss.targets(y, self._num_outputs, self._dtype)

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        return self.loss.total(z, y)

    def fall(self, z: Tensor, y: Tensor) -> Tensor:
        """Minus the gradient at the outputs, (n, k)."""
        if self._envelope:
            return (self.loss.prox(z, y, self.beta) - z).mul_(2 * self.beta)
        return -self.loss.gradient(z, y)

    def curve(self, z: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """The curvature at the outputs times t, (n, k)."""
        return t * (2 * self.beta) if self._envelope else self.loss.hessian_mv(z, y, t)

    def displacement(self, m: Tensor, y: Tensor, rows: slice, *, move_dual: bool = True) -> Tensor:
        """t - m, (n, k); with a multiplier it is moved on first: dual += 2 beta (t - m), the coupled form.

        move_dual: False for a pass that only measures, so that the multiplier moves once a sweep."""
        if self.dual is None:
            return self.loss.prox(m, y, self.beta) - m
        dual = self.dual[rows]
        gap = self.loss.prox(m, y, self.beta, dual) - m
        if move_dual:
            dual += 2 * self.beta * gap
        return gap + dual / (2 * self.beta)

    def keep_dual(self, rows: int, device: torch.device) -> None:
        """Start the multiplier at zero for this rank's rows."""
        self.dual = torch.zeros(rows, self._num_outputs, dtype=self._dtype, device=device)
