"""The networks that end at a block: what it gives, judged by its head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from ...training import BadInput
from .heads import judges


def exits_of(
    parts: Sequence[nn.Module], heads: Mapping[int, nn.Module], used: Sequence[bool], *, every: bool
) -> list[nn.Sequential]:
    """Copies of the networks up to each block, `nn.Sequential(blocks, head)`; they share their blocks."""
    found: list[nn.Module] = []
    for number in range(len(parts)):
        last = number == len(parts) - 1
        if not last and (number not in heads or not (used[number] or every)):
            raise BadInput(
                f"the head of block {number} rests, because no block learns from its loss; train it all the same with "
                "every_head=True"
            )
        if not last and not judges(heads[number]):
            raise BadInput(
                f"the head of block {number} tells rows apart and gives no outputs; train with heads infopro, or "
                "another kind than contrastive"
            )
        body = nn.Sequential(*parts[: number + 1])
        found.append(nn.Sequential(body, nn.Identity() if last else heads[number]))
    copies = copy.deepcopy(nn.ModuleList(found)).eval()
    return [one for one in copies if isinstance(one, nn.Sequential)]
