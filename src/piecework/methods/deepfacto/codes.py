"""Codes that have seen the label: what the loss, the decoder and the reconstruction agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...losses import Loss
from ...nn.nmf import as_images, as_rows
from ...solvers.nnls import fista, gram_and_cross, spectral_bound
from ...training import CannotTrain

_PIECEWISE_LINEAR = (nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Flatten)


@dataclass(frozen=True)
class Pull:
    """What pulls codes away from the reconstruction: the loss J of the head, and decoder_weight ||x - D(S)||^2, both
    summed over samples.

    x: (n, k) what the decoder is to give; y: labels; decoder: None where there is none; like: codes, (n, r) or
    (n, r, h, w), for the form that the head takes. The codes here are rows, (m, r)."""

    head: nn.Module
    objective: Loss
    y: Tensor
    decoder: nn.Linear | None
    decoder_weight: float | Tensor
    x: Tensor
    like: Tensor

    def slope(self, s: Tensor) -> Tensor:
        """The gradient by the codes, (m, r)."""
        s = as_images(s, self.like)
        with torch.enable_grad():
            leaf = s.detach().requires_grad_()
            z = self.head(leaf)
            (found,) = torch.autograd.grad(z, leaf, self.objective.gradient(z.detach(), self.y))
        if self.decoder is not None:
            missing = self.decoder(s.flatten(1)) - self.x
            found = found + (2 * self.decoder_weight * (missing @ self.decoder.weight)).view_as(s)
        return as_rows(found.detach())

    def lipschitz(self) -> Tensor:
        """A bound of the second derivatives by the codes of a sample, 0-d; exact where the head is one layer."""
        assert self.objective.curvature_bound is not None
        bound = torch.as_tensor(self.objective.curvature_bound, dtype=self.x.dtype, device=self.x.device)
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                bound = bound * _squared_norm(layer.weight)
        if self.decoder is not None:
            bound = bound + 2 * self.decoder_weight * _squared_norm(self.decoder.weight)
        return bound


def informed(
    pull: Pull,
    a: Tensor,
    dictionary: Tensor,
    *,
    weight: float,
    ridge: float,
    start: Tensor,
    steps: int,
    sign: float = 1.0,
) -> Tensor:
    """argmin over S >= 0 of sign pull(S) + weight (1/2 ||a - S M^T||^2 + ridge/2 ||S||^2), after so many steps of FISTA
    from `start` (n, r). Never synchronises a device.

    sign -1: the codes that the loss likes least; there is a minimum where weight M^T M outweighs the loss."""
    gram, cross = gram_and_cross(a, dictionary, ridge)

    def slope(s: Tensor) -> Tensor:
        return sign * pull.slope(s) + weight * (s @ gram - cross)

    return fista(slope, weight * spectral_bound(gram) + pull.lipschitz(), start, iterations=steps)


def refuse_head(head: nn.Module, objective: Loss, through: str) -> None:
    """Raise CannotTrain unless the second derivatives of the loss by the codes are bounded by what is known."""
    if objective.curvature_bound is None:
        raise CannotTrain(
            f"deepfacto through {through} needs a loss of bounded curvature, and the {objective.name} loss has none; "
            "use squared, softmax or logistic, or through='implicit'"
        )
    for module in head.modules():
        if not isinstance(module, (nn.Sequential, *_PIECEWISE_LINEAR)):
            raise CannotTrain(
                f"deepfacto through {through} takes a head of linear layers and ReLUs behind the NMF layer, and found "
                f"{type(module).__name__}; move it before the NMF layer, or use through='implicit'"
            )


def _squared_norm(weight: Tensor) -> Tensor:
    """An upper bound of ||W||_2^2, without a decomposition."""
    weight = weight.detach()
    gram = weight.T @ weight if weight.shape[1] <= weight.shape[0] else weight @ weight.T
    return spectral_bound(gram)
