"""What travels: the step, the weight, and a share of the numerators, as one run of bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ranks.mailbox import Letter

_HEAD = struct.Struct("<qd")
_ALIGN = 64


@dataclass
class Mass:
    """A part of a rank's mass on its way: the step in which it was sent, its weight, and where its numerators are."""

    source: int
    step: int
    weight: float
    letter: Letter

    def order(self) -> tuple[int, int]:
        """Where it stands in sums, whenever it arrived."""
        return self.step, self.source


class Layout:
    """Where tensors lie in a message: a header, then the tensors of each dtype end to end, in the dtype of the wire.

    wire: None for the tensors' own dtypes; a narrower one is used for float32 and wider."""

    def __init__(self, tensors: Sequence[Tensor], wire: torch.dtype | None = None) -> None:
        kinds = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        self._members = [[tensor for tensor in tensors if tensor.dtype == kind] for kind in kinds]
        self._sizes = [sum(tensor.numel() for tensor in same) for same in self._members]
        self._kinds = [wire if wire is not None and kind.itemsize > wire.itemsize else kind for kind in kinds]
        self._starts, end = [], _ALIGN
        for size, kind in zip(self._sizes, self._kinds, strict=True):
            self._starts.append(end)
            end += -(-size * kind.itemsize // _ALIGN) * _ALIGN
        self.length = end
        """Bytes of a message."""

    @property
    def rounds(self) -> bool:
        """Whether the wire holds fewer digits than the tensors."""
        return any(same[0].dtype != kind for same, kind in zip(self._members, self._kinds, strict=True))

    def write(self, content: Tensor, step: int, weight: float, share: float) -> None:
        """Fill a message with a share of the tensors. weight: of that share already."""
        self.write_head(content, step, weight)
        for flat, same in zip(self.vectors(content), self._members, strict=True):
            if flat.dtype == same[0].dtype and flat.device == same[0].device:
                torch.cat([tensor.detach().reshape(-1) for tensor in same], out=flat)
                flat.mul_(share)
            else:
                flat.copy_(torch.cat([tensor.detach().reshape(-1) for tensor in same]).mul_(share))

    def write_head(self, content: Tensor, step: int, weight: float) -> int:
        """The header alone; returns its bytes, for a message that has nothing else."""
        _HEAD.pack_into(content[:_ALIGN].numpy().data, 0, step, weight)
        return _ALIGN

    def read(self, letter: Letter) -> Mass:
        """A letter as mass."""
        step, weight = _HEAD.unpack_from(letter.content[:_ALIGN].numpy().data, 0)
        return Mass(letter.peer, step, weight, letter)

    def vectors(self, content: Tensor) -> list[Tensor]:
        """The numerators in a message: a vector of each dtype, in the wire's."""
        return [
            content[start : start + size * kind.itemsize].view(kind)
            for start, size, kind in zip(self._starts, self._sizes, self._kinds, strict=True)
        ]

    @torch.no_grad()
    def add_to_tensors(self, content: Tensor, factor: float) -> None:
        """tensors += factor * what the message holds."""
        for flat, same in zip(self.vectors(content), self._members, strict=True):
            own = flat.to(same[0].device, same[0].dtype)
            parts = torch.split(own, [tensor.numel() for tensor in same])
            views = [part.view(tensor.shape) for part, tensor in zip(parts, same, strict=True)]
            torch._foreach_add_([tensor.detach() for tensor in same], views, alpha=factor)
