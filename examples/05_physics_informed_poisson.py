"""Solve -(u_xx + u_yy) = f on the unit square with u = 0 on its boundary, by a network: `python 05_...py`.

The network is trained on residuals of the equation, not on values of u: `piecework.nn.Residual` turns a network and a
function of it into a module whose outputs are those residuals. f is chosen such that u = sin(pi x) sin(pi y) is known.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import hessian, vmap

import piecework
from piecework import Batch, losses
from piecework.models import mlp


def exact(p: Tensor) -> Tensor:
    return torch.sin(math.pi * p[:, :1]) * torch.sin(math.pi * p[:, 1:2])


def poisson(network: nn.Module, p: Tensor) -> Tensor:
    """(n, 1). p: (n, 3), a point and its weight: positive inside, negative on the boundary."""
    point, weight = p[:, :2], p[:, 2:]
    laplacian = vmap(lambda q: hessian(lambda one: network(one[None])[0, 0])(q).trace())(point)[:, None]
    inside = laplacian + 2 * math.pi**2 * exact(point)
    return weight.abs() * torch.where(weight > 0, inside, network(point))


def points(generator: torch.Generator, num_inside: int, num_boundary: int) -> Tensor:
    """Weights are such that the sum of squares is the mean inside and the mean on the boundary."""
    inside = torch.rand(num_inside, 2, generator=generator, dtype=torch.float64)
    along = torch.rand(num_boundary, generator=generator, dtype=torch.float64)
    side = torch.arange(num_boundary) % 4
    end = (side % 2).double()
    boundary = torch.where((side < 2)[:, None], torch.stack([along, end], 1), torch.stack([end, along], 1))
    weights = torch.cat(
        [torch.full((num_inside,), num_inside**-0.5), torch.full((num_boundary,), -(num_boundary**-0.5))]
    )
    return torch.cat([torch.cat([inside, boundary]), weights.double()[:, None]], 1)


def main(words: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args(words)
    collocation = points(torch.Generator().manual_seed(0), 900, 120)
    network = mlp(2, [arguments.units], 1, activation="tanh", dtype=torch.float64)
    training = piecework.GaussNewton().bind(piecework.nn.Residual(network, poisson), losses.Squared())
    batch = Batch(collocation, torch.zeros(len(collocation), 1, dtype=torch.float64))
    axis = torch.linspace(0, 1, 60, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)

    def error() -> float:
        with torch.no_grad():
            return float((network(grid) - exact(grid)).norm() / exact(grid).norm())

    for step in range(1, arguments.steps + 1):
        figures = training.step(batch)
        if step in (1, 3, 10, 30) or step % 100 == 0:
            print(f"step {step:4}  loss {float(figures['loss']):.1e}  relative error of u {error():.1e}")
    return error()


if __name__ == "__main__":
    main()
