"""Means and spreads over the training rows, in one pass and tile by tile, so that a mapped file is never held."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..training import BadInput
from .checks import column, tiles, width
from .source import Array


def moments(x: Array) -> tuple[Array, Array]:
    """Mean and standard deviation (divided by n) of each column, in float64.

    x: (n, ...) numbers; returns two (d,) arrays. The sums are of values counted from the first row, and tiles are
    merged by their means and squares (Chan, Golub and LeVeque, 1983), so that a large offset costs no digits and a
    constant column has a deviation of exactly 0."""
    d = width(x)
    first = np.asarray(x[0], dtype=np.float64).reshape(d)
    count, mean, squares = 0, np.zeros(d), np.zeros(d)
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in tiles(len(x), d):
            tile = np.asarray(x[rows]).reshape(rows.stop - rows.start, d).astype(np.float64)
            tile -= first
            own = tile.mean(axis=0)
            tile -= own
            total = count + len(tile)
            step = own - mean
            squares += np.einsum("ij,ij->j", tile, tile) + step * step * (count * len(tile) / total)
            mean += step * (len(tile) / total)
            count = total
        return first + mean, np.sqrt(squares / count)


def feature_scaling(
    x: Array, dtype: torch.dtype, where: str, *, names: Sequence[str] = (), white: float | None = None
) -> tuple[Tensor, Tensor]:
    """What the network's first layer subtracts and divides by: (mean, scale), both (d,) in `dtype`.

    x: the training rows as they were read. A constant column has scale 1, as has one that varies by rounding errors
    only; `white` is the one scale of pictures. Raises BadInput for a column that `dtype` cannot tell apart from its
    mean, or whose spread it cannot hold."""
    mean, spread = moments(x)
    kind = torch.finfo(dtype)
    if white is not None:
        return torch.from_numpy(mean).to(dtype), torch.full((mean.size,), white, dtype=dtype)
    if x.dtype.kind == "f" and x.dtype.itemsize >= 8:
        spread[spread <= 10 * np.finfo(np.float64).eps * np.abs(mean)] = 0
    narrowed = not np.can_cast(x.dtype, np.float64 if dtype == torch.float64 else np.float32)
    for j in np.flatnonzero((spread > 0) & (spread < 10 * kind.eps * np.abs(mean))) if narrowed else ():
        raise BadInput(
            f"{where}: {column(int(j), names)} varies by {spread[j]:.3g} around {mean[j]:.6g}, too little for "
            f"{str(dtype).removeprefix('torch.')}; subtract an offset from it or take dtype float64 (--dtype float64)"
        )
    for j in np.flatnonzero(~(np.isfinite(spread) & (spread <= kind.max) & (np.abs(mean) <= kind.max))):
        raise BadInput(f"{where}: {column(int(j), names)} has values too far apart to be standardised; rescale it")
    spread[spread < kind.tiny] = 1  # the reciprocal of anything smaller is not finite
    return torch.from_numpy(mean).to(dtype), torch.from_numpy(spread).to(dtype)


def target_scaling(y: Array, where: str) -> tuple[Array, Array]:
    """(mean, scale), both (k,) float64, of the training targets (n, k). Raises BadInput if one never varies."""
    mean, spread = moments(y)
    for j in np.flatnonzero(~(spread > 10 * np.finfo(np.float64).eps * np.abs(mean))):
        output = f" {int(j)}" if len(spread) > 1 else ""
        raise BadInput(f"{where}: target{output} is {mean[j]:g} in every training row, there is nothing to learn")
    if not (np.isfinite(mean).all() and np.isfinite(spread).all()):
        raise BadInput(f"{where}: the targets are too far apart to be standardised; rescale them")
    return mean, spread


def standardised(y: Array, mean: Array, scale: Array, dtype: torch.dtype) -> Tensor:
    """(y - mean) / scale as an (n, k) tensor in `dtype`, made tile by tile from numbers of any type."""
    out = torch.empty((len(y), len(mean)), dtype=dtype)
    for rows in tiles(len(y), len(mean)):
        tile = np.asarray(y[rows]).reshape(rows.stop - rows.start, -1).astype(np.float64)
        out[rows] = torch.from_numpy((tile - mean) / scale).to(dtype)
    return out
