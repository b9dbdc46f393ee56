"""Gauss-Newton on what least squares is for: a differential equation's residuals, and a loss of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from jacobian_cases import randn, relative
from piecework.nn import Residual
from piecework.training import BadInput, Batch, Task
from plain_gauss_newton import bind, flat, metrics, network

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode


class _Pinned(nn.Module):
    """x (1 - x) net(x): 0 at both ends."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - x) * self.net(x)  # type: ignore[no-any-return]


def _by_func(net: nn.Module, x: Tensor) -> Tensor:
    """u'' + pi^2 sin(pi x) at the points of the first column; 10 u where the second marks the boundary."""
    values = dict(net.named_parameters())

    def u(point: Tensor) -> Tensor:
        out: Tensor = functional_call(net, values, (point.reshape(1, 1),))
        return out.reshape(())

    second = vmap(jacrev(jacrev(u)))(x[:, 0])[:, None]
    inside = second + math.pi**2 * torch.sin(math.pi * x[:, :1])
    return torch.where(x[:, 1:] > 0, 10 * net(x[:, :1]), inside)


def _by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        points = x[:, :1].detach().requires_grad_()
        u = net(points)
        (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), points, create_graph=True)
        inside = second + math.pi**2 * torch.sin(math.pi * points.detach())
        return torch.where(x[:, 1:] > 0, 10 * u, inside)


@pytest.mark.parametrize("function", [_by_func, _by_autograd])
@pytest.mark.parametrize(("pinned", "accuracy"), [(True, 1e-6), (False, 1e-4)])
def test_a_boundary_value_problem_is_solved_in_thirty_steps(
    function: Callable[[nn.Module, Tensor], Tensor], pinned: bool, accuracy: float
) -> None:
    """u'' = -pi^2 sin(pi x), u(0) = u(1) = 0, whose solution is sin(pi x); with rows of the boundary it takes 60 steps
    to the same accuracy."""
    net = network(features=1, hidden=(24,), seed=1)
    u = _Pinned(net) if pinned else net
    inside = torch.linspace(0, 1, 26, dtype=torch.float64)[1:-1]
    x = torch.stack([inside, torch.zeros_like(inside)], 1)
    if not pinned:
        x = torch.cat([x, torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)])
    training = bind(Residual(u, function), damping=1e-3)
    batch = Batch(x, torch.zeros(len(x), 1, dtype=torch.float64))
    for _ in range(30):
        training.step(batch)
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
    assert relative(u(grid).detach(), torch.sin(math.pi * grid)) < accuracy


@dataclass(frozen=True)
class _Poisson:
    """Counts with rate exp(z): exp(z) - y z, summed over outputs."""

    name = "poisson"
    curvature_bound = None

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return (z.exp() - y * z).sum() / max(1, len(z))

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        return (z.exp() - y * z).double().sum()

    def decide(self, z: Tensor) -> Tensor:
        raise BadInput("counts are no classes")

    def targets(self, y: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
        return y.to(dtype)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return z.exp() - y

    def hessian_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return z.exp() * v

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        return (z / 2).exp() - y * (-z / 2).exp()

    def root_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return (z / 2).exp() * v

    def root_t_mv(self, z: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return (z / 2).exp() * v

    def prox(self, m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
        raise BadInput("not needed")

    def check(self, task: Task, num_outputs: int) -> None:
        return None

    def plain(self) -> _Poisson:
        return self


@pytest.mark.parametrize("solver", ["auto", "exact", "qr", "cg"])
def test_a_loss_of_the_users_own_trains_to_its_optimum(solver: str) -> None:
    """A log-linear model of counts: the optimum is where X^T (exp(z) - y) = 0."""
    x = randn(53, 3)
    rate = torch.exp(x @ torch.tensor([[0.5], [-1.0], [0.2]], dtype=torch.float64) + 1)
    batch = Batch(x, torch.poisson(rate, generator=torch.Generator().manual_seed(0)))
    model = network(hidden=())
    training = bind(model, _Poisson(), solver=solver, inner_tolerance=1e-8)
    told = [metrics(training, batch) for _ in range(20)]
    assert told[-1]["loss"] < told[0]["loss"]
    z = model(x).detach()
    slope = torch.cat([x, torch.ones_like(x[:, :1])], 1).t() @ (z.exp() - batch.y)
    assert float(slope.norm()) < 1e-5 * float(batch.y.norm())
    torch.testing.assert_close(flat(model)[:3], torch.tensor([0.5, -1.0, 0.2]).double(), rtol=0, atol=0.3)


def test_a_network_on_counts_learns() -> None:
    x = randn(53, 3)
    batch = Batch(x, torch.poisson(torch.exp(torch.sin(2 * x[:, :1])), generator=torch.Generator().manual_seed(0)))
    training = bind(network(), _Poisson())
    told = [metrics(training, batch)["loss"] for _ in range(10)]
    assert told == sorted(told, reverse=True)
    assert told[-1] < told[0] - 0.05
