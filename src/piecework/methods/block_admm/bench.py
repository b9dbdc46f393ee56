"""What the orders work with: the blocks of this rank and their surroundings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...group import Group
from ...losses import Loss
from ..blocks import Block
from .neighbours import Neighbours
from .sweep import Penalties

if TYPE_CHECKING:
    from . import BlockADMM


@dataclass(frozen=True)
class Bench:
    """loss: the user's, which is reported; that which is trained on is among the penalties."""

    recipe: BlockADMM
    blocks: Sequence[Block]
    penalties: Penalties
    neighbours: Neighbours
    loss: Loss
    group: Group

    def probing(self, step: int) -> bool:
        """Whether this step is compared with the true gradient."""
        return self.recipe.probe_every > 0 and step % self.recipe.probe_every == 0
