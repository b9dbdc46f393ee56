"""The Poisson equation on the unit square by a network, in float64: `python benchmarks/poisson.py`.

-Laplace u = f with u = sin(pi x) sin(pi y), which is 0 on the boundary; a tanh network 2-64-1 (257 parameters), 900
points inside and 120 on the boundary. The loss is the mean square of the equation's residuals inside and that of u on
the boundary. Relative L2 error of u on a grid of 101 x 101 points. Adam's learning rate is chosen by the loss from a
start of its own (seed 100), with a third of the seconds for each trial; everything else runs with its defaults.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import hessian, jvp, vmap

import piecework
import report
from fits import at_rest, cosine, errors_of, pace
from piecework import LBFGS, Adam, Batch, GaussNewton, data, losses
from piecework.nn import Residual

WIDTH, INSIDE, BOUNDARY, GRID = 64, 900, 120, 101
WEIGHT_INSIDE, WEIGHT_BOUNDARY = (math.sqrt((INSIDE + BOUNDARY) / part) for part in (INSIDE, BOUNDARY))
"""The mean over all points of the squares is then the sum of the two means."""
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEED = 100


def exact(p: Tensor) -> Tensor:
    return (torch.sin(math.pi * p[:, 0]) * torch.sin(math.pi * p[:, 1]))[:, None]


def samples() -> data.Dataset:
    """Points (x, y, whether inside), the same for all seeds; residuals are to be 0."""
    generator = piecework.training.stream(0)
    inside = torch.rand(INSIDE, 2, generator=generator, dtype=torch.float64)
    along = torch.rand(BOUNDARY, generator=generator, dtype=torch.float64)
    side = torch.arange(BOUNDARY) % 4
    across = (side % 2).to(torch.float64)
    boundary = torch.where((side < 2)[:, None], torch.stack([along, across], 1), torch.stack([across, along], 1))
    points = torch.cat([inside, boundary])
    kind = torch.cat([torch.ones(INSIDE), torch.zeros(BOUNDARY)]).to(torch.float64)[:, None]
    x = torch.cat([points, kind], 1)
    y = torch.zeros(len(x), 1, dtype=torch.float64)
    return data.Dataset("poisson", Batch(x, y), None, None, "regression", torch.zeros(3), torch.ones(3))


# -- three ways to write the Laplacian ---------------------------------------------------------------------------------

Laplacian = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
"""A network and points (n, 2) -> u and its Laplacian, (n, 1) each."""


def by_hessian(network: nn.Module, p: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes first: the Hessian of each point, and its trace."""
    trace = vmap(lambda q: hessian(lambda r: network(r[None])[0, 0])(q).diagonal().sum())(p)
    return network(p), trace[:, None]


def by_jvp(network: nn.Module, p: Tensor) -> tuple[Tensor, Tensor]:
    """Forward mode twice along each axis; rows of a network do not mix, so that one tangent serves all points."""

    def second(axis: Tensor) -> tuple[Tensor, Tensor]:
        tangent = axis.expand_as(p)
        (u, _), (_, bend) = jvp(lambda q: jvp(network, (q,), (tangent,)), (p,), (tangent,))
        return u, bend

    u, bends = vmap(second, out_dims=0)(torch.eye(2, dtype=p.dtype))
    return u[0], bends.sum(0)


def by_layers(network: nn.Module, p: Tensor) -> tuple[Tensor, Tensor]:
    """Value, gradient and Laplacian pushed through the layers together (the forward Laplacian of Li et al., arXiv
    2307.08214): h, (2, n, w) and (n, w). For linear layers and tanh."""
    u, slope = p, torch.eye(2, dtype=p.dtype)[:, None, :]
    bend = torch.zeros_like(p)
    assert isinstance(network, nn.Sequential)
    for layer in network:
        if isinstance(layer, nn.Linear):
            u, slope, bend = layer(u), slope @ layer.weight.t(), bend @ layer.weight.t()
        else:
            u = torch.tanh(u)
            first = 1 - u * u
            bend = first * (bend - 2 * u * slope.square().sum(0))
            slope = first * slope
    return u, bend


LAPLACIANS: dict[str, Laplacian] = {"hessian": by_hessian, "jvp": by_jvp, "layers": by_layers}


def residuals(laplacian: Laplacian) -> Callable[[nn.Module, Tensor], Tensor]:
    def function(network: nn.Module, x: Tensor) -> Tensor:
        p = x[:, :2]
        u, bend = laplacian(network, p)
        equation = WEIGHT_INSIDE * (bend + 2 * math.pi**2 * exact(p))
        return torch.where(x[:, 2:] > 0.5, equation, WEIGHT_BOUNDARY * u)

    return function


def model(laplacian: Laplacian, seed: int) -> Residual:
    network = piecework.models.mlp(2, (WIDTH,), 1, activation="tanh", seed=seed, dtype=torch.float64)
    return Residual(network, residuals(laplacian))


def error(network: nn.Module) -> float:
    axis = torch.linspace(0, 1, GRID, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        u = network(grid)
    return float((u - exact(grid)).norm() / exact(grid).norm())


def milliseconds(method: piecework.Method, laplacian: Laplacian, set_: data.Dataset, seconds: float) -> float:
    return 1e3 / pace(method, model(laplacian, TUNING_SEED), losses.Squared(), set_, len(set_.train), seconds)


# -- runs --------------------------------------------------------------------------------------------------------------


def run(
    method: piecework.Method, laplacian: Laplacian, set_: data.Dataset, seed: int, seconds: float
) -> dict[str, Any]:
    """The last row, with `error`, and `times`: seconds until the error was below 1e-4, 1e-5, ... for the first time."""
    network, loss = model(laplacian, seed), losses.Squared()
    training = method.bind(network, loss)
    errors: list[tuple[float, float]] = []
    rest = at_rest()

    def look(row: dict[str, Any]) -> bool:
        errors.append((row["seconds"], error(network.network)))
        return isinstance(method, LBFGS) and rest(row)

    steps = {"steps": method.schedule_steps} if isinstance(method, Adam) and method.schedule_steps else {}
    every = 50 if training.batches == "mini" else None
    history = piecework.fit(
        training,
        set_,
        loss=loss,
        batch_size=len(set_.train),
        seconds=seconds,
        evaluate_every=every,
        on_row=look,
        **steps,
    )
    times = {goal: next((at for at, found in errors if found <= goal), None) for goal in GOALS}
    return {**history.rows[-1], "error": errors[-1][1], "times": times}


GOALS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def scheduled(adam: Adam, laplacian: Laplacian, set_: data.Dataset, seconds: float) -> Adam:
    return cosine(adam, model(laplacian, TUNING_SEED), set_, seconds, min(2.0, seconds / 10))


def tuned_rate(laplacian: Laplacian, set_: data.Dataset, seconds: float) -> float:
    found = []
    for rate in RATES:
        recipe = scheduled(Adam(lr=rate), laplacian, set_, seconds / 3)
        loss = run(recipe, laplacian, set_, TUNING_SEED, seconds / 3)["train"]["loss"]
        found.append(math.inf if loss is None else loss)
        print(f"  tune adam {rate:g}: loss {found[-1]:.2e}", flush=True)
    return RATES[found.index(min(found))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--laplacian", choices=sorted(LAPLACIANS), default="layers")
    parser.add_argument("--only", nargs="+", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    set_, laplacian, seconds = samples(), LAPLACIANS[arguments.laplacian], arguments.seconds
    methods: dict[str, piecework.Method] = {
        "gauss-newton": GaussNewton(),
        "gauss-newton, geodesic off": GaussNewton(geodesic=False),
        "lbfgs": LBFGS(),
        "lbfgs, 100 pairs": LBFGS(history=100),
        "adam": Adam(),
    }
    paces = []
    for name, one in LAPLACIANS.items():
        each = [milliseconds(m, one, set_, min(3.0, seconds / 10)) for m in (GaussNewton(), LBFGS(), Adam())]
        paces.append([name, *each])
        print(f"  {name}: {each[0]:.1f} ms a step of gauss-newton", flush=True)
    rows = []
    chosen = {name: method for name, method in methods.items() if not arguments.only or name in arguments.only}
    lr = tuned_rate(laplacian, set_, seconds) if "adam" in chosen else 0.0
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for seed in range(arguments.seeds):  # every method in its turn: machines do not keep their pace
        for name, method in chosen.items():
            began = time.perf_counter()
            if isinstance(method, Adam):
                method = scheduled(Adam(lr=lr), laplacian, set_, seconds)
            runs[name].append(run(method, laplacian, set_, seed, seconds))
            print(
                f"  {name} seed {seed}: {runs[name][-1]['error']:.2e}, {time.perf_counter() - began:.0f} s", flush=True
            )
    for name, found in runs.items():
        shown = f"adam (lr {lr:g})" if name == "adam" else name
        rows.append([
            shown,
            errors_of(tuple(row["error"] for row in found)),
            errors_of(tuple(row["train"]["loss"] for row in found)),
            report.median([row["step"] for row in found]),
            report.median([row["seconds"] for row in found]),
            *(report.median([row["times"][goal] for row in found]) for goal in GOALS),
        ])  # fmt: skip
    until = [f"seconds to {goal:g}" for goal in GOALS]
    report.write(
        "poisson",
        "Poisson equation, 257 parameters: relative L2 error of the solution",
        [
            (f"{INSIDE} points inside, {BOUNDARY} on the boundary, the same for all seeds; {seconds:g} s each; seeds "
             f"0..{arguments.seeds - 1}, medians [range]; Laplacian by {arguments.laplacian}; lbfgs with "
             f"{LBFGS().history} pairs where nothing else is said; adam with all points in "
             f"a step, learning rate from {RATES} by the loss from seed {TUNING_SEED} with a third of the seconds "
             "each, half a cosine over the steps that the seconds allow; seconds to an error are those of the first "
             "evaluation below it.", [], []),
            ("", ["method", "error", "loss", "steps", "seconds", *until], rows),
            ("Milliseconds of a step by how the Laplacian is written",
             ["Laplacian", "gauss-newton", "lbfgs", "adam"], paces),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
