"""Steps on sampled rows with momentum (SPRING: Goldshlager, Abrahamsen, Lin, arXiv 2401.10190, equations 14 and 15).

    phi_t = mu phi_{t-1} + J^T (K + damping I)^-1 (s - mu J phi_{t-1})
    theta <- theta - lr_t phi_t / (1 - mu^{2t})^(1/2)

phi_t is the minimum of |J phi - s|^2 + damping |phi - mu phi_{t-1}|^2 over the sampled rows.

Differs from the paper
1. The damping is relative to the mean diagonal of K of each sample, so that a smaller last one is treated alike.
2. Without momentum, the default, large steps are possible: the rate starts at 1 and falls linearly.
"""

from __future__ import annotations

from torch import Tensor

from ...batches import MiniBatches
from ...group import Group
from ...training import BadInput, Batch


class Sampler:
    """This rank's part of the rows of each step: mini-batches without replacement, in an order of its own."""

    def __init__(self, batch: Batch, total: int, group: Group, *, rows: int, outputs: int, seed: int) -> None:
        if rows < outputs:
            raise BadInput(
                f"gauss-newton: sample_rows={rows} is fewer rows than the network has outputs ({outputs}): no step "
                "would see every class; raise it"
            )
        self.batch = batch
        own = max(1, round(rows * len(batch) / max(1, total)))
        self._mini = (
            MiniBatches(batch, data="same", rank=0, size=1, batch_size=own, seed=seed + 7919 * group.rank)
            if len(batch)
            else None
        )

    def rows(self, step: int) -> Batch:
        """Of step 0, 1, ..."""
        return self.batch if self._mini is None else self._mini.batch(step)


def rate(step: int, lr: float, steps: int | None) -> float:
    """lr_t of step 0, 1, ...: constant, or falling linearly to nothing over `steps`."""
    return lr if steps is None else lr * max(0.0, 1 - step / steps)


def averaged(phi: Tensor, momentum: float, step: int) -> Tensor:
    """phi without the bias of its start at 0; step counts from 1."""
    return phi / (1 - momentum ** (2 * step)) ** 0.5 if momentum else phi
