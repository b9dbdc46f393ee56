"""Layers torch lacks."""

from .activations import HardSigmoid, Sign
from .residual import Residual
from .standardise import Standardise

__all__ = ["HardSigmoid", "Residual", "Sign", "Standardise"]
