"""The layers whose Jacobian is known from what goes in and what comes back, and how the two are laid out as factors.

Legend: n samples, T uses of the weight within a sample (positions of a sequence or an image), A and D its widths.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

LayerKind = Literal["linear", "conv", "embedding", "norm"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_KNOWN: tuple[tuple[type[nn.Module], LayerKind], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv2d, "conv"),
    (nn.Embedding, "embedding"),
    *((norm, "norm") for norm in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *_BATCH_NORMS, *_INSTANCE_NORMS)),
)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Which kind of layer this is; None for all that compute something else, or may (a `forward` of their own,
    options that alter the gradient)."""
    for known, kind in _KNOWN:
        if isinstance(module, known) and type(module).forward is known.forward and _plain(module):
            return kind
    return None


def _plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    if isinstance(module, _INSTANCE_NORMS):
        return not module.track_running_stats
    if isinstance(module, _BATCH_NORMS):
        return not module.training and module.running_mean is not None
    return True


def inputs(module: nn.Module, x: Tensor, n: int) -> Tensor | None:
    """What the weight of a layer was multiplied with: (n, T, A); for an embedding the places, (n, T) int64; for
    normalisation the normalised values, (n, T, A). None where x is not n samples, or n times as many rows."""
    least = {"linear": 2, "conv": 4, "embedding": 1, "norm": 2}[kind_of(module) or "linear"]
    if x.dim() < least or len(x) == 0 or len(x) % n or (least == 4 and x.dim() > 4):
        return None
    if isinstance(module, nn.Linear):
        return x.reshape(n, -1, x.shape[-1])
    if isinstance(module, nn.Conv2d):
        patches = _patches(module, x)
        return patches.mT.reshape(n, -1, patches.shape[1])
    if isinstance(module, nn.Embedding):
        return x.reshape(n, -1)
    return outputs(module, _normalised(module, x), n)


def outputs(module: nn.Module, grad: Tensor, n: int) -> Tensor:
    """The derivatives by what a layer gave, (n, T, D)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return grad.reshape(n, -1, grad.shape[-1])
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        assert module.weight is not None
        return grad.reshape(n, -1, module.weight.numel())
    grad = grad.flatten(2) if grad.dim() > 2 else grad[:, :, None]
    return grad.mT.reshape(n, -1, grad.shape[1])


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    if conv.padding == "same":
        wide = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        x = functional.pad(x, (wide[1] // 2, wide[1] - wide[1] // 2, wide[0] // 2, wide[0] - wide[0] // 2))
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    return functional.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, _INSTANCE_NORMS):
        return functional.instance_norm(x, eps=module.eps)
    assert isinstance(module, _BATCH_NORMS)
    return functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
