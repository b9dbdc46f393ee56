"""Tensors as messages: flat bytes for what is only carried, one packed buffer a dtype for what is added up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

SUMMABLE = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int32, torch.int64),
)
"""What gloo and NCCL both add up."""

HEADER_BYTES = 16
"""Of the two int64 that precede a gathered tensor: its rows, and what must be the same on every rank."""


def num_bytes(tensor: Tensor) -> int:
    """The payload of a tensor, in bytes."""
    return tensor.numel() * tensor.element_size()


def check_summable(verb: str, tensors: Iterable[Tensor]) -> None:
    """Refuse dtypes that the backends cannot add up; `TypeError`."""
    for tensor in tensors:
        if tensor.dtype not in SUMMABLE:
            accepted = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in SUMMABLE))
            raise TypeError(
                f"{verb} cannot add up {tensor.dtype} tensors (accepted: {accepted}); convert, say to int32"
            )


def check_peers(verb: str, peers: Iterable[int], *, rank: int, size: int) -> None:
    """Refuse peers that are not another rank of the group; `ValueError`."""
    for peer in peers:
        if peer == rank:
            raise ValueError(f"{verb}: rank {rank} names itself as a peer; copy the tensor instead")
        if not 0 <= peer < size:
            raise ValueError(f"{verb}: there is no rank {peer} in a group of {size}; peers are 0 to {size - 1}")


def check_source(verb: str, src: int, *, size: int) -> None:
    """Refuse a source that is not in the group; `ValueError`."""
    if not 0 <= src < size:
        raise ValueError(f"{verb}: there is no rank {src} in a group of {size}; sources are 0 to {size - 1}")


def plain(tensor: Tensor, device: torch.device) -> bool:
    """Whether the tensor's memory is its message: contiguous, on that device, without lazy conjugation or sign."""
    return tensor.device == device and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def as_bytes(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor as (bytes,) uint8 on the device: its own memory where that is possible, else a copy."""
    tensor = tensor.detach()
    if not plain(tensor, device):
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)
    return tensor.reshape(-1).view(torch.uint8)


def write_back(carrier: Tensor, tensor: Tensor) -> None:
    """Give the tensor what its carrier (from `as_bytes`) holds, unless they share memory."""
    if not plain(tensor, carrier.device):
        tensor.detach().copy_(carrier.view(tensor.dtype).view(tensor.shape))


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors that travel together: of one dtype and device, in the order given."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    return list(groups.values())


class Packs:
    """Flat buffers that are filled again and again, one a dtype and device, each as large as its largest message."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def fill(self, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
        """The tensors (one dtype) end to end, (sum of sizes,); valid until the next `fill` of that dtype."""
        total, key = sum(tensor.numel() for tensor in tensors), (tensors[0].dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < total:
            buffer = self._buffers[key] = torch.empty(total, dtype=key[0], device=device)
        flat = buffer[:total]
        for part, tensor in zip(self._parts(flat, tensors), tensors, strict=True):
            part.copy_(tensor)
        return flat

    def empty(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write a filled buffer back into its tensors."""
        for part, tensor in zip(self._parts(flat, tensors), tensors, strict=True):
            tensor.copy_(part)

    @staticmethod
    def _parts(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        ends = list(accumulate(tensor.numel() for tensor in tensors))
        return [flat[end - tensor.numel() : end].view(tensor.shape) for end, tensor in zip(ends, tensors, strict=True)]


def header(tensor: Tensor) -> list[int]:
    """[rows, kind]: what the other ranks must know of a tensor before they gather it; a 0-d tensor is one row."""
    kind = f"{tensor.dtype} {tensor.dim()} {tuple(tensor.shape[1:])}".encode()
    digest = hashlib.blake2b(kind, digest_size=7).digest()
    return [tensor.shape[0] if tensor.dim() else 1, int.from_bytes(digest, "little")]


def check_headers(headers: Sequence[Sequence[int]], tensor: Tensor, rank: int) -> None:
    """Refuse to gather tensors that differ in more than their first dimension; `ValueError`, the same on every rank."""
    others = [other for other, (_, kind) in enumerate(headers) if kind != headers[0][1]]
    if others:
        raise ValueError(
            f"gather: the tensors of ranks 0 and {others[0]} differ in dtype, number of dimensions or a dimension "
            f"after the first; only the first may differ. Rank {rank} gave {tuple(tensor.shape)} {tensor.dtype}"
        )
