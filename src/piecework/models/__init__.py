"""Builders of plain torch models."""

from .mlp import ACTIVATIONS, mlp
from .resnet import resnet
from .transformer import transformer
from .two_layer_relu import two_layer_relu

__all__ = ["ACTIVATIONS", "mlp", "resnet", "transformer", "two_layer_relu"]
