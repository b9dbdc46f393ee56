"""Wide networks with one trained ReLU layer, the setting of the published method: `python benchmarks/two_layer.py`.

Three parts, `--parts fit step published`:

  fit        n = 1000, d = 16, m = 16384: the sum of squares by step for the solvers, Adam and L-BFGS at the same
             seconds, and R2 on other rows beside that of kernel ridge (the kernel of the network at its start), ridge
             on the network's random features, and a linear model. x uniform on the sphere, y = standardised
             sin(3 x_1) + x_2 x_3.
  step       n = 4096 and m from 16384 on: seconds of the second step by solver, each in a process of its own; the
             exponent of their growth in m, and from which m on the sketch is faster.
  published  the published algorithm at n = 200 and m from 5 n to 80 n: contraction by step, and seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import piecework
import report
from fits import cosine
from piecework import LBFGS, Adam, Batch, GaussNewton, data, losses
from piecework.history import memory
from piecework.models import two_layer_relu

FEATURES = 16
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RIDGES = tuple(10.0**k for k in range(-9, 1))
"""Of the mean diagonal of the kernel."""
HELD_OUT = 1000
"""Rows to choose ridges and rates by, and as many to test on."""
TUNING_SEED = 100
STEPS = 6
DAMPING = 1e-3
"""At the start of the second part, for every solver."""


@dataclass(frozen=True)
class Variant:
    name: str
    recipe: GaussNewton


VARIANTS = (
    Variant("auto", GaussNewton()),
    Variant("exact", GaussNewton(solver="exact")),
    Variant("cg", GaussNewton(solver="cg")),
    Variant("sketch (units)", GaussNewton(solver="sketch")),
    Variant("sketch (tensorsketch)", GaussNewton(solver="sketch", sketch="tensorsketch", sketch_rows=2.0)),
)
ONE_STEP = VARIANTS[1:]


def rows_of(num: int, seed: int) -> Batch:
    generator = piecework.training.stream(seed, num)
    x = torch.randn(num, FEATURES, generator=generator, dtype=torch.float64)
    x /= x.norm(dim=1, keepdim=True)
    y = torch.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2]
    return Batch(x.float(), ((y - y.mean()) / y.std())[:, None].float())


def samples(num: int, seed: int) -> data.Dataset:
    """num training rows, and as many others to choose by and to test on as HELD_OUT says; targets are standardised
    together."""
    every = rows_of(num + 2 * HELD_OUT, seed)
    ends = (0, num, num + HELD_OUT, num + 2 * HELD_OUT)
    train, choose, test = (Batch(every.x[a:b], every.y[a:b]) for a, b in pairwise(ends))
    zeros = torch.zeros(FEATURES)
    return data.Dataset("sphere", train, choose, test, "regression", zeros, zeros + 1)


# -- fit ---------------------------------------------------------------------------------------------------------------


def curve(
    method: piecework.Method, set_: data.Dataset, width: int, seed: int, **limits: Any
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """(seconds, sum of squares) by row, and the row that validation chose: the last for a method that only falls."""
    loss, model = losses.Squared(), two_layer_relu(FEATURES, width, seed=seed)
    training = method.bind(model, loss)
    history = piecework.fit(
        training, set_, loss=loss, batch_size=len(set_.train), seed=seed, evaluate_every=1, **limits
    )
    found = [(row["seconds"], row["train"]["loss"] * len(set_.train)) for row in history.rows if row["train"]["loss"]]
    return found, history.best or history.rows[-1]


def scheduled(lr: float, set_: data.Dataset, width: int, seconds: float) -> Adam:
    return cosine(Adam(lr=lr), two_layer_relu(FEATURES, width, seed=TUNING_SEED), set_, seconds, seconds / 5)


def tuned_rate(set_: data.Dataset, width: int, seconds: float) -> float:
    """By the sum of squares from a start of its own."""
    ends = [
        curve(scheduled(lr, set_, width, seconds), set_, width, TUNING_SEED, seconds=seconds)[0][-1][1] for lr in RATES
    ]
    return RATES[ends.index(min(ends))]


def r2(prediction: Tensor, y: Tensor) -> float:
    return 1 - float((prediction - y).square().sum() / (y - y.mean()).square().sum())


def ridge(kernels: list[Tensor], set_: data.Dataset) -> tuple[float, float]:
    """Test R2 and the chosen ridge of kernel ridge regression; kernels: of all rows with the training rows, by part."""
    assert set_.validation is not None
    assert set_.test is not None
    train, choose, test = (kernel.double() for kernel in kernels)
    unit, y = float(train.diagonal().mean()), set_.train.y.double()
    best = (-np.inf, 0.0, 0.0)
    for part in RIDGES:
        weights = torch.linalg.solve(train + part * unit * torch.eye(len(train), dtype=torch.float64), y)
        best = max(best, (r2(choose @ weights, set_.validation.y), r2(test @ weights, set_.test.y), part))
    return best[1], best[2]


@torch.no_grad()
def floors(set_: data.Dataset, width: int, seed: int) -> list[list[object]]:
    """Models that train no hidden layer, the first with the network's own K at its start."""
    layer = two_layer_relu(FEATURES, width, seed=seed)[0]
    parts = [part.x for part in (set_.train, set_.validation, set_.test) if part is not None]
    hidden = [layer(x) for x in parts]
    active = [(h > 0).float() for h in hidden]
    features = [h.clamp_min(0) / width**0.5 for h in hidden]
    kinds = {
        "kernel ridge, K at the start": [
            (x @ parts[0].t()) * (d @ active[0].t()) / width for x, d in zip(parts, active, strict=True)
        ],
        "ridge on random features": [one @ features[0].t() for one in features],
        "linear model": [x @ parts[0].t() for x in parts],
    }
    return [[name, *ridge(kernels, set_)] for name, kernels in kinds.items()]


def fit_part(num: int, width: int, seeds: int) -> list[tuple[str, list[str], list[list[object]]]]:
    text = (
        f"n = {num}, d = {FEATURES}, m = {width}, float32; seeds 0..{seeds - 1}, medians [range] where there are "
        f"several; adam with all rows in a step, learning rate from {RATES} by the sum of squares from seed "
        f"{TUNING_SEED}, half a cosine over the steps that the seconds allow; adam and lbfgs at the seconds of "
        f"each step of gauss-newton (auto). R2 on {HELD_OUT} other rows at the row that "
        f"{HELD_OUT} more chose; ridges from 1e-9 to 1 of the mean diagonal, chosen alike."
    )
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    tests: dict[str, list[float]] = {}
    warm = samples(50, 0)
    for variant in VARIANTS:  # what is measured or compiled once in a process is not a cost of the first solver
        curve(variant.recipe, warm, 64, 0, steps=1)
    lr: float | None = None
    for seed in range(seeds):
        set_ = samples(num, seed)
        at = [0.0]
        for variant in VARIANTS:
            found, chosen = curve(variant.recipe, set_, width, seed, steps=STEPS)
            curves.setdefault(variant.name, []).append(found)
            tests.setdefault(variant.name, []).append(chosen["test"]["score"])
            at = [seconds for seconds, _ in found] if variant.name == "auto" else at
            print(f"  {variant.name} seed {seed}: {found[-1][1]:.1e} after {found[-1][0]:.2f} s", flush=True)
        lr = lr or tuned_rate(samples(num, TUNING_SEED), width, at[-1])
        adam = scheduled(lr, set_, width, at[-1])
        for name, method in ((f"adam (lr {lr:g})", adam), ("lbfgs", LBFGS())):
            found, chosen = curve(method, set_, width, seed, seconds=at[-1])
            then = [next((pair for pair in reversed(found) if pair[0] <= moment), (moment, None)) for moment in at]
            curves.setdefault(name, []).append(then)
            tests.setdefault(name, []).append(chosen["test"]["score"])
            print(f"  {name} seed {seed}: {found[-1][1]:.1e}", flush=True)
    rows = []
    for name, runs in curves.items():
        steps = [report.median([run[k][1] if k < len(run) else None for run in runs]) for k in range(STEPS)]
        rows.append([name, *steps, report.median([run[-1][0] for run in runs]), report.spread(tests[name])])
    below = [floors(samples(num, seed), width, seed) for seed in range(seeds)]
    for position, (name, *_) in enumerate(below[0]):
        chosen = report.spread([float(str(one[position][1])) for one in below])
        rows.append([name, *[None] * STEPS, None, chosen])
    header = ["", *(f"step {k + 1}" for k in range(STEPS)), "seconds", "test R2"]
    return [(text, [], []), ("Sum of squares by step", header, rows)]


# -- step --------------------------------------------------------------------------------------------------------------


def cell(num: int, width: int, name: str, repeats: int) -> dict[str, Any]:
    """Seconds of a step, after one that is not timed; the median of some. For a process of its own."""
    batch, model = rows_of(num, 0), two_layer_relu(FEATURES, width, seed=0)
    recipe = next(variant.recipe for variant in VARIANTS if variant.name == name)
    recipe = replace(recipe, inner_tolerance=1e-2, damping=DAMPING, geodesic=False)
    training = recipe.bind(model, losses.Squared())
    took, row = [], training.step(batch)
    for _ in range(repeats):
        began = time.perf_counter()
        row = training.step(batch)
        took.append(time.perf_counter() - began)
    figures = {name: float(row[name]) for name in ("iterations", "rejected", "linear_residual", "predicted_seconds")}
    return {"seconds": float(np.median(took)), "peak_mb": memory()[0], **figures}


def step_part(num: int, widths: list[int], repeats: int) -> list[tuple[str, list[str], list[list[object]]]]:
    rows: list[list[object]] = []
    seconds: dict[str, dict[int, float]] = {variant.name: {} for variant in ONE_STEP}
    for width in widths:
        for variant in ONE_STEP:
            command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--cell"]
            asked = json.dumps({"num": num, "width": width, "name": variant.name, "repeats": repeats})
            ran = subprocess.run([*command, asked], capture_output=True, text=True)
            if ran.returncode:
                why = ran.stderr.strip().splitlines()[-1][:160] if ran.stderr.strip() else "killed, out of memory"
                rows.append([width, variant.name, why, None, None, None, None])
                continue
            found = json.loads(ran.stdout.splitlines()[-1])
            seconds[variant.name][width] = found["seconds"]
            rows.append([width, variant.name, found["seconds"], found["predicted_seconds"], found["iterations"],
                         found["linear_residual"], found["peak_mb"]])  # fmt: skip
            print(f"  m = {width}, {variant.name}: {found['seconds']:.2f} s, {found['peak_mb']} MB", flush=True)
    header = ["m", "solver", "seconds", "predicted", "iterations", "linear residual", "peak MB of the process"]
    growth: list[list[object]] = []
    for name, points in seconds.items():
        slope = None
        if len(points) > 1:
            slope = float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])
        shared = [m for m in points if m in seconds["exact"]]
        slower = [m for m in shared if points[m] >= seconds["exact"][m]]
        faster = [m for m in shared if m > max(slower, default=0)]  # and at all wider ones too
        ratios = ", ".join(f"{seconds['exact'][m] / points[m]:.2f}" for m in points if m in seconds["exact"])
        growth.append([name, slope, ratios, min(faster, default=None)])
    columns = ["solver", "exponent in m", f"ratio exact / solver at m = {', '.join(map(str, widths))}", "faster from m"]
    text = (
        f"n = {num}, d = {FEATURES}, float32; seconds of one step, the median of {repeats} after a first one; linear "
        f"systems to a relative residual of 1e-2, damped by {DAMPING:g} at the first step, without geodesic correction"
    )
    return [(text, header, rows), ("Growth with the width, by a log-log fit", columns, growth)]


# -- published ---------------------------------------------------------------------------------------------------------


def published_part(num: int, multiples: list[int], steps: int) -> list[tuple[str, list[str], list[list[object]]]]:
    rows: list[list[object]] = []
    batch = rows_of(num, 0)
    batch = Batch(batch.x.double(), batch.y.double())
    for multiple in multiples:
        width = multiple * num
        model = two_layer_relu(FEATURES, width, seed=0, dtype=torch.float64)
        training = GaussNewton(faithful=True).bind(model, losses.Squared())
        shrunk, inner, took = [], [], []
        for _ in range(steps):
            began = time.perf_counter()
            row = training.step(batch)
            took.append(time.perf_counter() - began)
            shrunk.append(float(row["contraction"]))
            inner.append(int(row["iterations"]))
        eps = float(row["inner_tolerance"])
        rows.append([width, *shrunk, eps, f"{min(inner)}-{max(inner)}", float(np.median(took))])
        print(f"  published, m = {width}: {took[-1]:.2f} s a step", flush=True)
    text = (
        f"The published algorithm, n = {num}, d = {FEATURES}, float64: |r_t+1| / |r_t| by step (the theorem says at "
        "most 1/2), the tolerance of its linear systems, the iterations of its descent, and seconds of a step"
    )
    header = ["m", *(f"step {k + 1}" for k in range(steps)), "tolerance", "iterations", "seconds a step"]
    return [(text, header, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["fit", "step", "published"], default=["fit", "step", "published"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, help="n, in place of 1000, 4096 and 200")
    parser.add_argument("--width", type=int, default=16384, help="m of the first part")
    parser.add_argument("--widths", type=int, nargs="+", default=[16384, 32768, 65536, 131072], help="of the second")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--multiples", type=int, nargs="+", default=[5, 10, 20, 40, 80], help="m / n of the third")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cell:
        print(json.dumps(cell(**json.loads(arguments.cell))))
        return
    makers = {
        "fit": partial(fit_part, arguments.rows or 1000, arguments.width, arguments.seeds),
        "step": partial(step_part, arguments.rows or 4096, arguments.widths, arguments.repeats),
        "published": partial(published_part, arguments.rows or 200, arguments.multiples, 5),
    }
    sections = [section for name, make in makers.items() if name in arguments.parts for section in make()]
    report.write("two-layer", "Wide networks with one trained ReLU layer", sections)


if __name__ == "__main__":
    main()
