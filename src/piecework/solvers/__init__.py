"""Solvers: pure functions of tensors. A failure is a value with a sentence in it."""

from .linear import cg, ridge_solve, solve_step
from .nmf import Factorised, nmf
from .nnls import composite_nnls, nnls
from .solved import Solved

__all__ = ["Factorised", "Solved", "cg", "composite_nnls", "nmf", "nnls", "ridge_solve", "solve_step"]
