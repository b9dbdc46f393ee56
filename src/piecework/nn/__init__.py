"""Layers torch lacks."""

from .activations import HardSigmoid, Sign
from .standardise import Standardise

__all__ = ["HardSigmoid", "Sign", "Standardise"]
