"""Non-negative matrix factorisation: A (n, d) is nearly S M^T with codes S (n, r) >= 0 and a dictionary M (d, r) >= 0.

    min over S, M of (1/2) ||A - S M^T||^2 + (ridge/2) ||S||^2     s.t.  S >= 0,  M >= 0,  ||M_k|| = 1

One column of M after another is minimised over exactly, from the statistics Q = S^T S (r, r) and P = A^T S (d, r):

    M_k <- unit( max(0, Q_kk M_k + P_k - M Q_k) ),   k = 1..r

Source: Cichocki, Zdunek, Amari, "Hierarchical ALS algorithms for nonnegative matrix and 3D tensor factorization", ICA
2007 (HALS); Gillis, Glineur, arXiv:1107.5194 (several sweeps of one factor before the other).

Differs from the papers
1. The usual update, max(0, M_k + (P_k - M Q_k)/Q_kk), has this direction and a length of its own, which is then moved
   into S, Q and P. Within the unit sphere the update is the exact minimum at S as it is: Q and P stay true, and the
   objective falls also with a ridge, which that move of length would change.
2. Columns must have unit length at all: codes on a dictionary of unequal columns converge slowly.
3. A column that no code uses starts again at what the worst-fitted row lacks. Where a row is not met exactly at its
   optimal codes, max(0, a - s M^T) is not 0, and a new column in that direction lowers the row's error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..training import BadInput, stream
from .nnls import gram_and_cross, nnls, sweep

INNER = 3
"""Sweeps over one factor before the other is taken up."""
CHECK_EVERY = 10
"""Iterations between two looks at the objective."""
NOISE = 1e-2
"""Of the mean entry: added to the rows that a dictionary starts from, so that equal rows give different columns."""


@dataclass(frozen=True)
class Factorised:
    """A factorisation and how far it can be trusted.

    codes: S (n, r), exact for the dictionary; dictionary: M (d, r), unit columns; reason: empty where the objective
    had settled, else a sentence; iterations; history: (iterations,), the objective after each; relative_error:
    ||A - S M^T|| / ||A||, 0 where A is 0."""

    codes: Tensor
    dictionary: Tensor
    reason: str
    iterations: int
    history: Tensor
    relative_error: float

    @property
    def ok(self) -> bool:
        return not self.reason


def nmf(
    a: Tensor, rank: int, *, ridge: float = 0.0, seed: int = 0, tolerance: float = 1e-5, max_iterations: int = 1000
) -> Factorised:
    """Factorise all rows at once; the objective never rises but by rounding.

    a: (n, d), non-negative; rank: r, from 1 to d; ridge: on the codes, in the units of the unit columns (1e-3 is weak);
    seed: of the rows that the dictionary starts from. tolerance: stop when ten iterations lower the objective by less
    than this part of it. The minimum is a local one: take the best of several seeds where that matters. Raises BadInput
    for entries that are negative or not finite, and for a rank out of range."""
    refuse_rank(rank, a.shape[-1])
    if a.dim() != 2 or not bool((a >= 0).all() & a.isfinite().all()):
        raise BadInput(
            f"a factorisation needs a matrix of finite entries of at least 0, got shape {tuple(a.shape)} and entries "
            f"from {float(a.amin()) if a.numel() else 0.0:g}; clip or shift the data"
        )
    generator = stream(seed)
    dictionary = start_dictionary(a, rank, generator=generator)
    codes = nnls(a, dictionary, ridge=ridge, max_iterations=INNER, tolerance=1.0).x
    history: list[Tensor] = []
    reason = f"the objective was still falling at {max_iterations} iterations; raise max_iterations, or the tolerance"
    for number in range(1, max_iterations + 1):
        gram, cross = codes.T @ codes, a.T @ codes
        dictionary = revive(sweep_dictionary(dictionary, gram, cross), gram, a, codes, generator=generator)
        gram, cross = gram_and_cross(a, dictionary, ridge)
        for _ in range(INNER):
            codes = sweep(codes, gram, cross)
        history.append((a.square().sum() + ((codes @ gram - 2 * cross) * codes).sum()).clamp_min(0) / 2)
        if number % CHECK_EVERY == 0 and number > CHECK_EVERY:
            before, now = float(history[-1 - CHECK_EVERY]), float(history[-1])
            if not before - now > tolerance * before:
                reason = ""
                break
    codes = nnls(a, dictionary, ridge=ridge, start=codes).x
    return Factorised(codes, dictionary, reason, number, torch.stack(history), relative_error(a, codes, dictionary))


def sweep_dictionary(dictionary: Tensor, gram: Tensor, cross: Tensor, *, sweeps: int = INNER) -> Tensor:
    """The dictionary (d, r) after sweeps of the update at the top of this file: a new tensor.

    dictionary: unit columns, non-negative; gram: Q = S^T S (r, r); cross: P = A^T S (d, r), or sums of both over
    batches. A column that no code uses, or that the others make superfluous, stays. Never synchronises a device."""
    columns, targets = (matrix.T.clone(memory_format=torch.contiguous_format) for matrix in (dictionary, cross))
    others = gram - torch.diag(gram.diagonal())
    for k in [k for _ in range(sweeps) for k in range(len(gram))]:
        column = torch.addmv(targets[k], columns.T, others[:, k], alpha=-1).clamp_min_(0)
        length = torch.linalg.vector_norm(column)
        columns[k] = torch.where(length > 0, column / length, columns[k])
    return columns.T


def unit_columns(dictionary: Tensor) -> tuple[Tensor, Tensor]:
    """The dictionary with columns of length 1, and their lengths (r,); a column of zeros stays, with length 1.

    With S, Q and P multiplied by the lengths (Q on both sides) the product S M^T is what it was."""
    lengths = torch.linalg.vector_norm(dictionary, dim=0)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return dictionary / lengths, lengths


def dead(gram: Tensor, *, part: float = 0.0) -> Tensor:
    """Which factors (r,) no code uses: Q_kk is at most this part of the mean of Q's diagonal."""
    use = gram.diagonal()
    return use <= part * use.mean()


def revive(
    dictionary: Tensor, gram: Tensor, a: Tensor, codes: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """The dictionary with new columns for its dead factors, from rows a (n, d) and their codes (n, r).

    A new column is what one row lacks, max(0, a - s M^T): of the worst-fitted rows in turn, or with a generator (of the
    CPU) of rows drawn in proportion to their squared error. S M^T stays what it was, because the codes of a dead factor
    are 0. As many columns stay as there are not enough rows with an error."""
    places = dead(gram).nonzero()[:, 0]
    if not len(places):
        return dictionary
    missing = (a - codes @ dictionary.T).clamp_min(0)
    errors = missing.square().sum(1).cpu()
    count = min(len(places), int((errors > 0).sum()))
    if not count:
        return dictionary
    drawn = generator is not None
    rows = torch.multinomial(errors, count, generator=generator) if drawn else errors.topk(count).indices
    revived = dictionary.clone()
    revived[:, places[:count]] = unit_columns(missing[rows.to(a.device)].T)[0]
    return revived


def start_dictionary(a: Tensor, rank: int, *, generator: torch.Generator) -> Tensor:
    """Unit columns (d, rank) near rows of a (n, d) that point in different directions.

    Rows are drawn one after another in proportion to the square of what the best column so far leaves of them (the
    seeding of k-means++, for directions). A little noise tells equal rows apart; where all rows are 0 only noise is
    left. generator: of the CPU, on which this is worked out."""
    rows = a.detach().cpu()
    norms = torch.linalg.vector_norm(rows, dim=1)
    directions = rows / torch.where(norms > 0, norms, 1.0)[:, None]
    left, columns = norms.double().square(), []
    for _ in range(rank):
        if not bool(left.sum() > 0):
            left = norms.double().square()  # every direction is there already: take some twice
        if not bool(left.sum() > 0):
            columns.append(torch.zeros_like(rows[0]) if len(rows) else rows.new_zeros(rows.shape[1]))
            continue
        columns.append(directions[int(torch.multinomial(left, 1, generator=generator))])
        cosine = (directions @ columns[-1]).double()
        left = torch.minimum(left, norms.double().square() * (1 - cosine.square()).clamp_min(0))
    start = torch.stack(columns, 1)
    mean = start.mean()
    noise = torch.rand(start.shape, generator=generator, dtype=torch.float64).to(start.dtype)
    start = start + NOISE * torch.where(mean > 0, mean, 1.0) * noise
    return unit_columns(start)[0].to(a.device)


def relative_error(a: Tensor, codes: Tensor, dictionary: Tensor) -> float:
    """||A - S M^T|| / ||A||, 0 where A is 0."""
    norm = float(torch.linalg.vector_norm(a))
    return float(torch.linalg.vector_norm(a - codes @ dictionary.T)) / norm if norm > 0 else 0.0


def refuse_rank(rank: int, features: int) -> None:
    """Raise BadInput unless 1 <= rank <= features."""
    if rank < 1:
        raise BadInput(f"the rank of a factorisation must be at least 1, got {rank}; try a quarter of the features")
    if rank > features:
        raise BadInput(
            f"a rank of {rank} is more than the {features} features, so that every row would be its own code; "
            f"take a rank of at most {features}"
        )
