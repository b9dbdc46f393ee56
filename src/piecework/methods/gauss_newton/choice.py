"""Which solver a step uses, and the system that it makes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from ...solvers.precondition import Preconditioner
from ...training import CannotTrain, DidNotSolve, stream
from .cost import MOST_NYSTROM, Estimate, Rates, Shape, Solver, estimates, measured, pilot, pilot_stride, sketch_columns
from .jacobian import Jacobian, Plan, predicted_bytes
from .kronecker import KroneckerSystem, LayerFactors
from .objective import LeastSquares, Point
from .sketches import low_rank, nystrom_of, sketch_of, widest
from .systems import Krylov, ParameterSpace, ParameterSpaceQR, SampleSpace, Sharded, System

if TYPE_CHECKING:
    from . import GaussNewton

SOLVERS = get_args(Solver)
DIRECT = ("exact", "qr", "cholesky")
SURE = (*DIRECT, "sketch")
"""Solvers that end within their iterations, whatever the condition."""
WORTH = 10.0
"""How many times the seconds of one that probably ends early these may take."""
SMALL = 0.02
"""Seconds: a direct solver that is predicted to take less is taken without looking further."""
FEW_OUTPUTS = 3
"""From so many on products through the network's graph read less than factors, which have a part for each output."""
MEMORY = 0.75
"""Of the machine's, where the recipe does not say."""
PILOT_RANK = 128
"""Columns of K from which the effective dimension is guessed."""
PILOT_SHARE = 0.2
"""Of the least predicted seconds of a sure solver: a pilot that costs more than this is not made; nor one that costs
more than any solver, whose iterations may be a guess."""
TRACE_PROBES = 8
"""Products of random signs from which the trace of K is estimated, where there are products alone."""
FADING = 0.5
"""Of the iterations remembered: a single quick solve says little."""
FEWER = 0.7
"""A part of the rows of the last look below which a choice would not be for the usual number."""
MOVED = 30.0
"""A factor of the damping at which the choice is made anew."""
SQUARED_CONDITION = 1e-8
"""Relative damping below which float64 normal equations lose too much, and QR is taken instead."""
LOOSE, TIGHT = 0.1, 0.01
"""Relative residuals at which conjugate gradients stop, and where most of the cost is making the preconditioner."""
LOOSELY = ("cg", "kfac")
"""Solvers that stop at the first."""
DAMPING = 1e-3
"""Relative to the mean diagonal of K, where the recipe does not say."""
SINGLE = 1e-6
"""Relative damping below which float32 is never enough for the Gram matrix and its factor."""
DIGITS_ARE_WORTH = 3.0
"""How many times the seconds of the normal equations QR may take in float64, whatever the damping."""


@dataclass(frozen=True)
class Linearised:
    """A system, what was predicted of it, and the mean diagonal of K."""

    system: System
    estimate: Estimate
    unit: float


class Choice:
    """Makes the systems of a training, by the recipe's solver or by the cheapest.

    What is chosen, and how many iterations each solver took, is state: a resumed run replays it."""

    def __init__(self, recipe: GaussNewton, objective: LeastSquares) -> None:
        self._recipe, self._objective = recipe, objective
        self._solver: Solver | None = None
        self._damping, self._rows, self._next = 0.0, 0, 0  # of the last look; when to look again
        self._dimension, self._condition = 0.0, 0.0
        self._double_below = 0.0  # relative damping at which float32 was not enough for the Gram matrix
        self._known: dict[str, tuple[float, float]] = {}  # iterations and damping of each solver's last run
        self._rates: Rates | None = None
        self._memory = 0.0  # bytes of the rank that has least; 0 until it is asked for

    def state(self) -> dict[str, Any]:
        return {
            "solver": self._solver or "",
            "damping": self._damping,
            "rows": self._rows,
            "next": self._next,
            "dimension": self._dimension,
            "condition": self._condition,
            "double_below": self._double_below,
            "known": {name: list(pair) for name, pair in self._known.items()},
            "rates": list(self._rates.__dict__.values()) if self._rates else [],
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        self._solver = cast(Solver, state["solver"]) or None
        self._damping, self._rows, self._next = float(state["damping"]), int(state["rows"]), int(state["next"])
        self._dimension, self._condition = float(state["dimension"]), float(state["condition"])
        self._double_below = float(state["double_below"])
        self._known = {name: (float(pair[0]), float(pair[1])) for name, pair in state["known"].items()}
        self._rates = Rates(*map(float, state["rates"])) if state["rates"] else None

    def note(self, made: Linearised, iterations: int, damping: float) -> None:
        """Remember how many iterations the solver took, or that float32 was not enough for it."""
        if made.estimate.solver not in DIRECT:
            before = self._known.get(made.estimate.solver, (0.0, 0.0))[0]
            self._known[made.estimate.solver] = (max(float(iterations), FADING * before), damping)
        if isinstance(made.system, SampleSpace) and made.unit > 0:
            self._double_below = max(self._double_below, min(1.0, made.system.failed_at / made.unit))

    def has_room(self, plan: Plan, rows: int) -> bool:
        """For the factors of so many rows of all ranks. Collective the first time."""
        return predicted_bytes(plan, rows, plan.num_outputs) <= self._means()[1] / 2

    def linearise(
        self,
        point: Point,
        damping: float | None,
        *,
        step: int,
        tolerance: float,
        jacobian: Jacobian | None = None,
        layers: LayerFactors | None = None,
    ) -> Linearised:
        """The system at the model's present weights. Collective.

        damping: absolute, weight decay apart; None for that of the start, which is relative; tolerance: of iterative
        solvers, where the recipe's is not smaller; jacobian: where it is known; layers: of the samples before, on
        samples. Raises CannotTrain where no solver fits into memory, DidNotSolve where derivatives are not finite."""
        objective, plan = self._objective, self._objective.plan(point.batch)
        rates, limit = self._means()
        if jacobian is None and self.has_room(plan, point.at.rows):
            jacobian = objective.jacobian(point.batch)
        unit = self._unit(jacobian, point)
        if not math.isfinite(unit):
            raise DidNotSolve(
                f"the derivatives of the network's outputs are not finite at step {step}; look for infinite features, "
                "or scale the features or the start weights down"
            )
        damping = (self._recipe.damping or DAMPING) * unit if damping is None else damping
        damping += objective.decay(point.at.rows)
        single = damping > max(SINGLE, self._double_below) * unit
        shape = self._shape(plan, point, jacobian, tolerance, single)
        estimate = self._pick(shape, jacobian, damping, unit, step, rates, limit)
        near = self._tolerance(estimate.solver in LOOSELY, tolerance)
        system: System
        if jacobian is not None and estimate.solver in DIRECT:
            system = self._direct(estimate.solver, jacobian, point.s, near, single=single)
        elif jacobian is not None and estimate.solver == "kfac":
            system = self._kronecker(jacobian, point.at.rows, near, layers)
        else:
            system = self._iterative(estimate.solver, jacobian, point, shape, damping, step, near)
        return Linearised(system, estimate, unit)

    def _means(self) -> tuple[Rates, float]:
        """Rates and bytes: those of rank 0 and of the rank that has least, so that all ranks choose alike. Collective
        the first time."""
        group, device = self._objective.group, self._objective.device
        if self._rates is None:
            rates = torch.tensor(list(measured(str(device), torch.get_num_threads()).__dict__.values()))
            group.broadcast_(rates)
            self._rates = Rates(*map(float, rates.tolist()))
        if not self._memory:
            given = self._recipe.memory
            limit = given * 2**30 if given is not None else MEMORY * _memory(device)
            self._memory = min(map(float, group.gather(torch.tensor([limit], dtype=torch.float64))))
        return self._rates, self._memory

    def _unit(self, jacobian: Jacobian | None, point: Point) -> float:
        """tr K / N; from products alone by an estimate, |J^T v|^2 for random signs v, equal on any number of ranks."""
        group = self._objective.group
        if jacobian is not None:
            trace = jacobian.diagonal().double().sum().reshape(1)
            group.sum_(trace)
            return float(trace) / point.num_rows
        rows = Sharded(self._objective.products(point), group)
        signs = torch.randint(0, 2, (TRACE_PROBES, rows.num_rows), generator=stream(self._recipe.seed)).mul(2).sub(1)
        images = [rows.t_mv(v[rows.own]).double() for v in signs.to(point.s)]
        return sum(float(image.square().sum()) for image in images) / (TRACE_PROBES * point.num_rows)

    def _shape(self, plan: Plan, point: Point, jacobian: Jacobian | None, tolerance: float, single: bool) -> Shape:
        n, p = point.num_rows, plan.num_parameters
        return Shape(
            rows=n,
            columns=p,
            outputs=point.at.z.shape[1],
            width=jacobian.width if jacobian is not None else p,
            factors=jacobian is not None,
            double=plan.dtype == torch.float64,
            single=single and plan.dtype == torch.float32,
            inputs=widest(jacobian) if jacobian is not None else 0,
            dense=self._recipe.sketch != "units",
            per_row=self._recipe.sketch_rows or 0.0,
            dimension=self._dimension or min(n, p) / 4,
            condition=self._condition or 1e4,
            loose=self._tolerance(True, tolerance),
            tight=self._tolerance(False, tolerance),
        )

    def _tolerance(self, loosely: bool, most: float) -> float:
        given = self._recipe.inner_tolerance
        return min(most, (LOOSE if loosely else TIGHT) if given is None else given)

    def _pick(
        self,
        shape: Shape,
        jacobian: Jacobian | None,
        damping: float,
        unit: float,
        step: int,
        rates: Rates,
        limit: float,
    ) -> Estimate:
        snapped = rates.snapped()
        if self._recipe.solver == "auto" and self._stale(step, damping, shape.rows):
            found = self._fitting(shape, snapped, damping, limit)
            quick = [one for one in found.values() if not one.iterations and one.seconds <= SMALL]
            if jacobian is not None and not quick and pilot(shape, snapped, PILOT_RANK) <= _worth(found):
                shape = self._explored(shape, jacobian, damping)
                found = self._fitting(shape, snapped, damping, limit)
            self._solver = self._cheapest(quick or list(found.values()), shape, damping / unit if unit > 0 else 0.0)
            self._damping, self._rows, self._next = damping, shape.rows, 2 * step + 1
        solver = self._solver if self._recipe.solver == "auto" else self._recipe.solver
        assert solver is not None
        costs = estimates(shape, rates, self._scaled(damping))
        if solver not in costs or costs[solver].bytes > limit:
            raise self._too_big(solver, shape, costs, limit)
        return costs[solver]

    def _stale(self, step: int, damping: float, rows: int) -> bool:
        if self._solver is None:
            return True
        if rows < FEWER * self._rows:  # the rest of an epoch of samples: the others decide
            return False
        if step >= self._next or FEWER * rows > self._rows:
            return True
        return not self._damping / MOVED <= damping <= self._damping * MOVED

    def _fitting(self, shape: Shape, rates: Rates, damping: float, limit: float) -> dict[Solver, Estimate]:
        costs = estimates(shape, rates, self._scaled(damping))
        fitting = {name: one for name, one in costs.items() if one.bytes <= limit}
        if not fitting:
            raise self._too_big("cg", shape, costs, limit)
        return fitting

    def _scaled(self, damping: float) -> dict[str, float]:
        """Iterations that the solvers took, at this damping."""
        return {
            name: max(2.0, count * min(10.0, math.sqrt(before / damping) if damping > 0 else 1.0))
            for name, (count, before) in self._known.items()
        }

    def _cheapest(self, found: list[Estimate], shape: Shape, relative: float) -> Solver:
        best = min(found, key=lambda one: one.seconds)
        if best.iterations > self._recipe.inner_iterations:
            sure = [one for one in found if one.solver in SURE and one.seconds <= WORTH * best.seconds]
            best = min(sure, key=lambda one: one.seconds, default=best)
        careful = next((one for one in found if one.solver == "qr"), None)
        squares = best.solver in ("cholesky", "exact") and shape.double and shape.columns <= shape.rows
        if careful is not None and squares:
            cheap = careful.seconds <= max(SMALL, DIGITS_ARE_WORTH * best.seconds)
            return "qr" if cheap or relative < SQUARED_CONDITION else best.solver
        return best.solver

    def _explored(self, shape: Shape, jacobian: Jacobian, damping: float) -> Shape:
        """With the effective dimension and the condition that some pivoted columns of K show, or of a part of it."""
        some = jacobian.samples(slice(None, None, pilot_stride(shape)))
        rows = Sharded(some, self._objective.group)
        found = low_rank(some, rows, damping, self._recipe.seed, min(PILOT_RANK, rows.num_rows))
        share = rows.num_rows / shape.rows
        largest = float(found.values[0]) / share if found.rank else 1.0
        known = min(shape.rows, shape.columns)
        self._dimension = min(float(known), max(1.0, found.effective_dimension(damping, share)))
        self._condition = (largest + damping) / damping if damping > 0 else 1e16
        return Shape(**{**shape.__dict__, "dimension": self._dimension, "condition": self._condition})

    def _direct(self, solver: Solver, jacobian: Jacobian, s: Tensor, tolerance: float, *, single: bool) -> System:
        group = self._objective.group
        if solver == "qr":
            return ParameterSpaceQR(jacobian, s, group)
        if solver == "cholesky":
            return ParameterSpace(jacobian, group, tolerance=tolerance)
        return SampleSpace(jacobian, group, tolerance=tolerance, single=single)

    def _kronecker(
        self, jacobian: Jacobian, rows: int, tolerance: float, layers: LayerFactors | None
    ) -> KroneckerSystem:
        """With the factors of these rows; one iteration, where the recipe wants this solver on samples, with those of
        the samples before too."""
        once = layers if self._recipe.solver == "kfac" and self._recipe.inner_tolerance is None else None
        layers = LayerFactors() if once is None else once
        layers.look(jacobian, self._objective.group)
        return KroneckerSystem(
            jacobian,
            self._objective.group,
            layers.of(jacobian, rows),
            tolerance=tolerance if once is None else None,
            max_iterations=self._recipe.inner_iterations,
        )

    def _iterative(
        self,
        solver: Solver,
        jacobian: Jacobian | None,
        point: Point,
        shape: Shape,
        damping: float,
        step: int,
        tolerance: float,
    ) -> System:
        recipe, seed = self._recipe, self._recipe.seed + step

        def preconditioner(rows: Sharded) -> Preconditioner:
            if solver == "nystrom":
                rank = max(1, min(rows.num_rows // 2, math.ceil(2 * shape.dimension), MOST_NYSTROM))
                return nystrom_of(rows, point.s, rank, seed)
            assert jacobian is not None
            if solver == "rpchol":
                return low_rank(jacobian, rows, damping, seed)
            per_row = sketch_columns(shape, self._means()[0].snapped())[0]
            return sketch_of(jacobian, rows, recipe.sketch, per_row, seed)

        factors = jacobian if shape.outputs < FEW_OUTPUTS else None
        return Krylov(
            factors or self._objective.products(point, keep=jacobian is not None),
            self._objective.group,
            tolerance=tolerance,
            max_iterations=recipe.inner_iterations,
            preconditioner=None if solver == "cg" else preconditioner,
        )

    def _too_big(self, solver: Solver, shape: Shape, costs: Mapping[Solver, Estimate], limit: float) -> CannotTrain:
        about = f"{shape.rows:,} rows and {shape.columns:,} parameters"
        if solver not in costs:
            needs = f"gauss-newton: solver {solver} needs the factors of {about}, which do not fit into {_size(limit)}"
        else:
            needs = f"gauss-newton: solver {solver} would need {_size(costs[solver].bytes)} for {about}, and "
            needs += f"{_size(limit)} are allowed"
        least = min(costs.values(), key=lambda one: one.bytes)
        way_out = f"solver {least.solver} needs {_size(least.bytes)}: take it, or " if least.bytes <= limit else "take "
        return CannotTrain(f"{needs}; {way_out}fewer rows in a step (sample_rows), or raise memory")


def _worth(found: Mapping[Solver, Estimate]) -> float:
    """The seconds that a pilot may cost."""
    sure = min((one.seconds for one in found.values() if one.solver in SURE), default=math.inf)
    return min(PILOT_SHARE * sure, min(one.seconds for one in found.values()))


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= 0.1 * size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 2**10:.3g} KiB"


def _memory(device: torch.device) -> float:
    """Bytes of the machine, or of the device."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
