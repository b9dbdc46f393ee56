"""The linear system of a step, (J^T J + damping I) d = J^T v, at one point, for many dampings and right-hand sides.

In sample space d = J^T g with (K + damping I) g = v, K = J J^T (N, N); in parameter space it is J^T J (P, P). Every
system takes this rank's rows of v and gives the whole of d, equal on all ranks, and this rank's rows of J d.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...group import Group
from ...solvers import Solved
from ...solvers.damped import DampedGram, pcg
from ...solvers.linear import cg
from ...solvers.precondition import Preconditioner
from .jacobian import Jacobian

MOST_REFINEMENTS = 12
"""Products in float64 that may make good what float32 left of a solution, before K is formed in float64."""


@dataclass(frozen=True)
class Direction:
    """step: d (P,); moved: this rank's rows of J d (N,); solved: of the linear system, its x without meaning."""

    step: Tensor
    moved: Tensor
    solved: Solved


class Pull(NamedTuple):
    """A place (P,) that a solution is drawn to, and how strongly."""

    weight: float
    place: Tensor


class Operator(Protocol):
    """J of this rank's rows as products: `Jacobian` or `MatrixFree`."""

    @property
    def num_rows(self) -> int: ...
    def mv(self, w: Tensor) -> Tensor: ...
    def t_mv(self, v: Tensor) -> Tensor: ...


class Sharded:
    """The rows of all ranks behind one another: which are this rank's, and products of all of them."""

    def __init__(self, operator: Operator, group: Group) -> None:
        self.operator, self.group = operator, group
        counts = [int(one) for one in torch.cat(group.gather(torch.tensor([operator.num_rows]))).tolist()]
        start = sum(counts[: group.rank])
        self.own, self.num_rows = slice(start, start + operator.num_rows), sum(counts)

    def all(self, own: Tensor) -> Tensor:
        """The ranks' rows as one tensor, on every rank. Collective."""
        return own if self.group.size == 1 else torch.cat(self.group.gather(own.contiguous()))

    def t_mv(self, v: Tensor) -> Tensor:
        """J^T v over all ranks' rows, from this rank's. Collective."""
        out = self.operator.t_mv(v)
        self.group.sum_(out)
        return out


class System(ABC):
    """J of all ranks' rows at one point."""

    def __init__(self, rows: Sharded) -> None:
        self._rows = rows

    @abstractmethod
    def solve(self, v: Tensor, damping: float, pulls: Sequence[Pull] = ()) -> Direction:
        """d with the least |J d - v|^2 + damping |d|^2 + the sum of weight |d - place|^2, for this rank's rows v (N,).
        Collective."""
        ...

    def image(self, w: Tensor) -> Tensor:
        """This rank's rows of J w."""
        return self._rows.operator.mv(w)

    @abstractmethod
    def effective_dimension(self, damping: float) -> float | None:
        """tr K (K + damping I)^-1, where it is known without much work."""
        ...


class Centred(System):
    """Solves without pulls, and with them from their centre.

    With c the mean of the places by weight, 0 among them, d - c is the solution of (J^T J + all weights) x =
    J^T (v - J c)."""

    def solve(self, v: Tensor, damping: float, pulls: Sequence[Pull] = ()) -> Direction:
        if not pulls:
            return self._solve(v, damping)
        total = damping + sum(pull.weight for pull in pulls)
        shares = [pull.weight / total if total > 0 else 0.0 for pull in pulls]
        centre = torch.stack([share * pull.place for share, pull in zip(shares, pulls, strict=True)]).sum(0)
        image = self.image(centre)
        found = self._solve(v - image, total)
        return Direction(centre + found.step, image + found.moved, found.solved)

    @abstractmethod
    def _solve(self, v: Tensor, damping: float) -> Direction: ...


class Products:
    """v -> K v for all rows (N,) or (N, k), on every rank. Collective.

    J^T v and this rank's rows of K v are kept of the last v: conjugate gradients end with a product of their answer."""

    def __init__(self, rows: Sharded) -> None:
        self._rows = rows
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        if v.dim() == 2:
            return torch.stack([self(column) for column in v.t()], 1)
        step = self._rows.t_mv(v[self._rows.own])
        moved = self._rows.operator.mv(step)
        self._last = (v, step, moved)
        return self._rows.all(moved)

    def of(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """J^T v (P,), and this rank's rows of K v."""
        if self._last is None or self._last[0] is not v:
            self(v)
        assert self._last is not None
        return self._last[1:]


class _InDouble:
    """Products of a float32 Jacobian in float64."""

    def __init__(self, jacobian: Jacobian) -> None:
        self._jacobian, self.num_rows = jacobian, jacobian.num_rows

    def mv(self, w: Tensor) -> Tensor:
        return self._jacobian.mv_in(torch.float64, w)

    def t_mv(self, v: Tensor) -> Tensor:
        return self._jacobian.t_mv_in(torch.float64, v)


class SampleSpace(Centred):
    """K itself, formed once; a Cholesky factorisation for each damping.

    single: whether to try in float32, where the model is. What that does not solve to the tolerance, its rounding
    counted, is refined by conjugate gradients with products of J in float64 and the float32 factor, where a few of them
    cost less than K; else, or where that fails too, K is formed anew in float64; `single` is False then, and
    `failed_at` the damping. So is J^T g: at a small damping g is large, and nearly all of it cancels."""

    def __init__(self, jacobian: Jacobian, group: Group, *, tolerance: float, single: bool) -> None:
        super().__init__(Sharded(jacobian, group))
        self._jacobian, self._tolerance = jacobian, tolerance
        self.single, self.failed_at = single and jacobian.dtype == torch.float32, 0.0
        self._form()

    def _form(self) -> None:
        group, dtype = self._rows.group, torch.float32 if self.single else torch.float64
        gram = self._jacobian.gathered(group).gram(dtype, None if group.size == 1 else self._rows.own)
        self._gram = self._rows.all(gram)
        self._damped = DampedGram(self._gram, tolerance=self._tolerance, dtype=dtype, symmetric=group.size == 1)

    def _solve(self, v: Tensor, damping: float) -> Direction:
        right = self._rows.all(v)
        solved = self._damped.solve(right, damping)
        if self.single and not solved.residual <= self._tolerance:
            refined = self._refined(right, damping)
            if refined is not None:
                return refined
            self.single, self.failed_at = False, damping
            self._form()
            solved = self._damped.solve(right, damping)
        step = self._jacobian.t_mv_in(self._gram.dtype, solved.x[self._rows.own])
        self._rows.group.sum_(step)
        moved = (self._gram[self._rows.own] @ solved.x).to(v.dtype)
        return Direction(step.to(v.dtype), moved, solved)

    def _refined(self, right: Tensor, damping: float) -> Direction | None:
        n, p, width = self._rows.num_rows, self._jacobian.num_columns, self._jacobian.width
        if MOST_REFINEMENTS * 4 * p > n * width + n * n / 3:
            return None
        precondition = self._damped.inverse(damping)
        if precondition is None:
            return None
        product = Products(Sharded(_InDouble(self._jacobian), self._rows.group))
        solved = cg(
            lambda v: product(v) + damping * v,
            right.double(),
            precondition=precondition,
            tolerance=self._tolerance,
            max_iterations=MOST_REFINEMENTS,
        )
        if not solved.residual <= self._tolerance:
            return None
        step, moved = product.of(solved.x)
        return Direction(step.to(right.dtype), moved.to(right.dtype), solved)

    def effective_dimension(self, damping: float) -> float | None:
        return self._damped.effective_dimension(damping)


class ParameterSpaceQR(Centred):
    """R of QR of [J, s], then of all ranks' triangles; and for each damping QR of [R; sqrt(damping) I].

    Rows join the triangle in tiles, of as many rows as columns at least: each time the triangle is factored again.

    The condition of J is never squared for v = s; other right-hand sides enter by J^T v and one refinement."""

    def __init__(self, jacobian: Jacobian, s: Tensor, group: Group) -> None:
        super().__init__(Sharded(jacobian, group))
        self._s, self._p = s, jacobian.num_columns
        triangle = s.new_zeros(0, self._p + 1, dtype=torch.float64)
        waiting: list[Tensor] = []
        for start, rows in jacobian.tiles():
            stop = start + len(rows)
            waiting.append(torch.cat([rows, s[start:stop, None]], 1).double())
            if sum(map(len, waiting)) >= self._p or stop == jacobian.num_rows:
                stack = torch.cat([triangle, *waiting])
                waiting.clear()  # they are as large as the triangle
                triangle = stacked_triangle(stack)
                del stack
        if group.size > 1:
            triangle = stacked_triangle(torch.cat(group.gather(triangle)))
        self._triangle = triangle
        self._damped: tuple[float, Tensor] | None = None

    def _solve(self, v: Tensor, damping: float) -> Direction:
        both = self._factor(damping)
        r = both[: self._p, : self._p]
        if v is self._s:
            right = self._triangle[: self._p, : self._p].t() @ self._triangle[: self._p, self._p]
            step = _back(r, both[: self._p, self._p])
        else:
            right = self._rows.t_mv(v).double()
            step = _seminormal(r, right)
            step = step + _seminormal(r, right - self._normal(step, damping))
        norm = float(torch.linalg.vector_norm(right))
        rest = float(torch.linalg.vector_norm(self._normal(step, damping) - right))
        fine = bool(torch.isfinite(step).all())
        reason = "" if fine else "the step holds values that are not finite; raise the damping"
        solved = Solved(step, reason, 1, (rest / norm if norm else 0.0) if fine else math.inf)
        moved = self._rows.operator.mv(step.to(v.dtype))
        return Direction(step.to(v.dtype), moved, solved)

    def _factor(self, damping: float) -> Tensor:
        """R of QR of [R, Q^T s; sqrt(damping) I, 0], (P + 1, P + 1)."""
        if self._damped is None or self._damped[0] != damping:
            eye = torch.eye(self._p, self._p + 1, dtype=torch.float64, device=self._triangle.device)
            self._damped = (damping, stacked_triangle(torch.cat([self._triangle, math.sqrt(damping) * eye])))
        return self._damped[1]

    def _normal(self, step: Tensor, damping: float) -> Tensor:
        """(J^T J + damping I) step."""
        triangle = self._triangle[: self._p, : self._p]
        return triangle.t() @ (triangle @ step) + damping * step

    def effective_dimension(self, damping: float) -> float | None:
        """P - damping |R^-1|^2 of the damped triangle."""
        r = self._factor(damping)[: self._p, : self._p]
        inverse = _back(r, torch.eye(self._p, dtype=torch.float64, device=r.device))
        return max(0.0, self._p - damping * float(inverse.square().sum()))


def stacked_triangle(rows: Tensor) -> Tensor:
    """R of QR of the rows, square also where they are fewer than columns."""
    r: Tensor = torch.linalg.qr(rows, mode="r").R
    if len(r) < r.shape[1]:
        r = torch.cat([r, r.new_zeros(r.shape[1] - len(r), r.shape[1])])
    return r


def _back(r: Tensor, right: Tensor) -> Tensor:
    """r^-1 right, (P,) or (P, k)."""
    found: Tensor = torch.linalg.solve_triangular(r, right.reshape(len(right), -1), upper=True)
    return found.reshape(right.shape)


def _seminormal(r: Tensor, right: Tensor) -> Tensor:
    """(r^T r)^-1 right."""
    half: Tensor = torch.linalg.solve_triangular(r.t(), right[:, None], upper=False)
    return _back(r, half[:, 0])


class ParameterSpace(Centred):
    """J^T J (P, P) added up over tiles of rows and over the ranks; a Cholesky factorisation for each damping."""

    def __init__(self, jacobian: Jacobian, group: Group, *, tolerance: float) -> None:
        super().__init__(Sharded(jacobian, group))
        p = jacobian.num_columns
        self._normal = torch.zeros(p, p, dtype=torch.float64, device=jacobian.device)
        for _, rows in jacobian.tiles():
            rows = rows.double()
            self._normal += rows.t() @ rows
        group.sum_(self._normal)
        self._damped = DampedGram(self._normal, tolerance=tolerance)

    def _solve(self, v: Tensor, damping: float) -> Direction:
        solved = self._damped.solve(self._rows.t_mv(v).double(), damping)
        step = solved.x.to(v.dtype)
        return Direction(step, self._rows.operator.mv(step), solved)

    def effective_dimension(self, damping: float) -> float | None:
        return self._damped.effective_dimension(damping)


class Krylov(Centred):
    """Conjugate gradients on K + damping I from products, preconditioned or not.

    The vectors are those of all ranks' rows, on every rank: a product is one sum of P numbers and one gather of N."""

    def __init__(
        self,
        operator: Operator,
        group: Group,
        *,
        tolerance: float,
        max_iterations: int,
        preconditioner: Callable[[Sharded], Preconditioner] | None = None,
    ) -> None:
        super().__init__(Sharded(operator, group))
        self._tolerance, self._max_iterations = tolerance, max_iterations
        self._preconditioner = preconditioner(self._rows) if preconditioner is not None else None

    def _solve(self, v: Tensor, damping: float) -> Direction:
        product = Products(self._rows)
        solved = pcg(
            product,
            self._rows.all(v),
            damping,
            self._preconditioner,
            tolerance=self._tolerance,
            max_iterations=self._max_iterations,
        )
        return Direction(*product.of(solved.x), solved)

    def effective_dimension(self, damping: float) -> float | None:
        return self._preconditioner.effective_dimension(damping) if self._preconditioner is not None else None
