"""What the files of a run may hold: tensors and plain values, and nothing that runs when it is read."""

from __future__ import annotations

import io
import math
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .training import BadInput

FORMAT = 1
"""Version of the run folder's files."""

_PLAIN = (type(None), bool, int, float, str)
_DEEPEST = 40


def model_bytes(weights: Mapping[str, Any]) -> bytes:
    """A state dict of tensors as a safetensors file; shared tensors are written under each of their names."""
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise BadInput(
                f"the model's state {name!r} is not a tensor ({type(value).__name__}), so it cannot be saved"
            )
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    return bytes(safetensors.torch.save(plain))


def parse_model(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises BadInput naming the file."""
    try:
        return dict(safetensors.torch.load(content))
    except Exception as error:  # SafetensorError, and the KeyErrors and ValueErrors of unknown types
        raise BadInput(f"{path} is not a whole safetensors file ({str(error)[:100]})") from None


def parse_training(content: bytes, path: Path) -> dict[str, Any]:
    """What a training.pt holds, with only tensors and plain values admitted. Raises BadInput naming the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # torch.save stores without compression, so nothing honest grows when it is read.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise BadInput(f"{path} has compressed parts, which no checkpoint has")
            # torch.load does not compare the checksums that torch.save writes.
            if (damaged := archive.testzip()) is not None:
                raise BadInput(f"{path} is damaged (checksum of {damaged[:80]})")
        value = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        require_plain(value, "it")
        _require_checkpoint(value)
    except BadInput:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadInput(f"{path} is damaged or is not a checkpoint ({reason})") from None
    return dict(value)


def require_plain(value: Any, place: str, depth: int = 0) -> None:
    """Raise TypeError, naming the place, for all but dense tensors, numbers, strings, None, lists, tuples and dicts."""
    if depth > _DEEPEST:
        raise TypeError(f"{place} is nested more than {_DEEPEST} deep")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            raise TypeError(f"{place} is not a dense tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise TypeError(f"{place} repeats its memory; save it as an ordinary tensor")
    elif type(value) in (dict, OrderedDict):
        for key, item in value.items():
            require_plain(key, f"a key of {place}", _DEEPEST)
            require_plain(item, f"{place}[{str(key)[:40]!r}]", depth + 1)
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            require_plain(item, f"{place}[{number}]", depth + 1)
    elif type(value) not in _PLAIN:
        raise TypeError(
            f"{place} is a {type(value).__name__}; only tensors, numbers, strings, lists and dicts are saved"
        )


def _require_checkpoint(value: Any) -> None:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"it does not have format {FORMAT}")
    sha, fit, ranks, model = (value.get(key) for key in ("sha256", "fit", "ranks", "model"))
    if not (isinstance(sha, str) and len(sha) == 64):
        raise ValueError("it does not name its model's SHA-256")
    if not whole(value.get("number")):
        raise ValueError("its number is not a whole number")
    if not isinstance(fit, dict) or not whole(fit.get("step")):
        raise ValueError("its step is not a whole number")
    if not isinstance(fit.get("seconds"), int | float) or not math.isfinite(fit["seconds"]) or fit["seconds"] < 0:
        raise ValueError("its seconds are not a time")
    if not isinstance(ranks, list) or not ranks or not all(isinstance(state, dict) for state in ranks):
        raise ValueError("it lacks the states of the ranks")
    if model is not None and not (isinstance(model, dict) and all(isinstance(one, Tensor) for one in model.values())):
        raise ValueError("its model is not a table of tensors")


def whole(value: Any) -> bool:
    """Whether this is a number 0, 1, 2, ... and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a model in place. Raises BadInput like `require_weights`, before anything is copied."""
    require_weights(model, weights, path)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])


def require_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise BadInput, naming the file and the first tensor that does not fit, unless they are all this model's."""
    own: dict[str, Any] = dict(model.state_dict())
    for name in [*own, *weights]:
        if name not in weights:
            raise BadInput(f"{path} lacks {name!r} of this network; it belongs to another one")
        if name not in own:
            raise BadInput(f"{path} has {name[:80]!r}, which this network does not have; it belongs to another one")
        given, wanted = weights[name], own[name]
        if given.shape != wanted.shape or given.dtype != wanted.dtype:
            raise BadInput(
                f"{path} has {name!r} of shape {tuple(given.shape)} and type {given.dtype}; this network's is "
                f"{tuple(wanted.shape)} and {wanted.dtype}"
            )
