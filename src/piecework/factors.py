"""A network with an NMF layer, taken apart: what encodes, the layer, and what decides on its codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .evaluation import TILE, deployed, device_of
from .layers import is_sequence, layers
from .nn import NMF
from .training import BadInput


@dataclass(frozen=True)
class Parts:
    """encoder: all before the NMF layer; nmf: the layer; head: all behind it. They share the model's modules."""

    encoder: nn.Sequential
    nmf: NMF
    head: nn.Sequential


def parts(model: nn.Module) -> Parts:
    """The parts of a sequence of layers with one NMF layer in it. Raises BadInput for any other model."""
    found = [module for _, module in layers(model, open_hooked=False)] if is_sequence(model, open_hooked=False) else []
    places = [number for number, module in enumerate(found) if isinstance(module, NMF)]
    if len(places) != 1:
        inside = sum(isinstance(module, NMF) for module in model.modules())
        raise BadInput(
            f"this needs an nn.Sequential with one NMF layer in it, and found {len(places)} at its top level "
            f"({inside} in all) in a {type(model).__name__}; put piecework.nn.NMF(features, rank) between a ReLU and "
            "the last layers"
        )
    place = places[0]
    nmf = found[place]
    assert isinstance(nmf, NMF)
    return Parts(nn.Sequential(*found[:place]), nmf, nn.Sequential(*found[place + 1 :]))


def codes(model: nn.Module, x: Tensor) -> Tensor:
    """The label-free codes of rows x (n, ...) in a deployed network: (n, rank), or (n, rank, h, w) of images."""
    taken = parts(model)
    found, device = [], device_of(model)
    with deployed(model), torch.no_grad():
        for start in range(0, len(x), TILE):
            found.append(taken.nmf(taken.encoder(x[start : start + TILE].to(device))).cpu())
    return torch.cat(found)
