"""Proximal steps of layers against brute force: grids, permutations, and a small quadratic program per choice."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from piecework.nn import NonNegative, OneHot, Quantiser, Sign, Simplex, Sort, TopK, VectorQuantiser
from piecework.solvers import layer_prox, prox

Cost = Callable[[Tensor], Tensor]
MODES = ["quadratic", "linear"]
SMALL = 1e-6
"""A margin that does not show in a cost."""


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _penalties(generator: torch.Generator) -> tuple[float, float]:
    """Two numbers between 0.1 and 10, evenly in the logarithm."""
    beta_in, beta_out = (10 ** (2 * torch.rand(2, generator=generator) - 1)).tolist()
    return beta_in, beta_out


def _outer(mode: str, y: Tensor, b: Tensor, beta_out: float) -> Tensor:
    """What the output costs, element by element; in linear mode b is the gradient."""
    return beta_out / 2 * (y - b).square() if mode == "quadratic" else b * y


def _solve(layer: nn.Module, mode: str, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
    if mode == "quadratic":
        return layer.prox_input(v, b, beta_in, beta_out)
    return layer.prox_input_linear(v, b, beta_in)


def _cost(layer: nn.Module, mode: str, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Cost:
    """a -> (n,) the cost of each row as the layer really is."""
    return lambda a: (beta_in / 2 * (a - v).square() + _outer(mode, layer(a), b, beta_out)).sum(-1)


def _row_program(v: np.ndarray, start: np.ndarray, normals: np.ndarray, least: np.ndarray) -> float:
    """min ||a - v||^2 subject to normals a >= least, from a start."""
    found = minimize(
        lambda a: 0.5 * ((a - v) ** 2).sum(),
        start,
        jac=lambda a: a - v,
        constraints=[{"type": "ineq", "fun": lambda a: normals @ a - least, "jac": lambda a: normals}],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return float(((found.x - v) ** 2).sum())


# -- one number at a time ----------------------------------------------------------------------------------------------

ELEMENTS: dict[str, nn.Module] = {
    "sign": Sign(SMALL, dither=0),
    "non-negative": NonNegative(),
    "two levels": Quantiser(2, margin=SMALL, dither=False),
    "three levels": Quantiser(3, -0.5, 1.5, margin=SMALL, dither=False),
    "24 levels": Quantiser(24, -2, 2, margin=SMALL, dither=False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_no_grid_point_is_cheaper_than_the_step_of_an_element(name: str, mode: str) -> None:
    layer, generator = ELEMENTS[name], torch.Generator().manual_seed(0)
    grid = torch.arange(-9, 9, 1e-4, dtype=torch.float64).expand(25, -1)
    for _ in range(4):
        v, b = 1.5 * _normal(generator, 2, 25, 1)
        beta_in, beta_out = _penalties(generator)
        if mode == "linear":
            b = b * min(1.0, beta_in)  # so that the minimum is on the grid
        a = _solve(layer, mode, v, b, beta_in, beta_out)
        reached = beta_in / 2 * (a - v).square() + _outer(mode, layer(a), b, beta_out)
        all_costs = beta_in / 2 * (grid - v).square() + _outer(mode, layer(grid), b, beta_out)
        gap = reached[:, 0] - all_costs.min(1).values
        assert float(gap.max()) < 1e-4
        assert float(gap.min()) > -1e-3  # the grid is fine enough to mean something


def test_a_sign_flips_where_the_page_says_so() -> None:
    v = torch.tensor([0.2, -0.2, 0.2, -0.2, 0.0], dtype=torch.float64)
    gradient = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    assert Sign(0.1, dither=0).prox_input_linear(v, gradient, 1.0).tolist() == [-0.1, 0.1, 0.2, -0.2, -0.1]
    # 2 g = beta_in/2 (|v| + margin)^2 is the edge
    edge = (0.2 + 0.1) ** 2 / 4
    for factor, result in ((0.999, 0.2), (1.001, -0.1)):
        one = torch.tensor([0.2], dtype=torch.float64)
        assert Sign(0.1, dither=0).prox_input_linear(one, torch.full_like(one, factor * edge), 1.0).tolist() == [result]


@pytest.mark.parametrize(
    ("layer", "low", "high", "gain"), [(Sign(dither=0.7), -0.7, 0.7, 1 / 0.7), (Quantiser(4, -2, 1), -2, 1, 1)]
)
def test_with_dither_the_linear_step_is_that_of_the_mean_output(
    layer: Sign | Quantiser, low: float, high: float, gain: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    v, gradient = 1.5 * torch.randn(2, 300, generator=generator, dtype=torch.float64)
    beta = 0.8
    a = layer.prox_input_linear(v, gradient, beta)
    grid = torch.arange(-9, 9, 1e-3, dtype=torch.float64)[:, None]

    def cost(a: Tensor) -> Tensor:
        return beta / 2 * (a - v).square() + gradient * gain * a.clamp(low, high)

    assert float((cost(a) - cost(grid).min(0).values).max()) < 1e-6
    assert bool((a != v).any())


@pytest.mark.parametrize(("layer", "spread", "gain"), [(Sign(dither=0.7), 0.7, 1 / 0.7), (Quantiser(4, -2, 1), 0.5, 1)])
def test_the_dither_is_the_noise_under_which_that_is_the_mean(
    layer: Sign | Quantiser, spread: float, gain: float
) -> None:
    low, high = (-0.7, 0.7) if isinstance(layer, Sign) else (-2, 1)
    noise = (torch.arange(20001, dtype=torch.float64) / 10000 - 1) * spread
    for z in (-2.3, -0.7, -0.31, 0.0, 0.2, 0.64, 1.4):
        mean = layer(z + noise).mean()
        assert abs(float(mean) - gain * min(max(z, low), high)) < 1e-3


def test_the_non_negative_step_is_the_z_update_of_relu() -> None:
    generator = torch.Generator().manual_seed(1)
    v, b = 2 * _normal(generator, 2, 5000)
    for beta_in, beta_out in ((1.0, 1.0), (0.3, 7.0), (10.0, 0.1)):
        a = NonNegative().prox_input(v, b, beta_in, beta_out)
        torch.testing.assert_close(a, prox.relu(b, v, beta_out, beta_in), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [0.0, 0.01, 0.4])
@pytest.mark.parametrize("levels", [2, 3, 5, 24, 256])
def test_a_number_that_the_quantiser_moves_lands_on_a_code_it_gains_from(
    levels: int, margin: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    v, b = (2 * _normal(generator, 2, 3000)).to(dtype)
    codes = torch.linspace(-1.3, 0.9, levels, dtype=dtype)
    layer = Quantiser(levels, -1.3, 0.9, dither=False)
    a = layer_prox.quantiser(v, codes, layer_prox.towards(b, 3.0), 0.5, margin)
    moved = a != v
    assert int(moved.sum()) > 300
    assert bool(((layer(a) - b).abs() < (layer(v) - b).abs())[moved].all())
    assert bool((layer(v) == codes[(v[:, None] - codes).abs().argmin(1)]).double().mean() > 0.999)


# -- sorting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_no_order_is_cheaper_than_the_step_of_sorting(size: int, mode: str) -> None:
    layer, generator = Sort(), torch.Generator().manual_seed(3)
    for _ in range(3):
        v, b = _normal(generator, 2, 9, size)
        beta_in, beta_out = _penalties(generator)
        least = torch.full((9,), torch.inf, dtype=torch.float64)
        for order in itertools.permutations(range(size)):
            y = v[:, order]
            wanted = (beta_in * y + beta_out * b) / (beta_in + beta_out) if mode == "quadratic" else y - b / beta_in
            y_best = _isotonic_by_minimax(wanted)
            cost = beta_in / 2 * (y_best - y).square() + _outer(mode, y_best, b, beta_out)
            least = torch.minimum(least, cost.sum(1))
        a = _solve(layer, mode, v, b, beta_in, beta_out)
        gap = _cost(layer, mode, v, b, beta_in, beta_out)(a) - least
        assert float(gap.abs().max()) <= 1e-12 * max(1.0, beta_in, beta_out, 1 / beta_in)


def _isotonic_by_minimax(t: Tensor) -> Tensor:
    """The slow twin: entry k is the max over i <= k of the min over j >= k of the mean of entries i..j."""
    size = t.shape[1]
    result = torch.empty_like(t)
    for k in range(size):
        lows = [torch.stack([t[:, i : j + 1].mean(1) for j in range(k, size)]).amin(0) for i in range(k + 1)]
        result[:, k] = torch.stack(lows).amax(0)
    return result


@pytest.mark.parametrize("shape", [(1, 24), (24, 1), (401, 5), (7, 24), (3, 2)])
def test_all_rows_at_once_are_each_row_by_minimax(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    for t in (
        _normal(generator, *shape),
        1e6 + _normal(generator, *shape),
        torch.zeros(shape, dtype=torch.float64),
        _normal(generator, *shape).round(),
        torch.linspace(2, -2, shape[0], dtype=torch.float64)[:, None] + 1e-3 * _normal(generator, *shape),
    ):
        torch.testing.assert_close(layer_prox.isotonic(t), _isotonic_by_minimax(t), rtol=1e-14, atol=1e-14)


# -- one-hot -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 3, 5, 24])
def test_no_winner_is_cheaper_than_that_of_the_one_hot_step(size: int, mode: str) -> None:
    generator, eye, rows, changes = torch.Generator().manual_seed(5), np.eye(size), 4, 0
    for scale, margin in ((0.1, 0.1), (1.0, 0.1), (0.3, 1.0)):
        v, b = _normal(generator, 2, rows, size)
        v, b = v * scale, 3 * b  # at a small scale entries within the margin behind a winner are lowered too
        layer = OneHot(margin)
        beta_in, beta_out = _penalties(generator)
        cost = _cost(layer, mode, v, b, beta_in, beta_out)
        a = _solve(layer, mode, v, b, beta_in, beta_out)
        least, changes = cost(v), changes + int((a != v).any(1).sum())
        for i, j in itertools.product(range(rows), range(size)):
            if j != int(v[i].argmax()):
                row, start = v[i].numpy(), v[i].numpy().copy()
                start[j] = row.max() + margin
                normals = np.delete(eye[j] - eye, j, 0)
                distance = _row_program(row, start, normals, np.full(size - 1, margin))
                outer = _outer(mode, torch.from_numpy(eye[j]), b[i], beta_out).sum()
                least[i] = torch.minimum(least[i], beta_in / 2 * distance + outer)
        torch.testing.assert_close(cost(a), least, rtol=0, atol=1e-10)
    assert changes >= 4


# -- where the answer may be less than the best ------------------------------------------------------------------------


def _top_k_by_enumeration(
    layer: TopK, mode: str, v: Tensor, b: Tensor, beta_in: float, beta_out: float, margin: float
) -> Tensor:
    """(n,) the least cost over all sets, each with its best level on a fine grid and ternary search."""
    magnitude, least = layer.by == "magnitude", torch.full((len(v),), torch.inf, dtype=v.dtype)
    target = (beta_in * v + beta_out * b) / (beta_in + beta_out) if mode == "quadratic" else v - b / beta_in

    def cost_at(level: Tensor, chosen: list[int]) -> Tensor:
        is_kept = torch.zeros(v.shape[1], dtype=torch.bool)
        is_kept[chosen] = True
        if magnitude:
            kept = torch.where(target >= 0, 1.0, -1.0) * target.abs().clamp_min(level + margin)
            a = torch.where(is_kept, kept, torch.clamp(v, -level, level))
        else:
            a = torch.where(is_kept, torch.maximum(target, level + margin), torch.minimum(v, level))
        y = torch.where(is_kept, a, 0.0)
        return (beta_in / 2 * (a - v).square() + _outer(mode, y, b, beta_out)).sum(1, keepdim=True)

    for chosen in itertools.combinations(range(v.shape[1]), layer.k):
        low = torch.zeros(len(v), 1, dtype=v.dtype) if magnitude else torch.full((len(v), 1), -60.0, dtype=v.dtype)
        high = torch.full((len(v), 1), 60.0, dtype=v.dtype)
        for _ in range(120):  # the cost of a set is convex in the level
            left, right = low + (high - low) / 3, high - (high - low) / 3
            better = cost_at(left, list(chosen)) <= cost_at(right, list(chosen))
            low, high = torch.where(better, low, left), torch.where(better, right, high)
        least = torch.minimum(least, cost_at((low + high) / 2, list(chosen))[:, 0])
    return least


def _gaps(reached: Tensor, least: Tensor, staying: Tensor) -> tuple[float, float]:
    """The share of rows that miss the least cost, and the mean part of the possible gain that is missed."""
    missed = (reached - least) / (staying - least).clamp_min(1e-9)
    return float((missed > 1e-5).double().mean()), float(missed.clamp_min(0).mean())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_the_top_k_step_misses_the_best_set_of_at_most_one_row_in_200(by: str, mode: str) -> None:
    generator, reached, least, staying = torch.Generator().manual_seed(6), [], [], []
    for size, k in ((2, 1), (3, 1), (3, 2), (5, 2), (5, 3), (6, 2)):
        layer = TopK(k, by=by, margin=SMALL, exchange=True)
        v, b = _normal(generator, 2, 100, size)
        beta_in, beta_out = _penalties(generator)
        cost = _cost(layer, mode, v, b, beta_in, beta_out)
        a = _solve(layer, mode, v, b, beta_in, beta_out)
        reached.append(cost(a))
        staying.append(cost(v))
        by_sets = _top_k_by_enumeration(layer, mode, v, b, beta_in, beta_out, SMALL)
        least.append(torch.minimum(by_sets, staying[-1]))
        assert float((reached[-1] - least[-1]).min()) > -1e-7 * max(1.0, beta_in, beta_out, 1 / beta_in)
    share, lost = _gaps(torch.cat(reached), torch.cat(least), torch.cat(staying))
    assert share <= 0.005
    assert lost <= 0.0002


def test_a_scan_of_more_levels_gains_next_to_nothing() -> None:
    generator = torch.Generator().manual_seed(10)
    v, b = _normal(generator, 2, 200, 101)
    layer, costs = TopK(10), []
    cost = _cost(layer, "quadratic", v, b, 1.0, 1.0)
    for scan in (16, 96):
        price = layer_prox.towards(b, 1.0)
        a = layer_prox.top_k(v, 10, price, 1.0, layer.margin, magnitude=False, scan=scan)
        costs.append(float(cost(a).mean()))
    assert costs[0] - costs[1] <= 2e-5 * (float(cost(v).mean()) - costs[1])


def _simplex_by_enumeration(mode: str, v: Tensor, b: Tensor, beta_in: float, beta_out: float) -> Tensor:
    """(n,) the least cost over all supports S: a quadratic program in p on S and tau, its optimum by hand.

    p: the projection of the free minimiser on the face of S. tau: by ternary search."""
    least = torch.full((len(v),), torch.inf, dtype=v.dtype)
    wanted = (beta_in * v + beta_out * b) / (beta_in + beta_out) if mode == "quadratic" else v - b / beta_in
    for size in range(1, v.shape[1] + 1):
        for support in map(list, itertools.combinations(range(v.shape[1]), size)):
            p = torch.zeros_like(v)
            p[:, support] = layer_prox.project(wanted[:, support])
            low, high = torch.full((len(v), 1), -90.0), torch.full((len(v), 1), 90.0)
            low, high = low.to(v), high.to(v)

            def cost(tau: Tensor, p: Tensor = p) -> Tensor:
                a = torch.where(p > 0, p + tau, torch.minimum(v, tau))
                return (beta_in / 2 * (a - v).square() + _outer(mode, p, b, beta_out)).sum(1, keepdim=True)

            for _ in range(110):
                left, right = low + (high - low) / 3, high - (high - low) / 3
                better = cost(left) <= cost(right)
                low, high = torch.where(better, low, left), torch.where(better, right, high)
            least = torch.minimum(least, cost((low + high) / 2)[:, 0])
    return least


@pytest.mark.parametrize("mode", MODES)
def test_the_simplex_step_misses_the_best_support_of_at_most_one_row_in_500(mode: str) -> None:
    generator, reached, least, staying = torch.Generator().manual_seed(7), [], [], []
    for size, scale in ((2, 1.0), (3, 0.3), (3, 1.0), (5, 0.3), (5, 2.0), (6, 1.0)):
        layer = Simplex()
        v, b = scale * _normal(generator, 100, size), _normal(generator, 100, size)
        beta_in, beta_out = _penalties(generator)
        cost = _cost(layer, mode, v, b, beta_in, beta_out)
        reached.append(cost(_solve(layer, mode, v, b, beta_in, beta_out)))
        staying.append(cost(v))
        least.append(_simplex_by_enumeration(mode, v, b, beta_in, beta_out))
        assert float((reached[-1] - least[-1]).min()) > -1e-9
    share, lost = _gaps(torch.cat(reached), torch.cat(least), torch.cat(staying))
    assert share <= 0.002
    assert lost <= 0.0002


def test_no_input_at_random_is_cheaper_than_the_simplex_step_in_two_dimensions() -> None:
    generator, layer = torch.Generator().manual_seed(8), Simplex()
    side = torch.linspace(-4, 4, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    for _ in range(40):
        v, b = _normal(generator, 2, 1, 2)
        beta_in, beta_out = _penalties(generator)
        cost = _cost(layer, "quadratic", v, b, beta_in, beta_out)
        assert float(cost(layer.prox_input(v, b, beta_in, beta_out))) <= float(cost(grid).min()) + 1e-9


def test_one_entry_more_or_less_in_the_support_hardly_betters_the_simplex_step() -> None:
    generator, layer = torch.Generator().manual_seed(11), Simplex()
    v, b = 0.3 * _normal(generator, 100, 24), layer(2 * _normal(generator, 100, 24))
    cost = _cost(layer, "quadratic", v, b, 1.0, 1.0)
    a = layer.prox_input(v, b, 1.0, 1.0)
    best, support, wanted = cost(a), layer(a) > 0, (v + b) / 2
    for j in range(24):
        other = support.clone()
        other[:, j] = ~other[:, j]
        other[other.sum(1) == 0] = True
        p = layer(torch.where(other, wanted, -1e6))
        tau = torch.where(support, a - layer(a), 0).sum(1, keepdim=True) / support.sum(1, keepdim=True)
        for _ in range(60):  # the mean of what is held at tau: a fixed point
            held = (p > 0) | (v > tau)
            tau = torch.where(held, v - p, 0).sum(1, keepdim=True) / held.sum(1, keepdim=True)
        best = torch.minimum(best, cost(torch.where(p > 0, p + tau, torch.minimum(v, tau))))
    assert float((cost(a) - best).mean()) <= 1e-5 * float((cost(v) - best).mean())


@pytest.mark.parametrize("mode", MODES)
def test_the_vector_quantiser_loses_little_and_nothing_at_length_against_a_program_per_codeword(mode: str) -> None:
    generator, reached, least, staying = torch.Generator().manual_seed(9), [], [], []
    for (size, k), _ in itertools.product(((2, 3), (3, 5), (5, 5), (3, 24), (24, 5)), range(2)):
        layer = VectorQuantiser(_normal(generator, k, size)).requires_grad_(False)
        v, b = 1.5 * _normal(generator, 3, size), _normal(generator, 3, size)
        beta_in, beta_out = _penalties(generator)
        cost = _cost(layer, mode, v, b, beta_in, beta_out)
        reached.append(cost(_solve(layer, mode, v, b, beta_in, beta_out)))
        staying.append(cost(v))
        least.append(_codewords_by_programs(layer, mode, v, b, beta_in, beta_out))
        assert float((reached[-1] - least[-1]).min()) > -1e-9
        price = layer_prox.towards(b, beta_out) if mode == "quadratic" else layer_prox.along(b)
        a = layer_prox.vector_quantiser(v, layer.codebook, price, beta_in, layer.margin, candidates=24, rounds=2000)
        torch.testing.assert_close(cost(a), least[-1], rtol=0, atol=1e-8)
    share, lost = _gaps(torch.cat(reached), torch.cat(least), torch.cat(staying))
    assert share <= 0.25
    assert lost <= 0.003


def _codewords_by_programs(
    layer: VectorQuantiser, mode: str, v: Tensor, b: Tensor, beta_in: float, beta_out: float
) -> Tensor:
    """(n,) the least cost over all codewords, the distance to each cell by a quadratic program."""
    codebook, least = layer.codebook, _cost(layer, mode, v, b, beta_in, beta_out)(v)
    own = layer_prox.nearest(v, codebook)
    for i, j in itertools.product(range(len(v)), range(len(codebook))):
        if j != int(own[i]):
            others = codebook[torch.arange(len(codebook)) != j]
            normals = (codebook[j] - others).numpy()
            half = (codebook[j].square().sum() - others.square().sum(1)) / 2
            bound = half.numpy() + layer.margin * (normals**2).sum(1)
            distance = _row_program(v[i].numpy(), codebook[j].numpy(), normals, bound)
            outer = _outer(mode, codebook[j], b[i], beta_out).sum()
            least[i] = torch.minimum(least[i], beta_in / 2 * distance + outer)
    return least
