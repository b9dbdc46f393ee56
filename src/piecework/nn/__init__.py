"""Layers torch lacks."""

from .activations import HardSigmoid, Sign
from .nmf import NMF
from .residual import Residual
from .standardise import Standardise

__all__ = ["NMF", "HardSigmoid", "Residual", "Sign", "Standardise"]
