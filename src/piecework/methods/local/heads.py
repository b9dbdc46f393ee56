"""The heads there are: what judges the output of a block that is not the last."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ...training import CannotTrain
from .head import HeadFactory, built
from .reconstruct import Contrast, Reconstructing, decoder

if TYPE_CHECKING:
    from . import Local

Kind = Literal["auto", "linear", "mlp", "conv", "unembedding", "infopro", "contrastive"]

_SIDE = 8
"""Pictures are pooled to at most so many places a side before they are flattened."""


@dataclass(frozen=True)
class Site:
    """Where a head stands.

    h: one row of what the block gives, (1, ...); x: one row of the model's input; num_outputs: of the model;
    depth: 0 for the first head, 1 for the last; unembedding: the model's own last matrix, (outputs, width), if any."""

    number: int
    h: Tensor
    x: Tensor
    num_outputs: int
    sequence: bool
    depth: float
    unembedding: Tensor | None = None


def head(recipe: Local, site: Site) -> nn.Module:
    """The head that the recipe asks for behind this block. Raises CannotTrain for one that does not fit there."""
    if not site.h.is_floating_point():
        raise CannotTrain(
            f"block {site.number} gives {site.h.dtype}, and nothing can be learnt through that; cut elsewhere (at=)"
        )
    make = partial(_own, recipe.make_head, site) if recipe.make_head is not None else partial(_named, recipe, site)
    return built(make, recipe.seed, site.number, site.h.device, site.h.dtype)


def _own(make: HeadFactory, site: Site) -> nn.Module:
    found = make(torch.zeros_like(site.h), site.num_outputs)
    if not isinstance(found, nn.Module):
        raise CannotTrain(f"make_head must give a torch.nn.Module, and gave a {type(found).__name__}")
    return found


def _named(recipe: Local, site: Site) -> nn.Module:
    kind, width = recipe.heads, recipe.head_width
    if kind in ("infopro", "contrastive"):
        return _reconstructing(recipe, site)
    if kind == "auto":
        kind = "conv" if site.h.dim() == 4 else "unembedding" if site.sequence and site.h.dim() == 3 else "linear"
    return classifier(kind, site, width)


def classifier(kind: str, site: Site, width: int) -> nn.Module:
    """A head that gives outputs, of the kinds linear, mlp, conv and unembedding."""
    h, outputs = site.h, site.num_outputs
    flat: list[nn.Module] = [nn.Flatten()] if h.dim() > 2 and not site.sequence else []
    features = h.shape[-1] if site.sequence else h.numel()
    if kind == "linear":
        return nn.Sequential(*flat, nn.Linear(features, outputs))
    if kind == "mlp":
        return nn.Sequential(*flat, nn.Linear(features, width), nn.ReLU(), nn.Linear(width, outputs))
    if kind == "conv":
        if h.dim() != 4:
            raise _misfit(site, "conv", "pictures (n, channels, height, width)", "linear or mlp")
        return nn.Sequential(*_pooled(h, width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
    if h.dim() != 3 or not site.sequence:
        raise _misfit(site, "unembedding", "sequences (n, tokens, width) of a model of tokens", "linear or mlp")
    return _unembedding(site)


def _pooled(h: Tensor, width: int) -> list[nn.Module]:
    """(n, channels, height, width) to (n, width): a convolution of half the places, and their mean."""
    convolution = nn.Conv2d(h.shape[1], width, 3, stride=2, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _unembedding(site: Site) -> nn.Module:
    """Normalisation, and a matrix of its own that starts as a copy of the model's last one where the shapes agree."""
    width = site.h.shape[-1]
    matrix = nn.Linear(width, site.num_outputs, bias=False)
    if site.unembedding is not None and site.unembedding.shape == matrix.weight.shape:
        with torch.no_grad():
            matrix.weight.copy_(site.unembedding)
    return nn.Sequential(nn.LayerNorm(width), matrix)


def _misfit(site: Site, kind: str, wanted: str, instead: str) -> CannotTrain:
    shape = ", ".join(["n", *map(str, site.h.shape[1:])])
    return CannotTrain(
        f"a head of kind {kind} takes {wanted}, and block {site.number} gives ({shape}); take heads {instead}, or "
        "give a factory (make_head)"
    )


def _reconstructing(recipe: Local, site: Site) -> nn.Module:
    if not (site.x.is_floating_point() or site.x.dtype == torch.uint8) or site.sequence:
        raise CannotTrain(
            f"heads {recipe.heads} reconstruct the rows, and these are {site.x.dtype}, not real numbers; take heads "
            "unembedding, linear or mlp"
        )
    weights = [first + (last - first) * site.depth for first, last in (recipe.reconstruct, recipe.supervise)]
    picture = site.h.dim() == 4
    if recipe.heads == "infopro":
        judge = classifier("conv" if picture else "mlp", site, recipe.head_width)
    else:
        body = _pooled(site.h, recipe.head_width) if picture else [nn.Flatten()]
        features = recipe.head_width if picture else site.h.numel()
        width = recipe.head_width
        judge = nn.Sequential(*body, nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width))
    made = decoder(site.h, site.x, _SIDE)
    kind = Reconstructing if recipe.heads == "infopro" else Contrast
    return kind(judge, made, weights[0], weights[1])


def judges(module: nn.Module) -> bool:
    """Whether a head gives the model's outputs, and so makes an exit."""
    return not isinstance(module, Contrast)
