"""Proximal steps of layers, also of those without a derivative: which input of a layer is best for a wanted output.

For a layer phi, an input v and a price of its output,

    argmin over a of  beta_in/2 ||a - v||^2 + price(phi(a)),      a sample a row.

Block-ADMM has price(y) = beta_out/2 ||y - b||^2, or <gradient, y> where the blocks above are linearised (after arXiv
2105.00339, reconstructed; the closed forms are derived here). Both are a `Price`, so that each layer has one function.
Norms carry the factor 1/2, unlike those of `solvers.prox`.

The answer never costs more than a = v, up to rounding. At a jump of phi the minimum need not be attained; `margin` then
says how far beyond the jump to go, and the answer is the best with that margin, or v.
"""

from .candidates import black_box
from .codewords import nearest, vector_quantiser
from .elements import clipped, nonnegative, quantiser, sign
from .isotonic import isotonic, sort
from .price import Price, along, towards
from .simplex import project, simplex
from .winners import keep_largest, largest, one_hot, top_k

__all__ = [
    "Price",
    "along",
    "black_box",
    "clipped",
    "isotonic",
    "keep_largest",
    "largest",
    "nearest",
    "nonnegative",
    "one_hot",
    "project",
    "quantiser",
    "sign",
    "simplex",
    "sort",
    "top_k",
    "towards",
    "vector_quantiser",
]
