"""Heads that also keep what the rows were: a decoder beside a classifier, or beside a supervised contrast.

Source: Wang, Ni, Song, Yang, Huang: Revisiting Locally Supervised Learning, ICLR 2021 (InfoPro), whose local loss is
lambda_1 reconstruction + lambda_2 (cross-entropy or supervised contrast), both linear in depth. Here the reconstruction
is the mean squared error of the rows, standardised over the mini-batch, so that it has one scale for all data; the
contrast is that of Khosla et al., arXiv:2004.11362, equation 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...losses import Loss
from ...training import Batch, CannotTrain

CHANNELS = 12
"""Of the decoder, as in the source."""

TEMPERATURE = 0.1


class Reconstructing(nn.Module):
    """Outputs of `classifier`, and rows from `decoder`; weights: of the reconstruction and of the user's loss."""

    def __init__(self, classifier: nn.Module, decoder: nn.Module, reconstruct: float, supervise: float) -> None:
        super().__init__()
        self.classifier, self.decoder = classifier, decoder
        self.reconstruct, self.supervise = reconstruct, supervise

    def forward(self, h: Tensor) -> Tensor:
        outputs: Tensor = self.classifier(h)
        return outputs

    def charge(self, h: Tensor, batch: Batch, objective: Loss) -> Tensor:
        """The local loss, 0-d."""
        return self.supervise * self._supervised(h, batch, objective) + self.reconstruct * self._lost(h, batch.x)

    def _supervised(self, h: Tensor, batch: Batch, objective: Loss) -> Tensor:
        return objective(self.classifier(h), batch.y)

    def _lost(self, h: Tensor, x: Tensor) -> Tensor:
        """The mean squared error of the rows, in units of their variance over the mini-batch."""
        rows = x.detach().to(h.dtype).flatten(1)
        spread, mean = torch.var_mean(rows, 0, correction=0)
        target = (rows - mean) / (spread.sqrt() + 1e-6 * (1 + mean.abs()))
        found: Tensor = self.decoder(h)
        return F.mse_loss(found.flatten(1), target)


class Contrast(Reconstructing):
    """The classifier's place is taken by a projection, (n, width): rows of a class are to be near each other in it."""

    def _supervised(self, h: Tensor, batch: Batch, objective: Loss) -> Tensor:
        if batch.y.is_floating_point():
            raise CannotTrain(
                "heads contrastive compare rows of the same class, and these targets are numbers; take heads infopro"
            )
        z = F.normalize(self.classifier(h), dim=1)
        if len(z) == 1:
            return z.sum() * 0
        likeness = z @ z.T / TEMPERATURE
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        logs = likeness - torch.logsumexp(likeness.masked_fill(~others, -torch.inf), 1, keepdim=True)
        alike = (batch.y[:, None] == batch.y[None]) & others
        several = alike.sum(1)
        each = -torch.where(alike, logs, 0.0).sum(1) / several.clamp_min(1)
        return each.sum() / (several > 0).sum().clamp_min(1)


def decoder(h: Tensor, x: Tensor, side: int) -> nn.Module:
    """Rows like x (1, ...) from what a block gives, h (1, ...); pictures are pooled to at most `side` places a side."""
    size = x.flatten(1).shape[1]
    if h.dim() != 4:
        return nn.Sequential(nn.Flatten(), nn.Linear(h.numel(), size))
    if x.dim() == 4:
        return nn.Sequential(
            nn.Upsample(size=tuple(x.shape[-2:]), mode="bilinear"),
            nn.Conv2d(h.shape[1], CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, x.shape[1], 3, padding=1),
        )
    height, width = (min(side, int(places)) for places in h.shape[-2:])
    return nn.Sequential(
        nn.AdaptiveAvgPool2d((height, width)),
        nn.Conv2d(h.shape[1], CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(CHANNELS * height * width, size),
    )
