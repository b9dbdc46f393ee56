"""Solvers: pure functions of tensors. A failure is a value with a sentence in it."""

from .linear import cg, ridge_solve, solve_step
from .solved import Solved

__all__ = ["Solved", "cg", "ridge_solve", "solve_step"]
