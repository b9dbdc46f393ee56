"""The trainable tensors of a model: which they are, where they start, and as one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ..group import Group
from ..layers import layers
from ..nn import NMF, Sign
from ..training import CannotTrain

_RANDOM = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
_COUPLED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def trainable(model: nn.Module, method: str, *, derivative: bool = True) -> list[nn.Parameter]:
    """The parameters that require a gradient, in the model's order.

    Raises CannotTrain when there are none, when one has no shape yet (a lazy layer) or is not real floating point, and,
    for a method that needs a derivative, when it is seen to get none: in a sequence of layers, before a `Sign`."""
    found = []
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CannotTrain(
                f"{method} cannot train {name}: it has no shape yet; pass one batch through the model before binding it"
            )
        if parameter.requires_grad:
            if not parameter.is_floating_point():
                raise CannotTrain(f"{method} trains real floating-point parameters, and {name} is {parameter.dtype}")
            found.append(parameter)
    if not found:
        raise CannotTrain(
            f"{method} found nothing to train: the model has no parameter that requires a gradient; "
            "add a layer with weights, or call requires_grad_() on those to be trained"
        )
    learning = False
    for name, layer in layers(model) if derivative else ():
        if isinstance(layer, Sign) and learning:
            raise CannotTrain(
                f"{method} needs a derivative, and layer {name} ({type(layer).__name__}) has none: nothing "
                "before it would learn; train with block-admm or admm, freeze the layers before it, or take another "
                "activation"
            )
        learning = learning or any(parameter.requires_grad for parameter in layer.parameters())
    return found


def no_gradient(model: nn.Module) -> CannotTrain:
    """The refusal after a backward pass that left a trainable parameter without a gradient, with its name."""
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    return CannotTrain(
        f"no derivative of the loss reaches {idle[0] if idle else 'a parameter (seen on another rank)'}; "
        "train with block-admm or admm, freeze it with requires_grad_(False), or replace the part without a derivative"
    )


def random_layers(model: nn.Module) -> list[str]:
    """Names of torch's layers that draw random numbers in training, such as dropout."""
    found = []
    for name, module in model.named_modules():
        rate = getattr(module, "p", 1.0) if isinstance(module, _RANDOM) else getattr(module, "dropout", 0.0)
        if isinstance(rate, int | float) and rate > 0:
            found.append(name or type(module).__name__)
    return found


def coupled_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose output for one row depends on the other rows of the batch (batch normalisation)."""
    return [name or type(module).__name__ for name, module in model.named_modules() if isinstance(module, _COUPLED)]


def dictionaries(model: nn.Module) -> list[str]:
    """Names of the NMF layers, whose dictionary follows the batches that pass in training mode."""
    return [name or "NMF" for name, module in model.named_modules() if isinstance(module, NMF)]


def refuse_noise_and_coupling(model: nn.Module, method: str) -> None:
    """Raise CannotTrain unless the loss is a function of the weights that is summed row by row, as far as torch's
    layers tell."""
    if random := random_layers(model):
        raise CannotTrain(
            f"{method} compares the loss at different weights, and layer {random[0]} draws random numbers in "
            "training; remove it (or set its rate to 0), or train with adam or sgd"
        )
    if coupled := coupled_layers(model):
        raise CannotTrain(
            f"{method} takes each row of a batch by itself, and layer {coupled[0]} normalises over the batch; "
            "use LayerNorm in its place, or train with adam or sgd"
        )
    if moving := dictionaries(model):
        raise CannotTrain(
            f"{method} compares the loss at different weights, and the dictionary of layer {moving[0]} moves with "
            "every pass; train with deepfacto, adam or sgd"
        )


def start_from_rank_0(model: nn.Module, group: Group) -> None:
    """Give every rank the parameters and buffers of rank 0: one message for each dtype and device."""
    share_from_rank_0(chain(model.parameters(), model.buffers()), group)


def share_from_rank_0(tensors: Iterable[Tensor], group: Group) -> None:
    """Overwrite the tensors by those of rank 0: one message for each dtype and device. Collective."""
    share_from(0, tensors, group)


@torch.no_grad()
def share_from(rank: int, tensors: Iterable[Tensor], group: Group) -> None:
    """Overwrite the tensors by those of a rank: one message for each dtype and device. Collective."""
    if group.size == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        vector = packed(same)
        group.broadcast_(vector, rank)
        if group.rank != rank:
            unpack_(vector, same)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' elements one after the other: a new vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def unpack_(vector: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy the parts of the vector into the tensors, in the order of `packed`."""
    for tensor, part in zip(tensors, torch.split(vector, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def fused_kernels(parameters: Iterable[Tensor]) -> bool | None:
    """For `torch.optim`: the one-pass kernels where torch has them; elsewhere its own choice."""
    return True if all(parameter.device.type in ("cpu", "cuda") for parameter in parameters) else None
