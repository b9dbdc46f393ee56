"""Somebody else's least-squares codes on a network with one hidden tanh layer, for `benchmarks/fits.py --peers`.

Each starts from the weights that the network has, stops at the seconds, and leaves the best weights it came to in the
network. scipy gets the Jacobian in closed form, torch-levenberg-marquardt and optimistix make their own; the last two
are no dependencies of this library and are left out where they cannot be imported.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

from piecework import Batch

TIGHTEST = 1e-15
"""Tolerances as small as scipy takes without a warning: none of them shall end a run before the seconds do."""


class _OutOfTime(Exception):
    """Ends codes that have no limit in seconds."""


def run(name: str, network: nn.Sequential, rows: Batch, seconds: float) -> tuple[int, float] | None:
    """(steps, seconds); None where the code is not installed. name: "scipy trf", "scipy lm",
    "torch-levenberg-marquardt" or "optimistix"."""
    if name.startswith("scipy"):
        return _scipy(network, rows, seconds, name.removeprefix("scipy "))
    codes: dict[str, Callable[[nn.Sequential, Batch, float], tuple[int, float]]] = {
        "torch-levenberg-marquardt": _torch_levenberg_marquardt,
        "optimistix": _optimistix,
    }
    try:
        return codes[name](network, rows, seconds)
    except ImportError:
        return None


def _weights(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def _scipy(network: nn.Sequential, rows: Batch, seconds: float, method: str) -> tuple[int, float]:
    """Steps are evaluations of the Jacobian."""
    with torch.no_grad():
        x = network[0](rows.x).numpy()[:, 0]
    y, start = rows.y.numpy()[:, 0], _weights(network).numpy()
    width = (len(start) - 1) // 3
    best, found, steps = math.inf, start, 0
    began = time.perf_counter()

    def hidden(weights: np.ndarray) -> np.ndarray:
        return np.tanh(np.outer(x, weights[:width]) + weights[width : 2 * width])

    def residual(weights: np.ndarray) -> np.ndarray:
        nonlocal best, found
        if time.perf_counter() - began > seconds:
            raise _OutOfTime
        rest = hidden(weights) @ weights[2 * width : -1] + weights[-1] - y
        if (cost := float(rest @ rest)) < best:
            best, found = cost, weights.copy()
        return rest

    def jacobian(weights: np.ndarray) -> np.ndarray:
        nonlocal steps
        steps += 1
        a = hidden(weights)
        d = (1 - a * a) * weights[2 * width : -1]
        return np.concatenate([d * x[:, None], d, a, np.ones((len(x), 1))], 1)

    never = {"ftol": TIGHTEST, "xtol": TIGHTEST, "gtol": TIGHTEST, "max_nfev": 10**9}
    with contextlib.suppress(_OutOfTime):
        least_squares(residual, start, jacobian, method=method, **never)
    nn.utils.vector_to_parameters(torch.from_numpy(found), network.parameters())
    return steps, time.perf_counter() - began


def _torch_levenberg_marquardt(network: nn.Sequential, rows: Batch, seconds: float) -> tuple[int, float]:
    from torch_levenberg_marquardt.training import LevenbergMarquardtModule

    module = LevenbergMarquardtModule(network)
    best, kept, steps = math.inf, _weights(network), 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        before = _weights(network)
        _, loss, stop, _ = module.training_step(
            rows.x, rows.y
        )  # the loss at `before`; the last trial stays, good or bad
        if float(loss) < best:
            best, kept = float(loss), before
        if stop:
            break
        steps += 1
    spent = time.perf_counter() - began
    with torch.no_grad():
        if float((network(rows.x) - rows.y).square().mean()) > best:
            nn.utils.vector_to_parameters(kept, network.parameters())
    return steps, spent


def _optimistix(network: nn.Sequential, rows: Batch, seconds: float) -> tuple[int, float]:
    """Step by step as its documentation does interactively; compiling is not counted."""
    import equinox
    import jax
    import optimistix

    jax.config.update("jax_enable_x64", True)
    numpy = jax.numpy
    with torch.no_grad():
        x, y = numpy.asarray(network[0](rows.x).numpy()), numpy.asarray(rows.y.numpy())
    start = _weights(network)
    width = (len(start) - 1) // 3

    def residual(weights: jax.Array, _: None) -> jax.Array:
        a = numpy.tanh(x * weights[:width] + weights[width : 2 * width])
        return a @ weights[2 * width : -1] + weights[-1] - y[:, 0]

    def wrapped(weights: jax.Array, arguments: None) -> tuple[jax.Array, None]:
        return residual(weights, arguments), None

    solver = optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0)
    weights = numpy.asarray(start.numpy())
    shape = jax.eval_shape(lambda: residual(weights, None))
    tags: frozenset[object] = frozenset()
    state = solver.init(wrapped, weights, None, {}, shape, None, tags)
    step = equinox.filter_jit(
        lambda weights, state: solver.step(wrapped, weights, args=None, options={}, state=state, tags=tags)
    )
    tried, trial = weights, state
    for _ in range(3):  # the state of the start and that of a later step compile apart
        tried, trial, _ = step(tried, trial)
    jax.block_until_ready(tried)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        weights, state, _ = step(weights, state)
        jax.block_until_ready(weights)
        steps += 1
    spent = time.perf_counter() - began
    nn.utils.vector_to_parameters(torch.from_numpy(np.array(weights)), network.parameters())
    return steps, spent
