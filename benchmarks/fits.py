"""Fits of functions of one variable by one hidden tanh layer, in float64: `python benchmarks/fits.py`.

sin(2 pi x), 1 / (1 + 25 x^2) and sin(8 pi x) on 2003 equidistant points of [-1, 1]; relative L2 error on these points,
and on the finer grid between them. Adam's learning rate is chosen by its error on the training points from a start of
its own (seed 100), with a third of the seconds for each trial; everything else runs with its defaults, or as the
table says. `--peers` writes a table of its own: the least-squares codes of scipy, torch-levenberg-marquardt and
optimistix from the same weights.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import piecework
import report
from piecework import LBFGS, Adam, Batch, GaussNewton, data, losses
from piecework.batches import deal
from piecework.nn import Standardise

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "sin(2 pi x)": lambda x: torch.sin(2 * math.pi * x),
    "1 / (1 + 25 x^2)": lambda x: 1 / (1 + 25 * x.square()),
    "sin(8 pi x)": lambda x: torch.sin(8 * math.pi * x),
}
POINTS = 2003
FINER = 10 * (POINTS - 1) + 1
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
TUNING_SEED = 100
WARM_UP = 5
"""Steps that are not timed: the first ones of a process allocate and compile."""


def points(curve: Callable[[Tensor], Tensor], num: int) -> Batch:
    x = torch.linspace(-1, 1, num, dtype=torch.float64)[:, None]
    return Batch(x, curve(x))


def samples(name: str) -> data.Dataset:
    train = points(CURVES[name], POINTS)
    return data.Dataset(
        name, train, None, points(CURVES[name], FINER), "regression", train.x.mean(0), train.x.std(0, correction=0)
    )


def model(set_: data.Dataset, width: int, seed: int) -> nn.Sequential:
    network = piecework.models.mlp(1, (width,), 1, activation="tanh", seed=seed, dtype=torch.float64)
    return nn.Sequential(OrderedDict(scaling=Standardise(set_.mean, set_.scale), network=network))


def relative(loss: float | None, part: Batch) -> float | None:
    """Of a mean squared error: |z - y| / |y|."""
    return None if loss is None else math.sqrt(loss / float(part.y.square().mean()))


def pace(
    method: piecework.Method, network: nn.Module, loss: losses.Loss, set_: data.Dataset, batch_size: int, seconds: float
) -> float:
    """Steps a second, over that many seconds after a warm-up; for schedules that end where the seconds do."""
    training = method.bind(network, loss)
    feed = deal(training, set_.train, rank=0, size=1, batch_size=batch_size, seed=0)
    for step in range(WARM_UP):
        training.step(feed.batch(step))
    began, step = time.perf_counter(), WARM_UP
    while time.perf_counter() - began < seconds:
        training.step(feed.batch(step))
        step += 1
    return (step - WARM_UP) / (time.perf_counter() - began)


def cosine(adam: Adam, network: nn.Module, set_: data.Dataset, seconds: float, look: float) -> Adam:
    """With half a cosine over the steps of all points that the seconds allow, at the pace of the seconds of a look."""
    rate = pace(adam, network, losses.Squared(), set_, len(set_.train), look)
    return replace(adam, schedule="cosine", schedule_steps=max(1, int(rate * seconds)))


def scheduled(adam: Adam, set_: data.Dataset, width: int, seconds: float) -> Adam:
    return cosine(adam, model(set_, width, TUNING_SEED), set_, seconds, min(2.0, seconds / 10))


def at_rest() -> Callable[[dict[str, Any]], bool]:
    """Whether two rows in a row have stalled, the second from steepest descent: L-BFGS can go no further then, and
    returns at once."""
    before = False

    def look(row: dict[str, Any]) -> bool:
        nonlocal before
        stalled, before = before, row.get("stalled") == 1.0
        return stalled and before

    return look


def run(method: piecework.Method, set_: data.Dataset, width: int, seed: int, seconds: float) -> list[object]:
    """[train error, test error, steps, seconds] at the end."""
    loss = losses.Squared()
    training = method.bind(model(set_, width, seed), loss)
    every = 50 if training.batches == "mini" else None
    stop = {"on_row": at_rest()} if isinstance(method, LBFGS) else {}
    steps = {"steps": method.schedule_steps} if isinstance(method, Adam) and method.schedule_steps else {}
    history = piecework.fit(
        training, set_, loss=loss, batch_size=POINTS, seconds=seconds, evaluate_every=every, seed=seed, **steps, **stop
    )
    last = history.rows[-1]
    assert set_.test is not None
    train, test = relative(last["train"]["loss"], set_.train), relative(last["test"]["loss"], set_.test)
    return [train, test, last["step"], last["seconds"]]


def tuned_rate(set_: data.Dataset, width: int, seconds: float) -> float:
    """By the train error from seed 100, a third of the seconds for each rate."""
    errors = []
    for rate in RATES:
        recipe = scheduled(Adam(lr=rate), set_, width, seconds / 3)
        errors.append(run(recipe, set_, width, TUNING_SEED, seconds / 3)[0])
        print(f"  tune adam {rate:g}: {errors[-1]:.2e}", flush=True)
    return RATES[min(range(len(RATES)), key=lambda i: math.inf if errors[i] is None else errors[i])]


def floor(set_: data.Dataset, width: int, seed: int, scale: float) -> list[object]:
    """[train error, test error, steps, seconds] with the hidden layer random, and the output layer by least squares.

    Its slopes are normal with that deviation, its kinks uniform over the interval."""
    began = time.perf_counter()
    generator = piecework.training.stream(seed, width)
    slope = scale * torch.randn(1, width, generator=generator, dtype=torch.float64)
    kink = 2 * torch.rand(width, generator=generator, dtype=torch.float64) - 1
    assert set_.test is not None

    def features(x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(slope * (x - kink)), torch.ones_like(x)], 1)

    weights = torch.linalg.lstsq(features(set_.train.x), set_.train.y, driver="gelsd").solution
    errors = [
        relative(float((features(part.x) @ weights - part.y).square().mean()), part) for part in (set_.train, set_.test)
    ]
    return [*errors, 1, time.perf_counter() - began]


def best_floor(set_: data.Dataset, width: int) -> float:
    """The scale of slopes with the least train error from seed 100."""
    return min(SCALES, key=lambda scale: float(str(floor(set_, width, TUNING_SEED, scale)[0])))


def peer_rows(set_: data.Dataset, width: int, seed: int, seconds: float, name: str) -> list[object] | None:
    """[train error, test error, steps, seconds] of somebody else's code from our start; None where it is missing."""
    import peers

    network = model(set_, width, seed)
    took = peers.run(name, network, set_.train, seconds)
    if took is None:
        return None
    assert set_.test is not None
    with torch.no_grad():
        found = [relative(float((network(p.x) - p.y).square().mean()), p) for p in (set_.train, set_.test)]
    return [*found, *took]


OWN = (
    "gauss-newton",
    "gauss-newton, geodesic off",
    "gauss-newton, output eliminated",
    "lbfgs",
    "lbfgs, 100 pairs",
    "adam",
    "floor",
)
PEERS = ("gauss-newton", "scipy trf", "scipy lm", "torch-levenberg-marquardt", "optimistix")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 77])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], help="some of the names in the first column of the table")
    parser.add_argument("--peers", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = arguments.seconds
    about = (
        f"{POINTS} training points; tested on {FINER} points; {seconds:g} s each; seeds 0..{arguments.seeds - 1}, "
        "medians [range]"
    )
    if arguments.peers:
        about += "; threads of codes other than torch's are not limited, and compilation is not counted"
    else:
        about += (
            f"; lbfgs with {LBFGS().history} pairs where nothing else is said; adam with all points in a step, "
            f"learning rate from {RATES} on seed {TUNING_SEED} with a third of the seconds each, half a "
            "cosine over the steps that the seconds allow; floor: slopes of a random hidden layer "
            f"from {SCALES} by train error on seed {TUNING_SEED}"
        )
    sections: list[tuple[str, list[str], list[list[object]]]] = [(f"{about}.", [], [])]
    names = PEERS if arguments.peers else OWN
    if unknown := set(arguments.only) - set(names):
        parser.error(f"no {', '.join(sorted(unknown))} among {', '.join(names)}")
    names = tuple(name for name in names if not arguments.only or name in arguments.only)
    for curve in CURVES:
        set_ = samples(curve)
        for width in arguments.widths:
            print(f"{curve}, width {width}", flush=True)
            rows = _rows(names, set_, width, arguments.seeds, seconds)
            header = ["method", "train error", "test error", "steps", "seconds"]
            sections.append((f"{curve}, one hidden layer of {width}", header, rows))
    file, title = ("fits-peers", ", by several codes") if arguments.peers else ("fits", "")
    report.write(file, f"Functions of one variable: relative L2 error{title}", sections)


Run = Callable[[int], list[object] | None]


def _rows(names: Sequence[str], set_: data.Dataset, width: int, seeds: int, seconds: float) -> list[list[object]]:
    """Seed by seed, every contender in its turn: machines do not keep their pace."""
    contenders = [_contender(name, set_, width, seconds) for name in names]
    found: dict[str, list[list[object]]] = {shown: [] for shown, _ in contenders}
    for seed in range(seeds):
        for shown, run_ in contenders:
            row = run_(seed)
            found[shown] += [row] if row else []
            print(f"  {shown} seed {seed}: {'not installed' if row is None else row[0]}", flush=True)
    rows: list[list[object]] = []
    for shown, runs in found.items():
        if not runs:
            rows.append([shown, "not installed", None, None, None])
            continue
        train, test, steps, took = zip(*runs, strict=True)
        rows.append([shown, errors_of(train), errors_of(test), report.median(steps), report.median(took)])
    return rows


def _contender(name: str, set_: data.Dataset, width: int, seconds: float) -> tuple[str, Run]:
    """What the table calls it, tuned where it is tuned, and how it runs from a seed."""
    methods: dict[str, piecework.Method] = {
        "gauss-newton": GaussNewton(),
        "gauss-newton, geodesic off": GaussNewton(geodesic=False),
        "gauss-newton, output eliminated": GaussNewton(eliminate_output=True),
        "lbfgs": LBFGS(),
        "lbfgs, 100 pairs": LBFGS(history=100),
    }
    if name in methods:
        return name, lambda seed: run(methods[name], set_, width, seed, seconds)
    if name == "adam":
        lr = tuned_rate(set_, width, seconds)
        return f"adam (lr {lr:g})", lambda seed: run(
            scheduled(Adam(lr=lr), set_, width, seconds), set_, width, seed, seconds
        )
    if name == "floor":
        scale = best_floor(set_, width)
        return f"floor (slopes {scale:g})", lambda seed: floor(set_, width, seed, scale)
    return name, lambda seed: peer_rows(set_, width, seed, seconds, name)


def errors_of(values: tuple[float | None, ...]) -> str:
    """Median and range: errors span many powers of ten."""
    middle, known = report.median(values), [value for value in values if value is not None]
    if middle is None:
        return "not finite"
    return f"{middle:.1e} [{min(known):.1e}, {max(known):.1e}]" if len(known) > 1 else f"{middle:.1e}"


if __name__ == "__main__":
    main()
