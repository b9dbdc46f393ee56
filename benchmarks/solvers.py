"""One damped system by every solver, on Jacobians of real networks: `python benchmarks/solvers.py`.

n samples of 16 features, a network with two hidden layers of equal width that gives about p parameters, tanh and
relu, float32; relative damping 1e-2 and 1e-4, to a relative residual of 1e-2. A cell has the seconds to set up and
solve, the iterations, and how far the quadratic model falls, as a part of the furthest fall in the row: residuals are
of the rows, and with kfac of the gradient, which says less. A prediction beyond the limits is shown in brackets and is
not run. Quick solves are repeated, all solvers and `auto` in turn, and the median counts. Then what `auto` chose, what
it predicted and what it took, and its seconds over those of the quickest solver that fell about as far. A file for each
n. `--stress` is what float32 costs in digits as the damping falls, alone.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Literal, get_args

import torch
from torch import Tensor

import piecework
import report
from piecework import Batch, CannotTrain, GaussNewton, Solo, losses
from piecework.methods.gauss_newton.choice import Choice, Linearised
from piecework.methods.gauss_newton.cost import Estimate, Rates, Shape, Solver, estimates, measured
from piecework.methods.gauss_newton.objective import LeastSquares, Point
from piecework.models import mlp

FEATURES = 16
TOLERANCE = 1e-2
DAMPINGS = (1e-2, 1e-4)
ROUNDS, AGAIN_SECONDS = 7, 3.0
"""Solves of a cell at most, and after how many seconds of them it has had enough."""
AS_FAR = 0.99
"""Of the furthest fall: what a solver must come to, to be the quickest of a row; or to that of auto."""
STRESS_ROWS, STRESS_HIDDEN, STRESS_DAMPINGS = 256, (64, 64), tuple(10.0**-k for k in range(4, 11))
SOLVERS: tuple[Solver, ...] = get_args(Solver)
Contender = Literal["auto"] | Solver


@dataclass(frozen=True)
class Problem:
    """A network at its start with random targets: the residuals have components along all of K."""

    objective: LeastSquares
    point: Point

    @classmethod
    def of(
        cls, num: int, features: int, hidden: tuple[int, ...], activation: str, dtype: torch.dtype = torch.float32
    ) -> Problem:
        generator = piecework.training.stream(num, *hidden)
        x = torch.randn(num, features, generator=generator, dtype=torch.float64).float()
        y = torch.randn(num, 1, generator=generator, dtype=torch.float64).float()
        model = mlp(features, hidden, 1, activation=activation, seed=0).to(dtype)
        batch = Batch(x.to(dtype), y.to(dtype))
        objective = LeastSquares(model, losses.Squared(), Solo(), tile=4096)
        return cls(objective, objective.point(batch))


@dataclass(frozen=True)
class Took:
    """seconds: of the linearisation and the solve; iterations, residual: as the solver says; step: d; fall: of the
    quadratic model."""

    made: Linearised
    seconds: float
    iterations: int
    residual: float
    step: Tensor
    fall: float


def solve(problem: Problem, choice: Choice, *, tolerance: float = TOLERANCE, damping: float) -> Took:
    """One system; damping: relative."""
    began = time.perf_counter()
    made = choice.linearise(problem.point, None, step=0, tolerance=tolerance)
    direction = made.system.solve(problem.point.s, damping * made.unit)
    seconds = time.perf_counter() - began
    fall = problem.objective.promised(problem.point, direction.step, direction.moved)
    return Took(made, seconds, direction.solved.iterations, direction.solved.residual, direction.step, fall)


def width_for(parameters: float) -> int:
    """w of 16-w-w-1 with about that many parameters, w^2 + 19 w + 1."""
    return max(1, round((-19 + math.sqrt(19**2 + 4 * parameters)) / 2))


def shape_of(num: int, width: int, dimension: float, condition: float) -> Shape:
    """What the library's cost model is asked about this network."""
    inputs, units = FEATURES + 2 * width + 3, 2 * width + 1
    parameters = width * width + 19 * width + 1
    return Shape(
        rows=num, columns=parameters, outputs=1, width=inputs + units, factors=True, double=False, single=True,
        inputs=width + 1, dense=False, per_row=0.0, dimension=dimension, condition=condition, loose=TOLERANCE,
        tight=TOLERANCE,
    )  # fmt: skip


def machine() -> Rates:
    return measured("cpu", torch.get_num_threads())


def beyond(estimate: Estimate, seconds: float, gib: float) -> bool:
    return estimate.seconds > seconds or estimate.bytes > gib * 2**30


def cells(num: int, parameters: float, activation: str, limit: float, gib: float) -> list[list[object]]:
    """A row for each damping."""
    width = width_for(parameters)
    blind = estimates(shape_of(num, width, min(num, parameters) / 4, 1e4), machine(), {})
    name = f"{num} x {parameters:.0e} {activation}"
    if all(beyond(one, limit, gib) for one in blind.values()):
        print(f"  {name}: beyond the limits", flush=True)
        return [
            [name, damping, *(_marked(blind.get(one)) for one in SOLVERS), "-", None, None, None]
            for damping in DAMPINGS
        ]
    problem = Problem.of(num, FEATURES, (width, width), activation)
    rows: list[list[object]] = []
    for damping in DAMPINGS:
        auto, seen = _auto(problem, damping, gib)
        known = estimates(shape_of(num, width, *seen), machine(), {}) if seen else blind
        run: dict[Contender, Took | None] = {"auto": auto}
        run |= {one: _cell(problem, one, known.get(one), damping, limit, gib) for one in SOLVERS}
        seconds = _repeated(problem, run, damping, gib)
        furthest = max((took.fall for took in run.values() if took), default=math.nan)
        told = {one: _told(took, seconds[one], furthest) for one, took in run.items() if took}
        found = [told[one] if one in told else _marked(known.get(one)) for one in SOLVERS]
        row: list[object] = ["none fits", None, None, None]
        if auto:
            enough = min(AS_FAR * furthest, auto.fall)
            far = [seconds[one] for one in SOLVERS if (took := run[one]) and took.fall >= enough]
            row = [
                auto.made.estimate.solver,
                auto.made.estimate.seconds,
                told["auto"],
                seconds["auto"] / min(far, default=math.nan),
            ]
        rows.append([name, damping, *found, *row])
        print(f"  {name}, damping {damping:g}: auto {row}; {told}", flush=True)
    return rows


def _auto(problem: Problem, damping: float, gib: float) -> tuple[Took | None, tuple[float, float] | None]:
    """With the seconds of its exploration, and the dimension and condition that it explored."""
    choice = Choice(GaussNewton(damping=damping, inner_tolerance=TOLERANCE, memory=gib), problem.objective)
    try:
        took = solve(problem, choice, damping=damping)
    except CannotTrain:
        return None, None
    state = choice.state()
    return took, (state["dimension"], state["condition"]) if state["dimension"] else None


def _cell(
    problem: Problem, solver: Solver, predicted: Estimate | None, damping: float, limit: float, gib: float
) -> Took | None:
    """None for what is not run."""
    if predicted is None or beyond(predicted, limit, gib):
        return None
    choice = Choice(
        GaussNewton(damping=damping, solver=solver, inner_tolerance=TOLERANCE, memory=gib), problem.objective
    )
    try:
        return solve(problem, choice, damping=damping)
    except CannotTrain:
        return None


def _repeated(
    problem: Problem, run: dict[Contender, Took | None], damping: float, gib: float
) -> dict[Contender, float]:
    """Median seconds of each, over rounds in which every one has its turn."""
    seconds = {one: [took.seconds] for one, took in run.items() if took}
    for _ in range(ROUNDS - 1):
        for one, found in seconds.items():
            if sum(found) < AGAIN_SECONDS:
                recipe = GaussNewton(solver=one, damping=damping, inner_tolerance=TOLERANCE, memory=gib)
                found.append(solve(problem, Choice(recipe, problem.objective), damping=damping).seconds)
    return {one: median(found) for one, found in seconds.items()}


def _told(took: Took, seconds: float, furthest: float) -> str:
    missed = "" if took.residual <= 2 * TOLERANCE else f", residual {took.residual:.0e}"
    return f"{seconds:.3g} s, {took.iterations}, {took.fall / furthest:.3f}{missed}"


def _marked(predicted: Estimate | None) -> str:
    """A prediction, told from a measurement by its brackets."""
    if predicted is None:
        return "-"
    return f"[{predicted.seconds:.2g} s, {predicted.bytes / 2**30:.2g} GiB]"


# -- float32 -----------------------------------------------------------------------------------------------------------


def stress() -> list[list[object]]:
    """By damping and solver, in float32: the residual that the solver states, and that of the normal equations with the
    Jacobian of the same weights in float64."""
    single = Problem.of(STRESS_ROWS, 2, STRESS_HIDDEN, "tanh")
    double = Problem.of(STRESS_ROWS, 2, STRESS_HIDDEN, "tanh", torch.float64)
    j = double.objective.jacobian(double.point.batch)
    image = j.t_mv(double.point.s)
    rows: list[list[object]] = []
    for damping in STRESS_DAMPINGS:
        found: list[object] = [damping]
        naive = _naive(single, damping)
        absolute = damping * float(j.diagonal().mean())
        for solver in (None, *STRESS_SOLVERS):
            step, stated = naive if solver is None else _stated(single, solver, damping)
            rest = j.t_mv(j.mv(step.double())) + absolute * step.double() - image
            true = float(rest.norm() / image.norm())
            found.append(f"{stated:.0e} / {true:.0e}")
        rows.append(found)
    return rows


STRESS_SOLVERS: tuple[Contender, ...] = (
    "auto",
    "exact",
    "cg",
    "rpchol",
    "nystrom",
    "sketch",
    "kfac",
)


def _stated(problem: Problem, solver: Contender, damping: float) -> tuple[Tensor, float]:
    recipe = GaussNewton(damping=damping, solver=solver, inner_tolerance=1e-6, inner_iterations=2000)
    took = solve(problem, Choice(recipe, problem.objective), tolerance=1e-6, damping=damping)
    return took.step, took.residual


def _naive(problem: Problem, damping: float) -> tuple[Tensor, float]:
    """Cholesky of K in float32, as one would write it; nan where it fails."""
    j = problem.objective.jacobian(problem.point.batch)
    gram = j.gram()
    gram.diagonal().add_(damping * float(j.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        return torch.full((j.num_columns,), math.nan), math.nan
    g = torch.cholesky_solve(problem.point.s[:, None], factor)[:, 0]
    return j.t_mv(g), float((gram @ g - problem.point.s).norm() / problem.point.s.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e4, 1e5, 1e6, 1e7])
    parser.add_argument("--activations", nargs="+", default=["tanh", "relu"])
    parser.add_argument("--limit-seconds", type=float, default=300.0)
    parser.add_argument("--limit-gib", type=float, default=16.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stress", action="store_true", help="only the float32 table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.stress:
        about = (
            f"n = {STRESS_ROWS}, tanh 2-64-64-1, iterative solvers to 1e-6: the relative residual that the solver "
            "states (of its own system) / that of the normal equations in float64"
        )
        header = ["relative damping", "Cholesky of K in float32, by hand", *STRESS_SOLVERS]
        report.write(
            "solvers-float32", "One damped system in float32 as the damping falls", [(about, header, stress())]
        )
        return
    warm = Problem.of(50, FEATURES, (8, 8), "tanh")
    for one in SOLVERS:  # rates are measured and code is loaded once in a process, at nobody's cost
        solve(warm, Choice(GaussNewton(solver=one), warm.objective), damping=1e-2)
    about = (
        f"Seconds to set up and solve, iterations (of direct solvers 1), to {TOLERANCE:g}, and the fall of the "
        f"quadratic model as a part of the furthest in the row; d = {FEATURES}, float32; in brackets, and not run: "
        f"predicted beyond {arguments.limit_seconds:g} s or {arguments.limit_gib:g} GiB. Seconds are medians of up to "
        f"{ROUNDS} solves, of fewer where these took {AGAIN_SECONDS:g} s. Those of auto include its exploration, the "
        f"prediction does not; the ratio is to the quickest of those that fell by {AS_FAR:g} of the furthest, or as "
        "far as auto."
    )
    header = ["n x p", "damping", *SOLVERS, "auto chose", "predicted seconds", "auto", "ratio"]
    for num in arguments.rows:
        table: list[list[object]] = []
        for parameters in arguments.parameters:
            for activation in arguments.activations:
                table += cells(num, parameters, activation, arguments.limit_seconds, arguments.limit_gib)
        report.write(f"solvers-{num}", f"One damped system of {num} rows by every solver", [(about, header, table)])


if __name__ == "__main__":
    main()
