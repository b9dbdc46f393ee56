"""Train neural networks in pieces: methods that split the training problem somewhere else than one global gradient.

The names here are the table of contents. `Classifier`, `Regressor` and `FactorClassifier` need scikit-learn and are
loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .deploy import load, save
from .fit import fit
from .group import Group, Ranks, Solo
from .history import History
from .losses import Hinge, Logistic, Loss, Softmax, Squared
from .methods import ADMM, CG, LBFGS, SGD, Adam, BlockADMM, DeepFacto, GaussNewton, Gossip, Local
from .split import split
from .training import BadInput, Batch, CannotTrain, DidNotSolve, Method, Metrics, PeerLost, Training

if TYPE_CHECKING:
    from .estimators import Classifier, Regressor
    from .factor_classifier import FactorClassifier

__version__ = "0.1.0"
__all__ = [
    "ADMM",
    "CG",
    "LBFGS",
    "SGD",
    "Adam",
    "BadInput",
    "Batch",
    "BlockADMM",
    "CannotTrain",
    "Classifier",
    "DeepFacto",
    "DidNotSolve",
    "FactorClassifier",
    "GaussNewton",
    "Gossip",
    "Group",
    "Hinge",
    "History",
    "Local",
    "Logistic",
    "Loss",
    "Method",
    "Metrics",
    "PeerLost",
    "Ranks",
    "Regressor",
    "Softmax",
    "Solo",
    "Squared",
    "Training",
    "fit",
    "load",
    "save",
    "split",
]


def __getattr__(name: str) -> Any:
    if name == "FactorClassifier":
        from .factor_classifier import FactorClassifier

        return FactorClassifier
    if name in ("Classifier", "Regressor"):
        from . import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
