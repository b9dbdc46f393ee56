"""Codes that have seen the label: what the loss, the decoder and the reconstruction agree on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ...losses import Loss
from ...nn.nmf import as_images, as_rows
from ...solvers.nnls import fista, gram_and_cross, spectral_bound
from ...training import CannotTrain

_PIECEWISE_LINEAR = (nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Flatten)


@dataclass(frozen=True)
class Pull:
    """What pulls codes away from the reconstruction: the loss J of the head, decoder_weight ||x - D(S)||^2, and
    sparsity times the `density` of the codes, linear around those in `like`, all summed over samples.

    x: (n, k) what the decoder is to give; y: labels; decoder: None where there is none; like: label-free codes, (n, r)
    or (n, r, h, w), in the form that the head takes. The codes here are rows, (m, r)."""

    head: nn.Module
    objective: Loss
    y: Tensor
    decoder: nn.Linear | None
    decoder_weight: float | Tensor
    x: Tensor
    like: Tensor
    sparsity: float = 0.0

    @torch.no_grad()
    def slope(self, s: Tensor) -> Tensor:
        """The gradient by the codes, (m, r)."""
        s = as_images(s, self.like)
        found = self._head_slope(s)
        if self.decoder is not None:
            gram, cross = self._decoding
            found = found + (s.flatten(1) @ gram - cross).view_as(s)
        few = self._towards_few
        return as_rows(found) if few is None else as_rows(found) + few

    def _head_slope(self, s: Tensor) -> Tensor:
        """Of the loss alone; s and the slope in the form that the head takes."""
        if self._only_layer is not None:
            return (self.objective.gradient(self.head(s), self.y) @ self._only_layer.weight).view_as(s)
        with torch.enable_grad():
            leaf = s.detach().requires_grad_()
            z = self.head(leaf)
            (found,) = torch.autograd.grad(z, leaf, self.objective.gradient(z.detach(), self.y))
        return found

    @cached_property
    def _only_layer(self) -> nn.Linear | None:
        """The head's only layer, if flattening is all that the others do: its slope needs no graph."""
        layers = [layer for layer in self.head.modules() if not isinstance(layer, (nn.Sequential, nn.Identity))]
        rest = [layer for layer in layers if not isinstance(layer, nn.Flatten)]
        return rest[0] if len(rest) == 1 and isinstance(rest[0], nn.Linear) else None

    @cached_property
    def _decoding(self) -> tuple[Tensor, Tensor]:
        """The decoder's slope is flat codes times the first, less the second; no iteration sees the width k."""
        assert self.decoder is not None
        double = 2 * self.decoder_weight * self.decoder.weight.detach()
        return self.decoder.weight.detach().T @ double, (self.x - self.decoder.bias.detach()) @ double

    @cached_property
    def _towards_few(self) -> Tensor | None:
        """The slope of sparsity times the density, (m, r), where the label-free codes are."""
        if not self.sparsity:
            return None
        with torch.enable_grad():
            leaf = self.like.detach().requires_grad_()
            (found,) = torch.autograd.grad(len(leaf) * self.sparsity * density(leaf), leaf)
        return as_rows(found)

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


def density(codes: Tensor) -> Tensor:
    """||s||_1 / ||s||_2 of codes (n, r) or (n, r, h, w), the mean over rows and positions, 0-d; codes of 0 count 0."""
    rows = as_rows(codes)
    length = rows.square().sum(1).clamp_min(torch.finfo(rows.dtype).tiny).sqrt()
    return (rows.sum(1) / length).mean()


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
