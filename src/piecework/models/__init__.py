"""Builders of plain torch models."""

from .mlp import ACTIVATIONS, mlp
from .two_layer_relu import two_layer_relu

__all__ = ["ACTIVATIONS", "mlp", "two_layer_relu"]
