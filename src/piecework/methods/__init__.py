"""The methods, one file or package each, and their names on the command line."""

from __future__ import annotations

from ..training import Method
from .admm import ADMM
from .block_admm import BlockADMM
from .cg import CG
from .deepfacto import DeepFacto
from .first_order import SGD, Adam
from .gauss_newton import GaussNewton
from .gossip import Gossip
from .lbfgs import LBFGS
from .local import Local

METHODS: dict[str, type[Method]] = {
    "admm": ADMM,
    "gauss-newton": GaussNewton,
    "block-admm": BlockADMM,
    "deepfacto": DeepFacto,
    "gossip": Gossip,
    "local": Local,
    "sgd": SGD,
    "adam": Adam,
    "lbfgs": LBFGS,
    "cg": CG,
}
"""Recipe classes by their kebab-case names."""

__all__ = ["ADMM", "CG", "LBFGS", "METHODS", "SGD", "Adam", "BlockADMM", "DeepFacto", "GaussNewton", "Gossip", "Local"]
