"""What a layer's output costs the blocks above it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Price:
    """curvature/2 ||y||^2 + <slope, y> of an output y, a sample a row."""

    curvature: float
    """At least 0."""
    slope: Tensor
    """Of the shape of y."""

    def minimiser(self, v: Tensor, beta_in: float) -> Tensor:
        """argmin over y of beta_in/2 (y - v)^2 + price(y), element by element.

        Where nothing pulls it is v to the last bit."""
        return v - (self.slope + self.curvature * v) / (beta_in + self.curvature)

    def of(self, y: Tensor) -> Tensor:
        """Element by element."""
        return (self.curvature / 2 * y + self.slope) * y


def towards(b: Tensor, beta_out: float) -> Price:
    """beta_out/2 ||y - b||^2, less its value at y = 0."""
    return Price(beta_out, -beta_out * b)


def along(gradient: Tensor) -> Price:
    """<gradient, y>."""
    return Price(0.0, gradient)
