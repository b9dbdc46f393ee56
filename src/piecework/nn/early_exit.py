"""Inference that stops at the first exit that is sure of itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EarlyExit(nn.Module):
    """Passes rows through blocks, and each row leaves at the first head that is confident enough of it.

    exits: networks for the blocks, each `nn.Sequential(blocks, head)` with one block more than the one before, as
        `exits()` of a training by `Local` gives them; the last takes all rows that are left.
    threshold: in [0, 1]; the least probability of the decided class, by softmax, or by the logistic function where
        there is one output. For sequences it is that of the least certain token. 0 leaves at once, above 1 never.

    Raises ValueError for networks that do not continue each other."""

    def __init__(self, exits: Sequence[nn.Module], threshold: float = 0.9) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for number, one in enumerate(exits):
            body = one[0] if isinstance(one, nn.Sequential) and len(one) == 2 else None
            if not isinstance(body, nn.Sequential) or len(body) != number + 1:
                raise ValueError(
                    f"exit {number} must be nn.Sequential(blocks, head) of {number + 1} blocks, as exits() gives them"
                )
            steps.append(body[number])
        if not steps:
            raise ValueError("EarlyExit needs one exit or more, and was given none")
        self.blocks = nn.ModuleList(steps)
        self.heads = nn.ModuleList([one[1] for one in exits if isinstance(one, nn.Sequential)])
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """(n, k) outputs, of whichever exit each row took."""
        return self.route(x)[0]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(outputs (n, k), the number of the exit that each row took (n,) int64). Reads the device once a block."""
        rows, h = torch.arange(len(x), device=x.device), x
        taken = torch.full((len(x),), len(self.blocks) - 1, device=x.device)
        found: Tensor | None = None
        for number, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            h = block(h)
            z = head(h)
            if found is None:
                found = z.new_empty((len(x), *z.shape[1:]))
            last = number == len(self.blocks) - 1
            sure = torch.ones_like(rows, dtype=torch.bool) if last else self._confidence(z) >= self.threshold
            found[rows[sure]], taken[rows[sure]] = z[sure], number
            if bool(sure.all()):
                break
            rows, h = rows[~sure], h[~sure]
        assert found is not None
        return found, taken

    @staticmethod
    def _confidence(z: Tensor) -> Tensor:
        """(n,) the probability of the decided class."""
        if z.shape[-1] == 1:
            return torch.sigmoid(z.abs()).flatten(1).amin(1)
        return torch.softmax(z, -1).amax(-1).reshape(len(z), -1).amin(1)
