"""Sorting as a layer: its proximal step is an isotonic regression a row, all rows in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .price import Price


def sort(v: Tensor, price: Price, beta_in: float) -> Tensor:
    """Of sorting each row upwards, v (n, d): exact, O(n d log d).

    The best a has the order of v (rearrangement inequality). In that order the output is a itself, so that the cost is
    a squared distance to the minimiser without constraint, and the nearest non-decreasing row is its isotonic
    regression."""
    ordered, order = v.sort(1)
    return torch.empty_like(v).scatter_(1, order, isotonic(price.minimiser(ordered, beta_in)))


def isotonic(t: Tensor) -> Tensor:
    """(n, d) the nearest row without a fall, row by row, by pooling adjacent violators (Ayer et al. 1955).

    The rows are laid end to end, each raised above the one before, so that no pool spans two rows and one call of the
    compiled routine of scikit-learn does them all. What was raised serves to find the pools only: their means are taken
    from the rows as given. Runs on the CPU; a tensor elsewhere is copied there and back."""
    from sklearn.isotonic import isotonic_regression  # here, because importing it takes long

    n, d = t.shape
    if n == 0 or d < 2:
        return t.clone()
    rows = t.detach().to("cpu", torch.float64)
    least, most = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    spread = (most - least).amax() * 1.5  # between one row's most and the next one's least lies half a spread
    raised = rows - least + spread * torch.arange(n, dtype=torch.float64)[:, None]
    fitted = torch.from_numpy(isotonic_regression(raised.flatten().numpy())).view(n, d)
    starts = torch.ones(n, d, dtype=torch.long)
    starts[:, 1:] = fitted[:, 1:] != fitted[:, :-1]
    pool = starts.flatten().cumsum(0) - 1
    means = torch.bincount(pool, rows.flatten()) / torch.bincount(pool)
    return means[pool].view(n, d).to(t)
