"""Gauss-Newton without any of its algebra, for the tests: derivatives by torch.func, dense matrices, one loop."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

from jacobian_cases import dense, randn
from piecework import losses
from piecework.group import Group, Solo
from piecework.methods import GaussNewton
from piecework.models import mlp
from piecework.training import Batch

SQUARED = losses.named("squared")
OUTPUTS = {"squared": 1, "squared-3": 3, "softmax": 3, "logistic": 1}


def network(outputs: int = 1, *, hidden: tuple[int, ...] = (5,), seed: int = 1, features: int = 3) -> nn.Sequential:
    """A tanh network in float64; 3-5-1 has 26 parameters, 3-5-3 has 38."""
    return mlp(features, list(hidden), outputs, activation="tanh", seed=seed, dtype=torch.float64)


def rows(num: int, case: str = "squared", *, features: int = 3, seed: int = 0) -> Batch:
    """Targets of one of OUTPUTS that no small network fits at once, float64."""
    x = randn(num, features, seed=seed)
    k = OUTPUTS[case]
    y = torch.sin(1.5 * x @ randn(features, k, seed=seed + 1)) + 0.3 * randn(num, k, seed=seed + 2)
    return Batch(x, {"softmax": y.argmax(1), "logistic": (y[:, 0] > 0).long()}.get(case, y))


def named(case: str) -> losses.Loss:
    return losses.named(case.removesuffix("-3"))


def bind(model: nn.Module, loss: losses.Loss = SQUARED, *, group: Group | None = None, **settings: Any) -> Any:
    """GaussNewton(**settings) at work on the model."""
    return GaussNewton(**settings).bind(model, loss, group=group or Solo())


def plain(**settings: Any) -> dict[str, Any]:
    """Settings of a step that is d of equation (2) and nothing else."""
    return {"adapt": False, "geodesic": False, "damping": 1e-3, **settings}


def flat(model: nn.Module) -> Tensor:
    """The trainable weights as one vector, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad]).clone()


def metrics(training: Any, batch: Batch) -> dict[str, float]:
    """Of one step."""
    return {name: float(value) for name, value in training.step(batch).items()}


def direction(model: nn.Module, loss: losses.Loss, batch: Batch, **settings: Any) -> tuple[Tensor, dict[str, float]]:
    """How far one step moves a copy of the model, theta - theta_new, and its metrics."""
    training = bind(copy.deepcopy(model), loss, **settings)
    before = flat(training.model)
    found = metrics(training, batch)
    return before - flat(training.model), found


def total(name: str, z: Tensor, y: Tensor) -> Tensor:
    """The loss of one sample's outputs (k,), from torch's own functions."""
    if name == "squared":
        return (z - y).square().sum()
    if name == "softmax":
        return functional.cross_entropy(z[None], y[None])
    return functional.binary_cross_entropy_with_logits(z[0], y.to(z.dtype))


@dataclass(frozen=True)
class Quadratic:
    """The loss around the weights: curvature J^T H J (P, P) and slope J^T grad (P,), with J (n, k, P) of the outputs,
    H (n, k, k) and grad (n, k) of the loss at them; rows N = n k."""

    jacobian: Tensor
    hessian: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, model: nn.Module, name: str, batch: Batch) -> Quadratic:
        z = model(batch.x).detach()
        each = partial(total, name)
        second = vmap(jacrev(jacrev(each)))(z, batch.y)
        return cls(dense(model, batch.x).detach(), second, vmap(jacrev(each))(z, batch.y))

    @property
    def rows(self) -> int:
        return self.gradient.numel()

    @property
    def curvature(self) -> Tensor:
        return torch.einsum("nkp,nkl,nlq->pq", self.jacobian, self.hessian, self.jacobian)

    @property
    def slope(self) -> Tensor:
        return torch.einsum("nkp,nk->p", self.jacobian, self.gradient)

    @property
    def unit(self) -> float:
        """The mean diagonal of K."""
        return float(self.curvature.trace()) / self.rows

    def step(self, relative: float) -> Tensor:
        """The primal step, damping relative to the unit."""
        return self.solve(self.slope, relative * self.unit)

    def solve(self, right: Tensor, damping: float) -> Tensor:
        eye = torch.eye(len(right), dtype=right.dtype)
        return torch.linalg.solve(self.curvature + damping * eye, right)


class PlainLevenbergMarquardt:
    """The loop of equations (2) to (4) for the squared loss of real targets, with dense matrices."""

    def __init__(self, model: nn.Module, batch: Batch, *, damping: float, geodesic: bool = True) -> None:
        self.model, self.batch, self.geodesic = model, batch, geodesic
        self.relative: float | None = damping
        self.damping, self.growth = 0.0, 2.0

    def outputs(self, weights: Tensor) -> Tensor:
        parts = torch.split(weights, [p.numel() for p in self.model.parameters()])
        named = zip(self.model.named_parameters(), parts, strict=True)
        found: Tensor = functional_call(self.model, {n: w.view_as(p) for (n, p), w in named}, (self.batch.x,))
        return found.detach()

    def loss(self, weights: Tensor) -> float:
        return float((self.outputs(weights) - self.batch.y).square().sum())

    def step(self) -> dict[str, float]:
        here = Quadratic.of(self.model, "squared", self.batch)
        theta, start = flat(self.model), self.loss(flat(self.model))
        if self.relative is not None:
            self.damping, self.relative = self.relative * here.unit, None
        for rejected in range(17):  # noqa: B007
            d = here.solve(here.slope, self.damping)
            a = self.acceleration(here, theta, d)
            fall = float(d @ here.slope - d @ here.curvature @ d / 2)
            there = self.loss(theta - d + a)
            rho = (start - there) / fall
            if rho > 0 and 2 * float(a.norm()) <= 0.75 * float(d.norm()):
                break
            self.damping, self.growth = self.damping * self.growth, 2 * self.growth
        self.damping, self.growth = self.damping * max(1 / 3, 1 - (2 * rho - 1) ** 3), 2.0
        torch.nn.utils.vector_to_parameters(theta - d + a, self.model.parameters())
        return {
            "loss": there / len(self.batch),
            "damping": self.damping / here.unit,
            "gain_ratio": rho,
            "rejected": rejected,
        }

    def acceleration(self, here: Quadratic, theta: Tensor, d: Tensor) -> Tensor:
        """a of (3), the second derivative by a difference over a tenth of the step."""
        if not self.geodesic:
            return torch.zeros_like(d)
        h, root = 0.1, math.sqrt(2.0)
        moved = here.jacobian @ d
        bend = 2 / h**2 * root * (self.outputs(theta - h * d) - self.outputs(theta) + h * moved)
        return -here.solve(root * torch.einsum("nkp,nk->p", here.jacobian, bend), self.damping) / 2
