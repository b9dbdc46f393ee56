"""Any function of rows as a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..solvers import layer_prox
from ..training import BadInput
from .prox_layer import check_penalties, positive, same_shape


class BlackBox(nn.Module):
    """x -> function(x), of which nothing is known but its values: the output has no graph.

    function: takes x (n, ...) without a graph and gives a tensor (n, ...), each row from its own row alone, the same
    for the same x. candidates: how many inputs a row the proximal step tries, v among them; that many calls. spread:
    in units of x, how far from v it looks. Raises BadInput for settings out of range and for a function that gives
    something else."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, candidates: int = 16, spread: float = 1.0) -> None:
        super().__init__()
        if not callable(function):
            raise BadInput(f"a black box needs a function of a tensor, got {type(function).__name__}")
        if candidates < 1:
            raise BadInput(f"v itself is always a candidate, so there is at least 1, got candidates={candidates}")
        self.function, self.candidates, self.spread = function, candidates, positive("spread", spread)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.function(x.detach())
        if not isinstance(y, Tensor):
            raise BadInput(f"the function of a black box must give a tensor, and gave {type(y).__name__}")
        if y.dim() == 0 or x.dim() == 0 or y.shape[0] != x.shape[0]:
            shapes = f"shape {tuple(y.shape)} for an input of shape {tuple(x.shape)}"
            raise BadInput(f"the function of a black box must give as many rows as it takes, and gave {shapes}")
        output: Tensor = y.detach().to(x.device, x.dtype)
        return output

    def prox_input(self, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
        """The best of `candidates` inputs, v among them: never worse than v, and no more than that is promised.

        b: of the shape of the output. Draws from torch's global generator."""
        check_penalties(beta_in, beta_out)

        def checked(a: Tensor) -> Tensor:
            y = self.forward(a)
            same_shape(y, b, "wanted output")
            return y

        with torch.no_grad():
            price = layer_prox.towards(b.detach(), beta_out)
            return layer_prox.black_box(checked, v.detach(), price, beta_in, self.candidates, self.spread)

    def extra_repr(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"{name}, candidates={self.candidates}, spread={self.spread:g}"
