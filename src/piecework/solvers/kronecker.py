"""Kronecker factors: a preconditioner of (J^T J + damping I) d = b, for J of layers.

The gradient of a linear map (D, A) is d a^T for what went in, a, and what came back, d, so its block of J^T J is a sum
of a a^T (x) d d^T over the samples. With a and d taken as independent it is the number of samples times the product of
two means (Martens and Grosse, K-FAC, arXiv 1503.05671, section 3). In the eigenvectors of the two the block is
diagonal, for any damping (their basis is that of George et al., arXiv 1806.03884).

Differs from K-FAC
1. The damping is added to the product, not in parts to its factors, so that a retry costs no factorisation.
2. It is a preconditioner: how far to go along what it gives is for conjugate gradients with the true J to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Moments = tuple[Tensor, ...]
"""Of the weights of one block, sums over samples or means. Two, of a linear map: the second moments of its inputs,
(A, A), or (A,) where they are diagonal, and of the derivatives, (D, D). One: the diagonal of the block, (P,)."""


@dataclass(frozen=True, eq=False)
class KroneckerFactor:
    """One block in its eigenvectors.

    values: (D, A) or (P,), eigenvalues for one sample, not negative; outputs, inputs: eigenvectors (D, D) and (A, A) in
    columns, None for the unit matrix."""

    values: Tensor
    outputs: Tensor | None
    inputs: Tensor | None

    @classmethod
    def of(cls, mean: Moments) -> KroneckerFactor:
        """From the moments of one sample. Values that are not finite give factors that are not."""
        if len(mean) == 1:
            return cls(mean[0], None, None)
        a, outputs = mean
        units, out_vectors = _spectrum(outputs)
        if a.dim() == 1:
            return cls(units[:, None] * a, out_vectors, None)
        widths, in_vectors = _spectrum(a)
        return cls(units[:, None] * widths, out_vectors, in_vectors)

    def solve(self, right: Tensor, samples: float, damping: float) -> Tensor:
        """(samples times the block + damping I)^-1 of weights shaped as the values."""
        found = right if self.outputs is None else self.outputs.t() @ right
        found = found if self.inputs is None else found @ self.inputs
        found = found / (samples * self.values + damping).clamp_min(torch.finfo(found.dtype).tiny)
        found = found if self.inputs is None else found @ self.inputs.t()
        return found if self.outputs is None else self.outputs @ found

    def dimension(self, samples: float, damping: float) -> float:
        """The trace of the block over the block and the damping."""
        values = samples * self.values.double()
        return float((values / (values + damping).clamp_min(torch.finfo(values.dtype).tiny)).sum())


def _spectrum(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, what rounding made negative as 0, and eigenvectors; nan where the moment is not finite, which LAPACK
    would refuse."""
    if not bool(torch.isfinite(moment).all()):
        nan = torch.full_like(moment, float("nan"))
        return nan[0], nan
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp_min(0), vectors
