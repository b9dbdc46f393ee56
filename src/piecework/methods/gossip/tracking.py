"""Gradient tracking: what the optimiser is given follows the mean gradient of all ranks, and not the rank's own.

Nedic, Olshevsky, Shi, "Achieving geometric convergence for distributed optimization over time-varying graphs",
arXiv:1607.03218 (Push-DIGing). The tracker y is mixed like the numerators, and moves by the change of the gradient:

    y <- (what mixing left and brought) + g - g_before,        first y = g

so the sum of y over ranks and messages is that of the latest gradients. With w the push-sum weight, y tends to w times
the mean gradient: as it is it fits a step on the numerators, divided by w a step on the estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Tracker:
    """One rank's y, in `tensors`, which push-sum carries along; and the gradient before."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.tensors = [torch.zeros_like(parameter) for parameter in parameters]
        self._before = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def replace_gradients(self, factor: float) -> None:
        """Put factor * y in the place of the gradients."""
        gradients = [
            torch.zeros_like(one) if one.grad is None else one.grad.detach().clone() for one in self._parameters
        ]
        torch._foreach_add_(self.tensors, torch._foreach_sub(gradients, self._before))
        self._before = gradients
        for parameter, tracked in zip(self._parameters, self.tensors, strict=True):
            parameter.grad = tracked.clone() if factor == 1.0 else tracked * factor

    def state_dict(self) -> dict[str, Any]:
        return {"before": [one.clone() for one in self._before]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        torch._foreach_copy_(self._before, list(state["before"]))
