"""What each way of solving would cost: operations over measured rates, bytes over bandwidth, and memory.

N rows of n = N / C samples, P parameters, d the effective dimension tr K (K + damping I)^-1. The structured Gram matrix
is N^2 Sigma operations, Cholesky N^3/3, QR of tiles 2 N P^2, a product with K 4 n P + 4 N Sigma from factors or 8 n P
without. How many iterations conjugate gradients take is a guess until they have been run once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from ...solvers.precondition import MOST_RANK

Solver = Literal["exact", "qr", "cholesky", "cg", "rpchol", "nystrom", "sketch", "kfac"]

REFERENCE = {"gemm32": 1.0, "gemm64": 0.5, "skinny32": 0.5, "skinny64": 0.2, "cholesky64": 0.2, "qr64": 0.17}
"""Rates in units of the square float32 product, as two cores of a common processor have them."""
SCALE = 1.8e11
"""Operations a second of the reference's square float32 product."""
SAME_KIND = 4.0
"""A measured ratio within this factor of its reference counts as the reference: noise must not decide between solvers,
a processor with slow float64 must."""
CHOLESKY_OF_GEMM = 0.5
"""The rate of a float32 Cholesky factorisation, in units of that of a product."""
QR_OF_GEMM = 0.5
"""The rate of a float32 QR factorisation, in the same unit."""
SVD_OF_QR = 0.6
"""The rate of a singular value decomposition, 20 q^3 operations, in units of that of QR."""
DAMPED_QR = 3.3
"""Operations of QR of two stacked triangles, in units of P^3."""
PASSES = 12.0
"""Over a matrix of N^2 numbers, while it is made and factored: sums of layers, fresh memory, triangles."""
LOOKS = 2.8
"""Eigenvalues of a growing factor, in units of the last look."""
OVERHEAD = 4e-4
"""Seconds of an iteration beside its operations: some tens of small calls."""
PILOT_ROWS = 2048
"""Rows from which the effective dimension is guessed, about: enough for what some columns show."""
MOST_NYSTROM = 512
"""Rank of a Nystrom preconditioner: each is a product."""
PRECONDITIONED = 12.0
"""Iterations with a low-rank preconditioner of twice the effective dimension, to a tolerance of a hundredth."""
EIGH = 9.0
"""Operations of a symmetric eigenvalue decomposition with vectors, in units of the cube of its size."""
KRONECKER = 14.0
"""Iterations with Kronecker factors to a tolerance of a hundredth, at most dampings (4 to 37 were seen); where few
directions count, by the root of their part more: the factors know averages alone."""
PLAIN = 1.0
"""Iterations to a tolerance of a hundredth without a preconditioner, in units of the root of the condition."""
SKETCHES = ((4.0, 22.0), (8.0, 14.0), (16.0, 10.0))
"""Columns of a sketch of sampled units for each row (units times their inputs), and the iterations to a tolerance of a
hundredth that they leave."""


@dataclass(frozen=True)
class Shape:
    """What the costs depend on. rows: N; columns: P; outputs: C; width: Sigma of `Jacobian.width`; factors: whether
    every layer has factors; double: whether the model is float64; single: whether K may be float32; inputs: of the
    layer with most parameters, 0 where no layer has factors; dense: whether the sketch is of all of J, not of sampled
    units; per_row: its columns for each row, 0 where they are chosen; dimension: d; condition: (largest eigenvalue of
    K + damping) / damping; loose, tight: relative residuals to which conjugate gradients go without and with a
    preconditioner (kfac is counted as going to the second, though it stops at the first: its residual says less)."""

    rows: int
    columns: int
    outputs: int
    width: int
    factors: bool
    double: bool
    single: bool
    inputs: int
    dense: bool
    per_row: float
    dimension: float
    condition: float
    loose: float
    tight: float


@dataclass(frozen=True)
class Estimate:
    """Of one solve: seconds, bytes beside the factors, and the iterations that were counted on (0: direct)."""

    solver: Solver
    seconds: float
    bytes: float
    iterations: float


@dataclass(frozen=True)
class Rates:
    """Operations a second of each kind, and bytes a second."""

    gemm32: float
    gemm64: float
    skinny32: float
    skinny64: float
    cholesky64: float
    qr64: float
    bandwidth: float = 1e10

    def snapped(self) -> Rates:
        """The rates by which solvers are compared: those of the reference machine, except that a ratio which is not of
        its kind becomes the nearest power of that factor. So two runs on one machine choose alike."""
        found = {}
        for name, usual in REFERENCE.items():
            ratio = getattr(self, name) / self.gemm32 / usual
            powers = math.log(ratio, SAME_KIND)
            found[name] = SCALE * usual * SAME_KIND ** (round(powers) if abs(powers) >= 1 else 0)
        return replace(self, **found)


@lru_cache(maxsize=8)
def measured(device: str, num_threads: int) -> Rates:
    """Rates of this machine, measured once in a process: some tenths of a second. `num_threads` is part of the key."""
    del num_threads
    where = torch.device(device)

    def matrix(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
        found = torch.arange(m * n, dtype=torch.float64).remainder_(97.0).sub_(48.0).div_(48.0)
        return found.view(m, n).to(where, dtype)

    def rate(operations: float, run: Callable[[], object]) -> float:
        best = math.inf
        for _ in range(3):
            began = time.perf_counter()
            run()
            if where.type != "cpu":
                torch.accelerator.synchronize(where)
            best = min(best, time.perf_counter() - began)
        return operations / max(best, 1e-9)

    found: dict[str, float] = {}
    for bits, dtype in (("32", torch.float32), ("64", torch.float64)):
        a, tall, narrow = matrix(768, 768, dtype), matrix(4096, 64, dtype), matrix(64, 64, dtype)

        def product(tall: torch.Tensor = tall, narrow: torch.Tensor = narrow) -> torch.Tensor:
            """As with the factors of a layer: J w, then J^T of it."""
            v = ((tall @ narrow) * tall).sum(1)
            return (tall * v[:, None]).t() @ tall

        found["gemm" + bits] = rate(2 * 768**3, lambda a=a: a @ a)  # type: ignore[misc]
        found["skinny" + bits] = rate(4 * 4096 * 64 * 64, product)
    a = matrix(768, 768, torch.float64)
    definite = a @ a.t() + 1e3 * torch.eye(768, dtype=a.dtype, device=where)
    found["cholesky64"] = rate(768**3 / 3, lambda: torch.linalg.cholesky_ex(definite))
    rows = matrix(1024, 256, torch.float64)
    found["qr64"] = rate(2 * 1024 * 256**2, lambda: torch.linalg.qr(rows, mode="r"))
    return Rates(**found)


def estimates(shape: Shape, rates: Rates, known: Mapping[str, float]) -> dict[Solver, Estimate]:
    """Seconds and bytes of each solver that can do it.

    known: iterations by solver of the last time each was run, scaled to the present damping."""
    n, p, d = float(shape.rows), float(shape.columns), max(1.0, shape.dimension)
    size = 8 if shape.double else 4
    skinny = rates.skinny64 if shape.double else rates.skinny32
    product = _product(shape) / skinny + OVERHEAD
    digits = max(0.5, -math.log10(shape.tight) / 2)
    free = min(PLAIN * math.sqrt(shape.condition), 7 * d) * max(0.5, -math.log10(shape.loose) / 2)
    most = rank = min(n / 2, MOST_RANK, max(32.0, 2 * d))
    few = PRECONDITIONED * digits * math.sqrt(max(1.0, 2 * d / rank))
    found: dict[Solver, Estimate] = {}

    def add(solver: Solver, build: float, memory: float, iterations: float = 0.0, each: float = 0.0) -> None:
        times = known.get(solver, iterations)
        found[solver] = Estimate(solver, build + (times + 2) * (product + each), memory, times)

    if shape.factors:
        single = CHOLESKY_OF_GEMM * rates.gemm32
        gemm, cholesky = (rates.gemm32, single) if shape.single else (rates.gemm64, rates.cholesky64)
        passes = PASSES * n * n * (4 if shape.single else 8) / rates.bandwidth
        add("exact", n * n * shape.width / gemm + n**3 / 3 / cholesky + passes, 24 * n * n)
        low = 2 * rank * n * shape.width / rates.gemm64 + (2 * LOOKS + 4) * rank**2 * n / rates.gemm64
        low += (2 * n * rank**2 + 20 * rank**3 / SVD_OF_QR) / rates.qr64
        add("rpchol", low, 16 * n * rank, few, 4 * n * rank * 8 / rates.bandwidth)
        columns, iterations = sketch_columns(shape, rates)
        made = _dense_sketch(n, columns, rates) if shape.dense else _sampled_units(shape, columns, rates)
        held = columns * n * n * (size + 8) if shape.dense else 0.0
        add("sketch", made, held + 12 * n * n, iterations * digits, n * n * 8 / rates.bandwidth)
        rows_made = n * p * 8 / rates.bandwidth
        add("qr", rows_made + (2 * n * p * p + DAMPED_QR * p**3) / rates.qr64, 60 * p * p)
        averaged = KRONECKER * math.sqrt(max(1.0, min(n, p) / (4 * d)))
        sides = (float(shape.inputs), p / shape.inputs) if shape.inputs else ()
        spectra = sum(EIGH * side**3 / rates.qr64 + 2 * n * side**2 / skinny for side in sides)
        add("kfac", spectra, size * (6 * p + 4 * sum(side**2 for side in sides)),
            averaged * digits, 4 * p * max(1.0, sum(sides)) / skinny)  # fmt: skip
        add("cholesky", rows_made + 2 * n * p * p / rates.gemm64 + p**3 / 3 / rates.cholesky64, 24 * p * p)
    add("cg", 0.0, 6 * size * n, free)
    rank = min(rank, MOST_NYSTROM)
    add("nystrom", rank * product + 4 * rank**2 * n / rates.gemm64, 16 * n * rank, few * math.sqrt(most / rank),
        4 * n * rank * 8 / rates.bandwidth)  # fmt: skip
    return found


def pilot(shape: Shape, rates: Rates, rank: int) -> float:
    """Seconds of that many pivoted columns of K of some rows, in float64."""
    return (2 * rank * shape.width + 10 * rank**2) * shape.rows / pilot_stride(shape) / rates.skinny64


def pilot_stride(shape: Shape) -> int:
    """One sample in so many is looked at."""
    return math.ceil(shape.rows / PILOT_ROWS)


def _product(shape: Shape) -> float:
    """Operations of a product with K."""
    samples = shape.rows / shape.outputs
    return 4 * samples * shape.columns + 4 * shape.rows * shape.width if shape.factors else 8 * samples * shape.columns


def _sampled_units(shape: Shape, columns: float, rates: Rates) -> float:
    """Seconds of a Gram matrix of sampled units and of its factor."""
    n, inputs = float(shape.rows), float(shape.inputs or shape.columns)
    units = min(float(shape.width), columns * n / inputs + inputs)
    factored = n**3 / 3 / (CHOLESKY_OF_GEMM * rates.gemm32)
    return n * n * units / rates.gemm32 + factored + PASSES * n * n * 4 / rates.bandwidth


def _dense_sketch(n: float, columns: float, rates: Rates) -> float:
    """Seconds of the factor of a sketch with so many columns for each row."""
    return 2 * columns * min(1.0, columns) * n**3 / (QR_OF_GEMM * rates.gemm32)


def sketch_columns(shape: Shape, rates: Rates) -> tuple[float, float]:
    """Columns for each row, and iterations: of the entry of SKETCHES with the least cost, since wide layers have dear
    products, and are worth more columns; or the columns that the recipe says, with the entry of the nearest."""
    if shape.per_row:
        return shape.per_row, min(SKETCHES, key=lambda one: abs(math.log(one[0] / shape.per_row)))[1]
    n = float(shape.rows)
    product = _product(shape) / (rates.skinny64 if shape.double else rates.skinny32)
    inputs = shape.inputs or shape.columns
    return min(SKETCHES, key=lambda one: one[0] * n**3 / inputs / rates.gemm32 + one[1] * product)
