"""Proximal maps in closed form or by a safeguarded scalar Newton iteration: activations and losses.

Conventions of Taylor et al. 2016: squared norms carry no 1/2. The z-update of an activation h is
argmin over z of gamma (a - h(z))^2 + beta (z - m)^2, element by element; the prox of a loss is
argmin over z of l(z, y) + <z, dual> + beta ||z - m||^2, a sample a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import HardSigmoid, Sign

Piece = tuple[float, float, float, float]
"""(low, high, slope, intercept): h(z) = slope z + intercept for low <= z <= high."""

NEWTON_ITERATIONS = 20
LOGISTIC_ITERATIONS = 8
SMALL_BETA = 0.1


@dataclass(frozen=True)
class Activation:
    """An element-wise activation with what a method without gradients needs of it."""

    name: str
    forward: Callable[[Tensor], Tensor]
    z_update: Callable[[Tensor, Tensor, float, float], Tensor]
    """(a, m, gamma, beta) -> argmin over z of gamma (a - h(z))^2 + beta (z - m)^2."""
    derivative: Callable[[Tensor], Tensor] | None
    """h'(z); None where it is of no use because h is piecewise constant."""

    @property
    def piecewise_constant(self) -> bool:
        return self.derivative is None


def activation_of(module: nn.Module) -> Activation | None:
    """The activation of a torch module, or None where the module is none that is known here."""
    match module:
        case nn.ReLU():
            return Activation("relu", lambda z: z.clamp_min(0), relu, lambda z: (z > 0).to(z.dtype))
        case nn.LeakyReLU():
            slope = float(module.negative_slope)
            return piecewise("leaky-relu", module, [(-math.inf, 0, slope, 0), (0, math.inf, 1, 0)])
        case nn.Hardtanh():  # ReLU6 is one
            low, high = float(module.min_val), float(module.max_val)
            pieces = [(-math.inf, low, 0, low), (low, high, 1, 0), (high, math.inf, 0, high)]
            return piecewise("hardtanh", module, pieces)
        case nn.Hardsigmoid():
            return piecewise("hardsigmoid", module, [(-math.inf, -3, 0, 0), (-3, 3, 1 / 6, 0.5), (3, math.inf, 0, 1)])
        case HardSigmoid():
            return piecewise("hard-sigmoid", module, [(-math.inf, 0, 0, 0), (0, 1, 1, 0), (1, math.inf, 0, 1)])
        case nn.Tanh():
            return smooth("tanh", torch.tanh, lambda h: 1 - h.square(), lambda h: -2 * h * (1 - h.square()))
        case nn.Sigmoid():
            return smooth("sigmoid", torch.sigmoid, lambda h: h * (1 - h), lambda h: h * (1 - h) * (1 - 2 * h))
        case Sign():
            return Activation("sign", module, sign, None)
        case nn.Identity():
            return Activation("identity", lambda z: z, identity, torch.ones_like)
        case _:
            return None


def identity(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
    return (gamma * a + beta * m) / (gamma + beta)


def relu(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
    """The branch form: on the positive side the weighted mean; below, m, unless flipping up is cheaper."""
    up = ((gamma * a + beta * m) / (gamma + beta)).clamp_min(0)
    flips = (a > 0) & (math.sqrt(beta / (beta + gamma)) * (a - m) <= a)
    return torch.where((m >= 0) | flips, up, m)


def sign(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
    """Stay at m, or go just over the jump at 0 where gamma times what h gains there exceeds beta m^2.

    The infimum from below is not attained (sign(0) = +1): the smallest normal number stands for it."""
    here = torch.where(m >= 0, 1.0, -1.0).to(m.dtype)
    gain = gamma * ((a - here).square() - (a + here).square())
    over = torch.zeros_like(m).masked_fill_(m >= 0, -torch.finfo(m.dtype).tiny)
    return torch.where(gain > beta * m.square(), over, m)


def piecewise(name: str, forward: Callable[[Tensor], Tensor], pieces: Sequence[Piece]) -> Activation:
    """A continuous piecewise-linear activation: one weighted mean a piece, clipped to it; the cheapest wins."""

    def z_update(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
        best, least = m, torch.full_like(m, math.inf)
        for low, high, slope, intercept in pieces:
            z = (gamma * slope * (a - intercept) + beta * m) / (gamma * slope**2 + beta)
            z = z.clamp(low, high)
            cost = gamma * (a - slope * z - intercept).square() + beta * (z - m).square()
            best = torch.where(cost < least, z, best)
            least = torch.minimum(cost, least)
        return best

    def derivative(z: Tensor) -> Tensor:
        slope = torch.zeros_like(z)
        for low, high, piece_slope, _ in pieces:
            slope = torch.where((z > low) & (z <= high), piece_slope, slope)
        return slope

    return Activation(name, forward, z_update, derivative)


def smooth(
    name: str,
    h: Callable[[Tensor], Tensor],
    first: Callable[[Tensor], Tensor],
    second: Callable[[Tensor], Tensor],
) -> Activation:
    """A smooth increasing activation; its derivatives are given as functions of h(z).

    The cost can have two minima, so Newton runs from m and from the far side of its turning point, and the cheaper
    end is taken. A step that does not lower the cost is halved; 20 iterations reach rounding error."""

    def cost(z: Tensor, a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
        return gamma * (a - h(z)).square() + beta * (z - m).square()

    def newton(z: Tensor, a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
        now = cost(z, a, m, gamma, beta)
        for _ in range(NEWTON_ITERATIONS):
            value = h(z)
            slope = first(value)
            gap = value - a
            gradient = gamma * gap * slope + beta * (z - m)
            exact = gamma * (slope.square() + gap * second(value)) + beta
            curvature = exact.abs().clamp_min(beta / 100)
            step = gradient / curvature
            for _ in range(3):
                trial = z - step
                new = cost(trial, a, m, gamma, beta)
                step = torch.where(new <= now, step, step / 4)
            trial = z - step
            new = cost(trial, a, m, gamma, beta)
            better = new < now
            z, now = torch.where(better, trial, z), torch.where(better, new, now)
        return z

    def z_update(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
        ends = [newton(start, a, m, gamma, beta) for start in (m, torch.zeros_like(m), m / 2)]
        best = ends[0]
        for end in ends[1:]:
            better = cost(end, a, m, gamma, beta) < cost(best, a, m, gamma, beta)
            best = torch.where(better, end, best)
        return best

    return Activation(name, h, z_update, lambda z: first(h(z)))


# -- losses --------------------------------------------------------------------------------------------------------


def squared(m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
    """Of (z - y)^2: z = (y - dual/2 + beta m) / (1 + beta)."""
    target = y if dual is None else y - dual / 2
    return (target + beta * m) / (1 + beta)


def hinge(m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
    """Of max(1 - z, 0) where y = 1 and max(z, 0) where y = 0, kinks included."""
    w = m if dual is None else m - dual / (2 * beta)
    on = torch.where(w >= 1, w, (w + 1 / (2 * beta)).clamp_max(1))
    off = torch.where(w <= 0, w, (w - 1 / (2 * beta)).clamp_min(0))
    return torch.where(y > 0.5, on, off)


def logistic(m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
    """Of log(1 + exp z) - y z: the root of f(z) = sigmoid(z) - y + dual + 2 beta (z - m), by Newton.

    f is increasing, convex below 0 and concave above. From 0, or from a point between 0 and the root, Newton moves
    towards the root and never past it, by about 1 while sigmoid decays: hence the number of iterations."""
    centre = m if dual is None else m - dual / (2 * beta)

    def value(z: Tensor) -> Tensor:
        return torch.sigmoid(z) - y + 2 * beta * (z - centre)

    at_zero, at_centre = value(torch.zeros_like(centre)), value(centre)
    between = (at_zero * centre < 0) & (at_centre * centre < 0)
    z = torch.where(between, centre, torch.zeros_like(centre))
    for _ in range(LOGISTIC_ITERATIONS + max(0, math.ceil(-math.log(2 * beta)))):
        p = torch.sigmoid(z)
        z = z - value(z) / (p * (1 - p) + 2 * beta)
    return z


def softmax(m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
    """Of softmax cross-entropy with target rows y that sum to 1: Newton a sample, H = diag(p) - p p^T + 2 beta I by
    Sherman-Morrison in O(k).

    A step of range r = max - min is taken log(1 + r)/r of the way: the third derivative of log-sum-exp along a step is
    at most r times the second, so that this always lowers the cost, without a search, and tends to the whole step."""
    centre = m if dual is None else m - dual / (2 * beta)
    z = _softmax_start(centre, y, beta) if beta < SMALL_BETA else centre
    tolerance = (1e-8 if z.dtype == torch.float64 else 1e-4) * min(1.0, beta)
    for _ in range(NEWTON_ITERATIONS if z.numel() else 0):
        p = torch.softmax(z, 1)
        gradient = p - y + 2 * beta * (z - centre)
        last = bool(gradient.abs().max() <= tolerance)  # one more step: no row depends on the others of its tile
        inverse = 1 / (p + 2 * beta)
        u = inverse * p
        rest = 2 * beta * u.sum(1)  # 1 - p^T u, without cancellation
        step = inverse * gradient + u * ((u * gradient).sum(1) / rest)[:, None]
        reach = (step.amax(1) - step.amin(1)).clamp_min(torch.finfo(z.dtype).tiny)
        z = z - step * (torch.log1p(reach) / reach)[:, None]
        if last:
            break
    return z


def _softmax_start(centre: Tensor, y: Tensor, beta: float) -> Tensor:
    """The cheaper of the centre and of the prox of max in place of log-sum-exp, which is its limit for small beta: the
    probabilities are then the projection of y + 2 beta centre onto the simplex (by sorting)."""
    v = y + 2 * beta * centre
    sorted_v = v.sort(1, descending=True).values
    counts = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)
    levels = (sorted_v.cumsum(1) - 1) / counts
    size = (sorted_v > levels).sum(1, keepdim=True).clamp_min(1)
    level = levels.gather(1, size - 1)
    z = centre + (y - (v - level).clamp_min(0)) / (2 * beta)

    def cost(z: Tensor) -> Tensor:
        return torch.logsumexp(z, 1) - (y * z).sum(1) + beta * (z - centre).square().sum(1)

    return torch.where((cost(z) < cost(centre))[:, None], z, centre)
