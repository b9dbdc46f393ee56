"""A network seen through an equation that it is to satisfy."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Residual(nn.Module):
    """x -> function(network, x): residuals, for example of a differential equation at collocation points.

    function: takes the network and points x (n, d), and gives residuals (n, k), each row from its own point alone. With
    the squared loss and targets of 0 any method can train it; afterwards `network` is the solution. Derivatives within
    the function are best taken with `torch.func` (`vmap`, `jacrev`, `hessian`, `jvp`), which also works where
    gradients are switched off, as they are in evaluations."""

    def __init__(self, network: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.network, x)
