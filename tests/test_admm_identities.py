"""What the resynchronised sweep is, algebraically: its gains, displacements, directions and steps have slow twins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chains import bind, chain, curved, quarters, randn, sweeps
from piecework import losses
from piecework.methods.admm import passes
from piecework.methods.admm.activations import Activation, activation_of
from piecework.methods.admm.network import read
from piecework.methods.admm.sweep import PROJECTION_RIDGE
from piecework.methods.admm.tiles import GramSum, Tiles
from piecework.solvers import prox
from piecework.training import Batch

close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
DEEP = (5, 9, 7, 3, 2)


def _sums(training, batch: Batch, skip: frozenset[int] = frozenset()) -> passes.Directions:  # type: ignore[no-untyped-def]
    """The direction pass at the training's weights."""
    return passes.directions(
        training._crew,
        batch,
        training._weights,
        training._output,
        training.group,
        gains=training._gains(),
        skip=set(skip),
    )


def _forward(weights: list[Tensor], x: Tensor, h: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs with a column of ones, and outputs, of each layer; everything at once, nothing shared with the sweep."""
    a, z = [], []
    for l, w in enumerate(weights):
        a.append(torch.cat([x if l == 0 else h(z[-1]), torch.ones(len(x), 1, dtype=x.dtype)], 1))
        z.append(a[-1] @ w.t())
    return a, z


def _twin_directions(
    weights: list[Tensor], batch: Batch, *, gamma: float, beta: float, ridge: float, activation: Activation
) -> list[Tensor]:
    """D_l of the hidden layers by the published recursion: dense a-update, z' whole, subtraction at the end."""
    a, z = _forward(weights, batch.x, activation.forward)
    t = prox.squared(z[-1], batch.y, beta)
    found = []
    for l in range(len(weights) - 2, -1, -1):
        v, b = weights[l + 1][:, :-1], weights[l + 1][:, -1]
        system = beta * v.t() @ v + gamma * torch.eye(v.shape[1], dtype=v.dtype)
        right = beta * (t - b) @ v + gamma * activation.forward(z[l])
        new_a = torch.linalg.solve(system, right.t()).t()
        t = activation.z_update(new_a, z[l], gamma, beta)
        gram = a[l].t() @ a[l]
        rho = ridge * gram.diagonal().mean()
        found.append((t - z[l]).t() @ a[l] @ torch.linalg.inv(gram + rho * torch.eye(len(gram), dtype=gram.dtype)))
    return found[::-1]


@pytest.mark.parametrize("gamma", [0.7, 1.0, 13.0])
def test_the_gain_is_the_dense_solve(gamma: float) -> None:
    training = bind(chain(*DEEP), gamma=gamma, beta=0.6)
    for w, gain in zip(training._weights[1:], training._gains(), strict=True):
        v = w[:, :-1]
        eye = partial(torch.eye, dtype=v.dtype)
        close(gain, torch.linalg.inv(v.t() @ v + gamma / 0.6 * eye(v.shape[1])) @ v.t())
        close(gain, v.t() @ torch.linalg.inv(v @ v.t() + gamma / 0.6 * eye(v.shape[0])))


@pytest.mark.parametrize("activation", ["relu", "leaky-relu", "hard-sigmoid", "tanh", "sigmoid", "identity"])
@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_directions_are_those_of_the_published_recursion(activation: str, gamma: float) -> None:
    batch = curved()
    training = bind(chain(*DEEP, activation=activation), gamma=gamma, beta=0.8, ridge=0.3, tile=64)
    sweeps(training, batch, 1)
    sums = _sums(training, batch)
    known = activation_of(training.model[1])
    assert known is not None
    twin = _twin_directions(training._weights, batch, gamma=gamma, beta=0.8, ridge=0.3, activation=known)
    for l, expected in enumerate(twin):
        gram = sums.grams[l]
        assert gram is not None
        # A smooth z' is found to about 1e-8 (the square root of rounding), the others exactly.
        smooth = activation in ("tanh", "sigmoid")
        atol = 1e-6 if smooth else 1e-10
        torch.testing.assert_close(training._direction(l, gram, sums.crosses[l]), expected, rtol=0, atol=atol)


def test_over_relaxation_is_a_step_along_the_direction() -> None:
    """(t a^T + rho W)(a a^T + rho I)^-1 with t = z + s (z' - z) is W + s D: as published, and as the step has it."""
    a, w, displacement, s = randn(53, 6), randn(4, 6, seed=1), randn(53, 4, seed=2), 37.0
    gram, rho = a.t() @ a, 0.3
    inverse = torch.linalg.inv(gram + rho * torch.eye(6, dtype=torch.float64))
    t = a @ w.t() + s * displacement
    close((t.t() @ a + rho * w) @ inverse, w + s * (displacement.t() @ a @ inverse))


def _displacements(training, batch: Batch) -> dict[int, Tensor]:  # type: ignore[no-untyped-def]
    """z' - z of each hidden layer of a batch that fits into one tile."""
    tiles = training._crew.tiles[0]
    m = tiles.forward(batch.x, training._weights)
    gap = training._output.displacement(m, batch.y, slice(0, len(batch)))
    return {l: e.clone() for l, e in tiles.displacements(gap, training._gains())}


def test_displacements_of_units_that_are_neither_flipped_nor_clipped_are_the_weighted_mean() -> None:
    batch = curved()
    training = bind(chain(5, 24, 2), gamma=2.0, beta=0.5)
    found = _displacements(training, batch)[0]
    z = training._crew.tiles[0].z[0][: len(batch)]
    gap = training._output.displacement(
        training._crew.tiles[0].z[1][: len(batch)].clone(), batch.y, slice(0, len(batch))
    )
    da = gap @ training._gains()[0].t()
    mean = 2.0 / 2.5 * da
    plain = (z > 0) & (z + mean >= 0)
    clipped = (z > 0) & (z + mean < 0)
    off = z <= 0
    flipped = off & (-z < da * (np.sqrt(2.5 / 0.5) - 1))
    assert min(int(kind.sum()) for kind in (plain, clipped, flipped, off & ~flipped)) > 10
    close(found[plain], mean[plain])
    close(found[clipped], -z[clipped])
    close(found[flipped], 0.8 * (da - z)[flipped])
    assert not bool(found[off & ~flipped].any())
    assert float((z + found)[z > 0].min()) >= 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    gamma=st.floats(0.1, 20),
    beta=st.floats(1e-4, 10),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_fused_step_of_relu_is_its_z_update(gamma: float, beta: float, scale: float, seed: int) -> None:
    rows = 41
    tiles = Tiles(read(chain(5, 7, 2)), gamma=gamma, beta=beta, flips=True, rows=rows)
    z, da = randn(rows, 7, seed=seed), scale * randn(rows, 7, seed=seed + 100)
    z[0], da[1] = 0.0, 0.0
    tiles.z[0].copy_(z)
    tiles.a[1][:, :7] = z.clamp_min(0)
    target = z.clamp_min(0) + da
    expected = prox.relu(target, z, gamma, beta) - z
    found = tiles._relu_step(0, da.clone())
    tie = (np.sqrt(beta / (beta + gamma)) * (target - z) - target).abs() < 1e-9 * (1 + target.abs())
    assert bool(((found - expected).abs() <= 1e-10 * (1 + scale))[~tie].all())


def test_without_flips_a_unit_that_is_off_stays_off() -> None:
    batch = curved()
    training = bind(chain(5, 24, 2), flips=False)
    found = _displacements(training, batch)[0]
    off = training._crew.tiles[0].z[0][: len(batch)] <= 0
    assert int(off.sum()) > 100
    assert not bool(found[off].any())


def _preconditioned_gradient(training, batch: Batch, gram: Tensor, ridge: float) -> Tensor:  # type: ignore[no-untyped-def]
    first = training.model[0]
    total = (training.model(batch.x) - batch.y).square().sum()
    weight, bias = torch.autograd.grad(total, [first.weight, first.bias])
    system = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return -torch.cat([weight, bias[:, None]], 1) @ torch.linalg.inv(system)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


@pytest.mark.filterwarnings("ignore:ADMM does badly")
@pytest.mark.parametrize(("beta", "bound"), [(1e-6, 1e-10), (1e-4, 1e-6)])
def test_without_flips_a_small_beta_gives_the_preconditioned_gradient(beta: float, bound: float) -> None:
    batch = curved(2001)
    training = bind(chain(5, 24, 2), flips=False, gamma=1.0, beta=beta, ridge=0.3)
    sums = _sums(training, batch)
    gram = sums.grams[0]
    assert gram is not None
    direction = training._direction(0, gram, sums.crosses[0])
    assert 1 - _cosine(direction, _preconditioned_gradient(training, batch, gram, 0.3)) <= bound


def test_flips_do_not_die_out_with_beta() -> None:
    batch = curved(2001)
    cosines = []
    for beta in (1e-6, 1e-3):
        training = bind(chain(5, 24, 2), gamma=1.0, beta=beta)
        sums = _sums(training, batch)
        gram = sums.grams[0]
        assert gram is not None
        direction = training._direction(0, gram, sums.crosses[0])
        cosines.append(_cosine(direction, _preconditioned_gradient(training, batch, gram, 1.0)))
    assert all(0.9 < cosine < 0.9999 for cosine in cosines)


def test_a_direction_does_not_depend_on_the_steps_of_the_layers_above() -> None:
    """Displacements pass down unrelaxed; below an activation that jumps, the step is a number the sweep carries."""
    batch = curved()
    found = []
    for search in (1.0, 4096.0):
        training = bind(nn.Sequential(*chain(5, 9, 7), *chain(7, 7, 2, activation="sign", seed=2)[1:]))
        sweeps(training, batch, 1)
        training._search = search
        moves, searched, _ = training._moves(batch, None)
        found.append([direction for _, direction in [*moves, *searched]])
    assert len(found[0]) == 2
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_dead_input_gives_a_zero_column() -> None:
    batch = curved()
    batch.x[:, 3] = 0
    training = bind(chain(5, 9, 2))
    before = training._weights[0].clone()
    for _ in range(3):
        training.step(batch)
    assert torch.equal(training._weights[0][:, 3], before[:, 3])
    assert not torch.equal(training._weights[0][:, 2], before[:, 2])


def test_an_endless_ridge_gives_no_direction() -> None:
    batch = curved()
    sizes = []
    for ridge in (1.0, 1e6, 1e12):
        training = bind(chain(5, 9, 2), ridge=ridge)
        sums = _sums(training, batch)
        gram = sums.grams[0]
        assert gram is not None
        sizes.append(float(training._direction(0, gram, sums.crosses[0]).norm()))
    assert sizes[1] < 1e-5 * sizes[0]
    assert sizes[2] < 1e-11 * sizes[0]


# -- sums over tiles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 96, 97, 301])
def test_the_blocked_gram_is_the_lower_triangle_of_the_product(size: int) -> None:
    gram = GramSum(size, dtype=torch.float64, device=torch.device("cpu"))
    a = randn(83, size)
    for part in a.split(17):
        gram.add(part)
    close(torch.tril(gram.total), torch.tril(a.t() @ a))


def test_the_direction_pass_sums_what_its_names_say() -> None:
    batch = curved()
    training = bind(chain(*DEEP), tile=24)
    sums = _sums(training, batch, skip=frozenset({1}))
    a, z = _forward(training._weights, batch.x, torch.relu)
    assert sums.grams[1] is None
    for l in (0, 2, 3):
        gram = sums.grams[l]
        assert gram is not None
        close(gram, a[l].t() @ a[l])
    close(sums.crosses[-1], -2 * (z[-1] - batch.y).t() @ a[-1])


@pytest.mark.parametrize("activation", ["relu", "leaky-relu", "hard-sigmoid", "tanh", "sigmoid", "identity"])
def test_tangents_are_the_derivatives_along_the_moves(activation: str) -> None:
    batch = curved(37)
    training = bind(chain(*DEEP, activation=activation))
    weights, tiles = training._weights, training._crew.tiles[0]
    moves = [(l, randn(*weights[l].shape, seed=l)) for l in (2, 0, 3)]
    h = read(training.model).activations[0].forward
    z = tiles.forward(batch.x, weights)
    assert torch.allclose(z, training.model(batch.x))
    found = tiles.tangents(moves, weights, len(batch)).view(len(batch), len(moves), -1)
    for i, (l, move) in enumerate(moves):

        def outputs(s: Tensor, l: int = l, move: Tensor = move) -> Tensor:
            moved = [w + s * move if k == l else w for k, w in enumerate(weights)]
            return _forward(moved, batch.x, h)[1][-1]

        close(found[:, i], torch.autograd.functional.jvp(outputs, torch.zeros((), dtype=torch.float64))[1])


# -- the closed-form step ----------------------------------------------------------------------------------------------


def _refitted(residual: Tensor, a: Tensor, tiny: Tensor) -> float:
    """The least sum of squares of residual - a W^T, plus the projection's ridge, over all W."""
    tall = torch.cat([a, torch.diag(tiny.sqrt())])
    padded = torch.cat([residual, residual.new_zeros(a.shape[1], residual.shape[1])])
    w = torch.linalg.lstsq(tall, padded).solution
    return float((padded - tall @ w).square().sum())


@pytest.mark.parametrize("widths", [(5, 9, 2), DEEP])
def test_the_step_minimises_the_squared_loss_of_the_linearised_and_refitted_network(widths: tuple[int, ...]) -> None:
    batch = curved()
    training = bind(chain(*widths))
    sweeps(training, batch, 2)
    sums = _sums(training, batch)
    moves = []
    for l in range(len(widths) - 2):
        gram = sums.grams[l]
        assert gram is not None
        moves.append((l, training._direction(l, gram, sums.crosses[l])))
    steps = torch.tensor(training._steps(batch, moves, sums), dtype=torch.float64)
    tiles = training._crew.tiles[0]
    residual = batch.y - tiles.forward(batch.x, training._weights)
    tangents = tiles.tangents(moves, training._weights, len(batch)).view(len(batch), len(moves), -1)
    a = tiles.a[-1][: len(batch)]
    square = training._gram.diagonal()
    tiny = square * PROJECTION_RIDGE + square.mean() * PROJECTION_RIDGE**2

    def loss_at(s: Tensor) -> float:
        return _refitted(residual - torch.einsum("nmk,m->nk", tangents, s), a, tiny)

    best = loss_at(steps)
    for i in range(len(moves)):
        grid = []
        for factor in np.linspace(-0.5, 2.5, 31):
            trial = steps.clone()
            trial[i] *= float(factor)
            grid.append(loss_at(trial))
        assert int(np.argmin(grid)) == 15  # the factor 1
        assert best <= min(grid) + 1e-9 * best
    # The loss is a parabola in s: its vertex, from central differences, is the step, to 1e-8.
    for i in range(len(moves)):
        shift = torch.zeros(len(moves), dtype=torch.float64)
        shift[i] = steps[i].abs() / 2
        up, down = loss_at(steps + shift), loss_at(steps - shift)
        assert abs(up - down) <= 1e-8 * (up + down - 2 * best) + 1e-12 * best


def test_with_identity_activations_it_is_the_true_line_minimiser_at_a_fixed_output_layer() -> None:
    batch = curved()
    training = bind(chain(5, 7, 2, activation="identity"))
    move = randn(7, 6, seed=5)
    line = passes.line(training._crew, batch, training._weights, training._output, training.group, moves=[(0, move)])
    s = float(line.slope / line.curvature)

    def loss_at(s: float) -> float:
        moved = [training._weights[0] + s * move, training._weights[1]]
        return float((_forward(moved, batch.x, lambda z: z)[1][-1] - batch.y).square().sum())

    up, here, down = loss_at(s + 0.1), loss_at(s), loss_at(s - 0.1)
    assert here < min(up, down)
    assert abs(up - down) / (up + down - 2 * here) < 1e-8


@pytest.mark.parametrize("name", ["softmax", "logistic", "squared"])
def test_slope_and_curvature_along_the_moves_are_those_of_autograd(name: str) -> None:
    outputs, loss = (1, losses.named(name)) if name == "logistic" else (4, losses.named(name))
    batch = quarters(classes=max(2, outputs))
    training = bind(chain(5, 7, outputs, activation="identity"), loss, tile=64)
    moves = [(0, randn(7, 6, seed=5)), (1, randn(outputs, 8, seed=6))]
    line = passes.line(training._crew, batch, training._weights, training._output, training.group, moves=moves)

    def total(s: Tensor) -> Tensor:
        z = training._weights
        linear = _forward(z, batch.x, lambda v: v)[1][-1]
        for i, (l, move) in enumerate(moves):
            tangent = _forward([move if k == l else w for k, w in enumerate(z)], batch.x, lambda v: v)[1][-1]
            if l == 0:
                tangent = tangent - z[1][:, -1]  # the output's bias does not move with layer 0
            linear = linear + s[i] * tangent
        return loss(linear, batch.y) * len(batch)

    zero = torch.zeros(2, dtype=torch.float64)
    close(line.slope, -torch.autograd.functional.jacobian(total, zero))
    hessian = torch.autograd.functional.hessian(total, zero)
    torch.testing.assert_close(line.curvature, hessian, rtol=1e-11, atol=1e-9)
