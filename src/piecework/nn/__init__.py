"""Layers torch lacks, some without a derivative: those carry the proximal step that stands in for it."""

from .activations import HardSigmoid, Sign
from .black_box import BlackBox
from .early_exit import EarlyExit
from .nmf import NMF
from .order import OneHot, Sort, TopK
from .projections import NonNegative, Simplex
from .prox_layer import LinearProxLayer, ProxLayer
from .quantisers import Quantiser, VectorQuantiser
from .residual import Residual
from .standardise import Standardise

__all__ = [
    "NMF",
    "BlackBox",
    "EarlyExit",
    "HardSigmoid",
    "LinearProxLayer",
    "NonNegative",
    "OneHot",
    "ProxLayer",
    "Quantiser",
    "Residual",
    "Sign",
    "Simplex",
    "Sort",
    "Standardise",
    "TopK",
    "VectorQuantiser",
]
