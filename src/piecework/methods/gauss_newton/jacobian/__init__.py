"""The Jacobian of a model by all its trainable parameters, row by row, in a form that never needs it as a matrix.

Read `whole.py` for what it can do, `factors.py` for why that is cheap, `capture.py` for where the factors come from,
`planning.py` for which parameter takes which back-end, and `products.py` for doing without factors."""

from .blocks import Block
from .capture import Plan, capture, predicted_bytes, values_of
from .factors import Factors
from .planning import PROBE_ROWS, plan, refuse_early, spread
from .products import MatrixFree
from .whole import Jacobian, concatenate

__all__ = [
    "PROBE_ROWS",
    "Block",
    "Factors",
    "Jacobian",
    "MatrixFree",
    "Plan",
    "capture",
    "concatenate",
    "plan",
    "predicted_bytes",
    "refuse_early",
    "spread",
    "values_of",
]
