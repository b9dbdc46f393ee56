"""Builders of plain torch models."""

from .mlp import ACTIVATIONS, mlp

__all__ = ["ACTIVATIONS", "mlp"]
