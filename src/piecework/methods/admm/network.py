"""What ADMM needs to know of a model: a chain of linear layers with an element-wise activation between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...layers import layers
from ...nn import Standardise
from ...training import CannotTrain
from .activations import Activation, activation_of

WAY_OUT = (
    "ADMM trains nn.Sequential chains of nn.Linear and element-wise activations (ReLU, LeakyReLU, Hardtanh, "
    "HardSigmoid, Tanh, Sigmoid, Sign, Identity); use sgd, adam or lbfgs for this model, or move the layer out of the "
    "network"
)
PREPARING = (nn.Flatten, nn.Identity)
STATELESS = (*PREPARING, Standardise)


@dataclass(frozen=True)
class Network:
    """Fixed layers without parameters, then linears[0], activations[0], linears[1], ..., linears[-1]."""

    preparing: nn.Sequential
    linears: tuple[nn.Linear, ...]
    activations: tuple[Activation, ...]

    @property
    def widths(self) -> list[int]:
        """d_0, ..., d_L."""
        return [self.linears[0].in_features, *(linear.out_features for linear in self.linears)]

    @property
    def stateless(self) -> bool:
        """Whether tiles may be prepared in several threads at once: no layer draws random numbers or keeps anything."""
        return all(isinstance(module, STATELESS) for module in self.preparing)

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        """[W, b] of each layer, (d_l, d_{l-1} + 1) copies; (d_l, d_{l-1}) where there is no bias."""
        return [
            torch.cat([m.weight, m.bias[:, None]], 1) if m.bias is not None else m.weight.clone() for m in self.linears
        ]

    @torch.no_grad()
    def assign(self, weights: list[Tensor]) -> None:
        """Write [W, b] of each layer into the model."""
        for linear, w in zip(self.linears, weights, strict=True):
            linear.weight.copy_(w[:, : linear.in_features])
            if linear.bias is not None:
                linear.bias.copy_(w[:, -1])


def read(model: nn.Module) -> Network:
    """The chain of a model. Raises CannotTrain, naming the layer and the way out."""
    found = [(name or "the model", module) for name, module in layers(model)]
    first = next((i for i, (_, m) in enumerate(found) if isinstance(m, nn.Linear)), None)
    if first is None:
        raise CannotTrain(f"the model has no nn.Linear layer; {WAY_OUT}")
    for name, module in found[:first]:
        if any(True for _ in module.parameters()) or (activation_of(module) and not isinstance(module, PREPARING)):
            raise CannotTrain(f"layer {name!r} ({type(module).__name__}) stands before the first nn.Linear; {WAY_OUT}")
    linears: list[nn.Linear] = []
    activations: list[Activation] = []
    open_linear = False
    for name, module in found[first:]:
        if isinstance(module, nn.Linear):
            if open_linear:
                activations.append(_identity())
            _check_linear(name, module, linears)
            linears.append(module)
            open_linear = True
            continue
        activation = activation_of(module)
        if activation is None or not open_linear:
            raise CannotTrain(f"ADMM cannot train through layer {name!r} ({type(module).__name__}); {WAY_OUT}")
        activations.append(activation)
        open_linear = False
    if not open_linear:
        name, module = found[-1]
        raise CannotTrain(
            f"layer {name!r} ({type(module).__name__}) follows the last nn.Linear; leave it out: losses take the raw "
            "outputs, and the probabilities or classes are made from them afterwards"
        )
    return Network(nn.Sequential(*(m for _, m in found[:first])), tuple(linears), tuple(activations))


def _identity() -> Activation:
    identity = activation_of(nn.Identity())
    assert identity is not None
    return identity


def _check_linear(name: str, module: nn.Linear, before: list[nn.Linear]) -> None:
    if type(module) is not nn.Linear:
        raise CannotTrain(f"layer {name!r} is a {type(module).__name__}, not a plain nn.Linear; {WAY_OUT}")
    if any(module.weight is other.weight for other in before):
        raise CannotTrain(
            f"layer {name!r} shares its weight with another layer; ADMM solves for each layer alone: untie them"
        )
    if not all(p.requires_grad for p in module.parameters()):
        raise CannotTrain(f"layer {name!r} is frozen; ADMM moves every layer: thaw it with requires_grad_(True)")
    if module.weight.dtype not in (torch.float32, torch.float64):
        raise CannotTrain(f"layer {name!r} is {module.weight.dtype}; ADMM works in float32 or float64: model.float()")
    if before and module.in_features != before[-1].out_features:
        raise CannotTrain(
            f"layer {name!r} takes {module.in_features} features, but the one before it gives {before[-1].out_features}"
        )
