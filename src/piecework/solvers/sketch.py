"""Sketches: rows of a Jacobian times a random matrix, so that few columns stand for many.

van den Brand, Peng, Song, Weinstein, "Training (Overparametrized) Neural Networks in Near-Linear Time", ITCS 2021,
arXiv 2006.11648, section on fast regression, asks for a subspace embedding S of the columns of J^T. Given rows x_i of J
(or of the part of J that belongs to one layer), a sketch returns Y with rows x_i S^T, and

  E[Y Y^T] = J J^T,    Y Y^T ~ J J^T   as soon as there are a few times more columns in Y than rows in J.

Kinds: CountSketch (Charikar, Chen, Farach-Colton 2002; Clarkson and Woodruff 2013), sparse signs in the block form of
OSNAP (Nelson and Nguyen, arXiv 1211.1002), the subsampled randomised Hadamard transform (Tropp, arXiv 1011.1595),
TensorSketch (Pham and Pagh 2013) and its Hadamard relative for rows that are outer products, and a sample of hidden
units.

S depends on the seed and on the widths alone, never on how many rows are given: row tiles of one matrix, and the
shards of several ranks, agree. Layers whose sketches are added need a seed each, or their products do not cancel. All
work in float32 or float64, on the device of the rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..training import BadInput, stream

DEAD = 1e-30
"""Of the largest squared norm: units below this are left out, since their weights would not be finite."""

RADIX = 64
"""The widest factor of a Hadamard transform."""


def count(rows: Tensor, num: int, seed: int) -> Tensor:
    """CountSketch: each of the p columns is added to or subtracted from one of `num` columns; (b, p) -> (b, num).

    One multiply-add for each entry of the rows. BadInput for rows that are not a float32 or float64 matrix."""
    return sparse_sign(rows, num, seed, nonzeros=1)


def sparse_sign(rows: Tensor, num: int, seed: int, nonzeros: int = 8) -> Tensor:
    """Each of the p columns goes to `nonzeros` of `num` columns with +-1/sqrt(nonzeros); (b, p) -> (b, num).

    The columns are cut into `nonzeros` equal groups with one entry in each (OSNAP's block construction), so that the
    entries of a coordinate never meet; at most `num` of them are used."""
    _check(rows, num)
    if nonzeros < 1:
        raise BadInput(f"sparse signs need at least one entry a coordinate, got nonzeros={nonzeros}; 8 is usual")
    nonzeros = min(nonzeros, num)
    width = rows.shape[1]
    generator = stream(seed)
    widths = _parts(num, nonzeros)
    starts = torch.tensor([sum(widths[:k]) for k in range(nonzeros)])
    # One draw of fractions serves groups of different widths.
    bucket = starts + (
        torch.rand(width, nonzeros, generator=generator, dtype=torch.float64) * torch.tensor(widths)
    ).long().clamp_max(torch.tensor(widths) - 1)
    sign = _signs(width * nonzeros, generator, rows) / math.sqrt(nonzeros)
    column = torch.arange(width).repeat_interleave(nonzeros)
    place = torch.stack([bucket.reshape(-1), column]).to(rows.device)
    # A sparse product is three to five times faster here than index_add_ along columns.
    transform = torch.sparse_coo_tensor(place, sign, (num, width), check_invariants=False)
    transposed: Tensor = torch.sparse.mm(transform, rows.t())
    return transposed.t()


def srht(rows: Tensor, num: int, seed: int) -> Tensor:
    """Subsampled randomised Hadamard transform, sqrt(q / num) P (H / sqrt q) D; (b, p) -> (b, num).

    D: random signs; H: the Hadamard matrix of q columns, q the least power of two that is no less than p and num
    (zeros fill the rows up); P: `num` of the q columns, without replacement. q log2 q additions a row; with num = q
    it is an isometry."""
    _check(rows, num)
    size = _power_of_two(max(rows.shape[1], num))
    generator = stream(seed)
    signed = rows * _signs(rows.shape[1], generator, rows)
    chosen = _distinct(size, num, generator).to(rows.device)
    return hadamard(signed, size)[:, chosen] / math.sqrt(num)


def tensorsketch(a: Tensor, d: Tensor, num: int, seed: int, copies: int = 4) -> Tensor:
    """TensorSketch of the outer products d_i a_i^T without forming them; (b, wa), (b, wd) -> (b, num).

    A CountSketch of either factor, and their circular convolution by FFT: a CountSketch of the product whose hash is
    the sum of two. `copies` independent ones of num / copies columns stand side by side, scaled by 1/sqrt(copies):
    with one, collisions of whole rows and columns of the outer product make the embedding worse. About
    copies (wa + wd) + 7.5 num log2(num / copies) operations a row."""
    _check(a, num)
    _check(d, num)
    _check_pair(a, d)
    if copies < 1:
        raise BadInput(f"TensorSketch needs at least one copy, got copies={copies}; 4 is usual")
    if not len(a):
        return a.new_zeros(0, num)  # the FFT takes no empty batch
    copies = min(copies, num)
    found = []
    for copy, width in enumerate(_parts(num, copies)):
        left, right = (torch.fft.rfft(_counted(x, width, stream(seed, copy, side))) for side, x in enumerate((a, d)))
        found.append(torch.fft.irfft(left * right, n=width))
    return torch.cat(found, 1) / math.sqrt(copies)


def _counted(rows: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """A CountSketch from a generator: the factors are narrow, so index_add_ is as good as a sparse product."""
    width = rows.shape[1]
    bucket = torch.randint(num, (width,), generator=generator).to(rows.device)
    signed = rows * _signs(width, generator, rows)
    return rows.new_zeros(len(rows), num).index_add_(1, bucket, signed)


def tensor_srht(a: Tensor, d: Tensor, num: int, seed: int) -> Tensor:
    """(1/sqrt num) (P1 H D1 a) o (P2 H D2 d), Hadamard transforms of the factors; (b, wa), (b, wd) -> (b, num).

    The pairs of columns (P1, P2) are drawn without replacement; after the two transforms a column costs one
    multiplication a row. Where there are no `num` pairs, `a` is filled up with zeros."""
    _check(a, num)
    _check(d, num)
    _check_pair(a, d)
    right = _power_of_two(d.shape[1])
    left = _power_of_two(max(a.shape[1], -(-num // right)))
    generator = stream(seed)
    a = hadamard(a * _signs(a.shape[1], generator, a), left)
    d = hadamard(d * _signs(d.shape[1], generator, d), right)
    pair = _distinct(left * right, num, generator).to(a.device)
    return a[:, pair // right] * d[:, pair % right] / math.sqrt(num)


def sample_units(square_norms: Tensor, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden units j and weights so that the weighted sum over the sample of x_j x_j^T is unbiased for the whole sum.

    square_norms: (w,) |x_j|^2, over all samples and ranks; returns index (k,) ascending, int64, and weight (k,) in the
    dtype of the norms. k is num, or less where fewer units have a norm above 0; num >= w gives all with weight 1.

    Unit j is in the sample with probability pi_j = min(1, c |x_j|^2), c such that they sum to num, and then has weight
    1/pi_j: without replacement, so no draw is wasted on a unit that is there already, and units too large to be left
    to chance are always there. Units are placed on a line in random order, each as long as its pi_j, and those under a
    comb of spacing 1 are taken (randomised systematic sampling; Hartley and Rao 1962). The size of the sample is then
    fixed, and so is its trace: each chance unit brings |x_j|^2 / pi_j = 1/c. Independent draws (Poisson sampling)
    leave both to chance, and draws with replacement repeat the large units. With equal norms this is a uniform sample
    without replacement."""
    if square_norms.dim() != 1 or not square_norms.is_floating_point() or num < 1:
        raise BadInput(
            f"units are sampled by their squared norms, a vector, and at least one is; got a tensor of shape "
            f"{tuple(square_norms.shape)} and num={num}"
        )
    width = len(square_norms)
    if num >= width:
        return torch.arange(width, device=square_norms.device), torch.ones_like(square_norms)
    norms = square_norms.detach().double().cpu()
    if not bool(torch.isfinite(norms).all()) or not bool((norms > 0).any()):
        norms = torch.ones(width, dtype=torch.float64)  # no norms to go by: the solve says what is not finite
    norms = norms / norms.max()
    chance = _inclusion(torch.where(norms > DEAD, norms, 0.0), num)
    generator = stream(seed)
    order = torch.randperm(width, generator=generator)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    certain = chance >= 1
    lengths = torch.where(certain, 0.0, chance)[order].cumsum(0)
    teeth = torch.floor(lengths - offset)
    before = torch.cat([torch.floor(-offset).reshape(1), teeth[:-1]])
    drawn = torch.zeros(width, dtype=torch.bool)
    drawn[order] = teeth > before
    index = torch.nonzero(drawn | certain).reshape(-1)
    weight = (1 / chance[index]).to(square_norms.dtype)
    return index.to(square_norms.device), weight.to(square_norms.device)


def _inclusion(norms: Tensor, num: int) -> Tensor:
    """min(1, c norms) with c such that the sum is num, or 1 for all units above 0 where there are no more than num."""
    if int((norms > 0).sum()) <= num:
        return (norms > 0).double()
    descending = norms.sort(descending=True).values
    tail = descending.flip(0).cumsum(0).flip(0)
    # With the k largest certain, the others share num - k; the first k for which none of them exceeds 1 is right.
    left = num - torch.arange(len(norms), dtype=torch.float64)
    fits = (left > 0) & (descending * left <= tail * (1 + 1e-12))
    certain = int(torch.nonzero(fits)[0])
    scaled = norms * ((num - certain) / tail[certain])
    if certain:
        scaled = torch.where(norms >= descending[certain - 1], 1.0, scaled)
    return scaled.clamp_max(1.0)


def hadamard(rows: Tensor, size: int) -> Tensor:
    """Rows, filled up with zeros, times the Hadamard matrix of +-1 in Sylvester's order; (b, p) -> (b, size).

    size: a power of two, at least p."""
    x = torch.nn.functional.pad(rows, (0, size - rows.shape[1]))
    left = size
    while left > 1:  # a matrix product for each factor of up to 64: fewer passes over memory than one for each of 2
        radix = min(RADIX, left)
        left //= radix
        factor = _sylvester(radix).to(x)
        x = factor @ x.reshape(-1, radix, left) if left > 1 else x.reshape(-1, radix) @ factor
    return x.reshape(len(rows), size)


def _sylvester(size: int) -> Tensor:
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), found)
    return found


def _signs(num: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return (torch.randint(2, (num,), generator=generator) * 2 - 1).to(like)


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


def _parts(num: int, parts: int) -> list[int]:
    """num as a sum of `parts` numbers that differ by 1 at most."""
    return [num // parts + (k < num % parts) for k in range(parts)]


def _distinct(population: int, num: int, generator: torch.Generator) -> Tensor:
    """(num,) different numbers below `population`, uniformly. Does not list the population where it is large."""
    if population <= 8 * num:
        return torch.randperm(population, generator=generator)[:num]
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < num:
        more = torch.randint(population, (num + num // 4 + 8,), generator=generator)
        found = torch.unique(torch.cat([found, more]))
    return found[torch.randperm(len(found), generator=generator)[:num]]


def _check(rows: Tensor, num: int) -> None:
    if rows.dim() != 2 or rows.dtype not in (torch.float32, torch.float64) or rows.shape[1] < 1 or num < 1:
        raise BadInput(
            f"a sketch takes a matrix in float32 or float64 with at least one column to at least one column; got "
            f"{rows.dtype} of shape {tuple(rows.shape)} and num={num}"
        )


def _check_pair(a: Tensor, d: Tensor) -> None:
    if len(a) != len(d) or a.dtype != d.dtype:
        raise BadInput(
            f"the factors of outer products have a row each for every sample, in one dtype; got {len(a)} rows in "
            f"{a.dtype} and {len(d)} rows in {d.dtype}"
        )
