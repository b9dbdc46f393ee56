"""Fit a function very closely with a small tanh network in float64: `python 03_fit_to_machine_precision.py`.

The network is given as a module, the points as one Batch, and the loop is written out. The error goes on falling by
orders of magnitude as the steps are damped less and less.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import piecework
from piecework import Batch, losses
from piecework.models import mlp

FUNCTIONS = {
    "sin": lambda x: torch.sin(2 * math.pi * x),
    "runge": lambda x: 1 / (1 + 25 * x**2),
    "fast": lambda x: torch.sin(8 * math.pi * x),
}


def relative_error(network: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((network(x) - y).norm() / y.norm())


def main(words: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--function", choices=sorted(FUNCTIONS), default="sin")
    parser.add_argument("--units", type=int, default=25)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args(words)
    function = FUNCTIONS[arguments.function]

    x = torch.linspace(-1, 1, 2003, dtype=torch.float64)[:, None]
    finer = torch.linspace(-1, 1, 9999, dtype=torch.float64)[:, None]
    network = torch.nn.Sequential(
        piecework.nn.Standardise(x.mean(0), x.std(0)),
        mlp(1, [arguments.units], 1, activation="tanh", dtype=torch.float64),
    )
    training = piecework.GaussNewton().bind(network, losses.Squared())
    points = Batch(x, function(x))
    for step in range(1, arguments.steps + 1):
        figures = training.step(points)
        if step in (1, 3, 10, 30, 100) or step % 200 == 0:
            error = relative_error(network, x, points.y)
            print(f"step {step:4}  relative error {error:.1e}  damping {float(figures['damping']):.1e}")
    error = relative_error(network, finer, function(finer))
    print(f"on a finer grid: {error:.1e}")
    return error


if __name__ == "__main__":
    main()
