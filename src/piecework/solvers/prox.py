"""Proximal maps: the z-updates of activations and of losses, in closed form or by a safeguarded Newton iteration.

Conventions of Taylor et al. 2016: squared norms carry no 1/2. The z-update of an activation h is
argmin over z of gamma (a - h(z))^2 + beta (z - m)^2, element by element; the prox of a loss is
argmin over z of l(z, y) + <z, dual> + beta ||z - m||^2, a sample a row. gamma and beta are positive numbers.

Pure functions of tensors of any shape, empty ones included. An iteration stops element by element (row by row for
softmax), so that a row's answer does not depend on the rows that share its tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCALAR_ITERATIONS = 30
"""Most Newton or bisection steps of the scalar equations: enough for gamma/beta or 1/beta between 1e-6 and 1e6."""
SOFTMAX_ITERATIONS = 20
HALVINGS = 12


# -- activations ---------------------------------------------------------------------------------------------------
# A weighted mean is written m + gamma/(gamma + beta) (a - m): where nothing pulls, z is m to the last bit, and the
# displacement z - m that the weight solves see has no rounding noise of its own.


def identity(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
    """(gamma a + beta m) / (gamma + beta)."""
    return m + gamma / (gamma + beta) * (a - m)


def relu(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
    """The branch form: on the positive side the weighted mean; below, m, unless flipping up is no dearer."""
    up = identity(a, m, gamma, beta).clamp_min(0)
    flips = (a > 0) & (math.sqrt(beta / (beta + gamma)) * (a - m) <= a)
    return torch.where((m >= 0) | flips, up, m)


def sign(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
    """Stay at m, or go just over the jump at 0 where gamma times what h gains there exceeds beta m^2.

    The infimum from below is not attained (sign(0) = +1): the smallest normal number stands for it."""
    below = torch.full_like(m, -torch.finfo(m.dtype).tiny)
    over = torch.where(m >= 0, below, torch.zeros_like(m))  # of the tensor's type: as a float32, tiny would be 0
    gain = torch.where(m >= 0, -4 * gamma * a, 4 * gamma * a)  # gamma (a - h)^2 - gamma (a + h)^2, h = sign(m)
    return torch.where(gain > beta * m.square(), over, m)


def sigmoid(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
    """sigmoid(z) = (1 + tanh(z/2)) / 2, so this is the z-update of tanh in z/2."""
    return 2 * tanh(2 * a - 1, m / 2, gamma / 4, 4 * beta)


def tanh(a: Tensor, m: Tensor, gamma: float, beta: float) -> Tensor:
    """Newton from two starts, each inside a bracket, one for each minimum that the cost can have.

    With the signs of a and m turned so that tanh(m) <= a, and d = z - m >= 0, minima are rising roots of
    f(d) = d - gamma/beta (a - u)(1 - u^2), u = tanh(m + d). Beyond u_c = -1/(a + sqrt(a^2 + 3)), the smaller root of
    3 u^2 - 2 a u - 1, f only rises; before it, f is concave as long as it rises from d = 0. So Newton from d = 0 creeps
    up to the first root without passing it, Newton from u_c finds the last, and there is none between. z is exact
    to a few roundings of f, divided by f'."""
    ratio = gamma / beta
    side = torch.where(torch.tanh(m) <= a, 1.0, -1.0).to(m.dtype)
    a, m = side * a, side * m
    # Roots lie below gamma/beta (a - tanh m), and below max(1, .) because 1 - u^2 <= 4 exp(-2 z) for z > 0.
    far = (0.5 * torch.log(4 * ratio * (a.abs() + 1)) - m).clamp_min(1)
    reach = torch.minimum(ratio * (a - torch.tanh(m)), far)
    corner = torch.atanh((-1 / (a + (a.square() + 3).sqrt())).clamp_min(-1 + torch.finfo(m.dtype).eps)) - m
    first = _tanh_root(torch.zeros_like(m), a, m, ratio, reach)
    last = _tanh_root(torch.minimum(corner.clamp_min(0), reach), a, m, ratio, reach)

    def cost(d: Tensor) -> Tensor:
        return ratio * (a - torch.tanh(m + d)).square() + d.square()

    return side * (m + torch.where(cost(last) < cost(first), last, first))


def _tanh_root(d: Tensor, a: Tensor, m: Tensor, ratio: float, reach: Tensor) -> Tensor:
    """A root of f(d) in [0, reach] from the start d: Newton; bisection where that leaves the bracket or stalls."""
    eps = torch.finfo(d.dtype).eps
    low, high, moved = torch.zeros_like(d), reach, torch.full_like(d, math.inf)
    done = torch.zeros_like(d, dtype=torch.bool)
    for _ in range(SCALAR_ITERATIONS):
        u = torch.tanh(m + d)
        slope, gap = 1 - u.square(), a - u
        f = d - ratio * gap * slope
        rise = 1 + ratio * slope * (slope + 2 * gap * u)
        low, high = torch.where(f < 0, d, low), torch.where(f > 0, d, high)
        step = f / rise
        newton = (rise > 0) & (d - step >= low) & (d - step <= high) & (step.abs() <= moved / 2)
        to = torch.where(newton, d - step, (low + high) / 2)
        rounding = f.abs() <= eps * (d + ratio * gap.abs())
        to = torch.where(done | rounding, d, to)
        done = done | rounding | (newton & (step.abs() <= 8 * eps * (1 + d + m.abs())))
        d, moved = to, (to - d).abs()
        if _all_done(done):
            break
    return d


def _all_done(done: Tensor) -> bool:
    """Whether a loop may end early. On a device asking would stop it: there the loops run out, with equal results."""
    return done.device.type == "cpu" and bool(done.all())


# -- losses --------------------------------------------------------------------------------------------------------


def _centre(m: Tensor, beta: float, dual: Tensor | None) -> Tensor:
    """<z, dual> + beta ||z - m||^2 is beta ||z - centre||^2 and a constant."""
    return m if dual is None else m - dual / (2 * beta)


def squared(m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
    """Of (z - y)^2: z = (y - dual/2 + beta m) / (1 + beta)."""
    target = y if dual is None else y - dual / 2
    return (target + beta * m) / (1 + beta)


def hinge(m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
    """Of max(1 - z, 0) where y = 1 and max(z, 0) where y = 0, kinks included."""
    w = _centre(m, beta, dual)
    on = torch.where(w >= 1, w, (w + 1 / (2 * beta)).clamp_max(1))
    off = torch.where(w <= 0, w, (w - 1 / (2 * beta)).clamp_min(0))
    return torch.where(y > 0.5, on, off)


def logistic(m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
    """Of log(1 + exp z) - y z, y in [0, 1]: the root of f(z) = sigmoid(z) - y + 2 beta (z - centre), by Newton.

    The start is the point nearest to 0 between centre + (y - 1)/(2 beta) and centre + y/(2 beta), the ends between
    which the root lies. f is convex below 0 and concave above it, so that Newton moves from there to the root without
    passing it; the first step back is rounding, and the last."""
    centre, eps = _centre(m, beta, dual), torch.finfo(m.dtype).eps
    z = torch.zeros_like(centre).clamp(centre + (y - 1) / (2 * beta), centre + y / (2 * beta))
    done, way = torch.zeros_like(z, dtype=torch.bool), torch.zeros_like(z)
    for _ in range(SCALAR_ITERATIONS):
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        step = ((1 - y) * p - y * q + 2 * beta * (z - centre)) / (p * q + 2 * beta)
        z = torch.where(done, z, z - step)
        done = done | (step.abs() <= 4 * eps * (1 + z.abs())) | (step * way < 0)
        way = torch.where(way == 0, step.sign(), way)
        if _all_done(done):
            break
    return z


def softmax(m: Tensor, y: Tensor, beta: float, dual: Tensor | None = None) -> Tensor:
    """Of softmax cross-entropy with target rows y >= 0 that sum to 1: Newton a sample in d = z - centre.

    H = diag(p) - p p^T + 2 beta I is inverted by Sherman-Morrison in O(k), in a form without cancellation for small
    beta. The start is near the root also where the softmax is saturated, and Newton from the centre would not arrive:
    12 steps reach rounding for beta from 1e-6 up. A step is halved until the cost or the gradient falls; after a step
    below the square root of the rounding unit the next would be rounding, and the row is done."""
    centre, root = _centre(m, beta, dual), torch.finfo(m.dtype).eps ** 0.5
    d = _softmax_start(centre, y, beta)
    p, gradient, cost = _softmax_at(d, centre, y, beta)
    done = torch.zeros_like(cost, dtype=torch.bool)
    for _ in range(SOFTMAX_ITERATIONS):
        weight = 1 / (p + 2 * beta)
        scaled, scaled_p = weight * gradient, weight * p
        inner = (p * scaled).sum(1) / (2 * beta * scaled_p.sum(1))  # 1 - p . p/(p + 2 beta) = 2 beta sum p/(p + 2 beta)
        step = scaled + scaled_p * inner[:, None]
        fall, size = (gradient * step).sum(1), gradient.abs().amax(1)
        length = torch.where(done, 0.0, 1.0).to(cost.dtype)
        for _ in range(HALVINGS):
            trial = d - length[:, None] * step
            at = _softmax_at(trial, centre, y, beta)
            fine = (at[2] <= cost - 1e-4 * length * fall) | (at[1].abs().amax(1) <= size / 2)
            if _all_done(done | fine):
                break
            length = torch.where(done | fine, length, length / 2)
        take = (fine & ~done)[:, None]
        d, p, gradient = torch.where(take, trial, d), torch.where(take, at[0], p), torch.where(take, at[1], gradient)
        cost = torch.where(take[:, 0], at[2], cost)
        done = done | ~fine | (step.abs().amax(1) <= root)
        if _all_done(done):
            break
    return centre + d


def _softmax_at(d: Tensor, centre: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """At z = centre + d: the probabilities (n, k), the gradient (n, k), the cost (n,)."""
    z = centre + d
    z = z - z.amax(1, keepdim=True)  # y sums to 1: no part of the result changes, and the cost loses no digits
    weights = z.exp()
    total = weights.sum(1, keepdim=True)
    p = weights / total
    return p, p - y + 2 * beta * d, total[:, 0].log() - (y * z).sum(1) + beta * d.square().sum(1)


def _softmax_start(centre: Tensor, y: Tensor, beta: float) -> Tensor:
    """d (n, k), within a few units of the root for any beta.

    With max z in place of logsumexp z, the p of p = y - 2 beta d is the point of the simplex nearest to
    2 beta centre + y, and the logits of all entries that are not 0 there are equal: they get those of p instead, as
    far as p is not small against 2 beta. The root has d sum to 0."""
    p = _to_simplex(2 * beta * centre + y)
    logits = (p + 2 * beta).log()
    return (y - p) / (2 * beta) + logits - logits.mean(1, keepdim=True)


def _to_simplex(v: Tensor) -> Tensor:
    """The nearest row with entries >= 0 that sum to 1, by sorting (Held, Wolfe and Crowder 1974)."""
    ordered = v.sort(1, descending=True).values
    counts = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)
    excess = (ordered.cumsum(1) - 1) / counts
    kept = (ordered > excess).sum(1, keepdim=True).clamp_min(1)
    return (v - excess.gather(1, kept - 1)).clamp_min(0)
