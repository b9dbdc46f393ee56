"""Proximal maps against grids, against each other, and at their kinks: activations (z-updates) and losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from piecework.methods.admm.activations import Activation, activation_of
from piecework.nn import HardSigmoid, Sign
from piecework.solvers import prox

MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "leaky-relu": nn.LeakyReLU(0.1),
    "steep-leaky-relu": nn.LeakyReLU(3.0),
    "hardtanh": nn.Hardtanh(),
    "lopsided-hardtanh": nn.Hardtanh(-0.5, 1.5),
    "relu6": nn.ReLU6(),
    "torch-hardsigmoid": nn.Hardsigmoid(),
    "hard-sigmoid": HardSigmoid(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "sign": Sign(),
    "identity": nn.Identity(),
}
KINKS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
POSITIVE = st.floats(0.1, 10)
NUMBER = st.one_of(st.sampled_from(KINKS), st.floats(-6, 6))


def _activation(module: nn.Module) -> Activation:
    found = activation_of(module)
    assert found is not None
    return found


def _uniform(generator: torch.Generator, *shape: int, low: float = -4, high: float = 4) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def _penalties(generator: torch.Generator) -> tuple[float, float]:
    """gamma and beta between 0.1 and 10, evenly in the logarithm."""
    gamma, beta = (10 ** _uniform(generator, 2, low=-1, high=1)).tolist()
    return gamma, beta


def _grid_minimum(cost: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    """(rows,) the least cost on [-8, 8] in steps of 2e-3, refined to 2e-6 around the best point.

    cost: (rows, points) -> (rows, points)."""
    coarse = torch.arange(-8, 8.001, 2e-3, dtype=torch.float64).expand(rows, -1)
    costs = cost(coarse)
    centre = coarse.gather(1, costs.argmin(1, keepdim=True))
    fine = centre + torch.arange(-1000, 1001, dtype=torch.float64) * 2e-6
    return torch.minimum(costs.min(1).values, cost(fine).min(1).values)


def _z_cost(act: Activation, a: Tensor, m: Tensor, gamma: float, beta: float, z: Tensor) -> Tensor:
    return gamma * (a - act.forward(z)).square() + beta * (z - m).square()


# -- activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_no_grid_point_is_cheaper_than_the_z_update(name: str) -> None:
    act = _activation(MODULES[name])
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):  # 1200 cases
        a, m = _uniform(generator, 2, 100, 1)
        gamma, beta = _penalties(generator)
        z = act.z_update(a, m, gamma, beta)
        excess = _z_cost(act, a, m, gamma, beta, z)[:, 0] - _grid_minimum(
            lambda z, a=a, m=m, gamma=gamma, beta=beta: _z_cost(act, a, m, gamma, beta, z), 100
        )
        assert float(excess.max()) <= 1e-9


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(a=NUMBER, m=NUMBER, gamma=POSITIVE, beta=POSITIVE)
def test_no_grid_point_is_cheaper_at_a_kink(name: str, a: float, m: float, gamma: float, beta: float) -> None:
    act = _activation(MODULES[name])
    at, mt = torch.tensor([[a]], dtype=torch.float64), torch.tensor([[m]], dtype=torch.float64)
    z = act.z_update(at, mt, gamma, beta)
    cost = float(_z_cost(act, at, mt, gamma, beta, z))
    assert cost <= float(_grid_minimum(lambda z: _z_cost(act, at, mt, gamma, beta, z), 1)) + 1e-9


def _two_candidates(a: Tensor, m: Tensor, gamma: float, beta: float) -> tuple[Tensor, Tensor]:
    """The two candidates of ReLU and which is cheaper; the slow twin of the branch form."""
    up = ((gamma * a + beta * m) / (gamma + beta)).clamp_min(0)
    down = m.clamp_max(0)
    cost_up = gamma * (a - up).square() + beta * (up - m).square()
    cost_down = gamma * a.square() + beta * (down - m).square()
    return torch.where(cost_up < cost_down, up, down), (cost_up - cost_down).abs()


def test_the_branch_form_of_relu_is_its_two_candidate_form() -> None:
    generator = torch.Generator().manual_seed(1)
    a, m = _uniform(generator, 2, 100_000)
    a[:50], m[50:100] = 0.0, 0.0
    for gamma, beta in [(1.0, 1.0), (10.0, 1.0), (0.3, 7.0), (1.0, 1e-6)]:
        twin, gap = _two_candidates(a, m, gamma, beta)
        differ = (prox.relu(a, m, gamma, beta) - twin).abs() > 1e-12
        assert not bool((differ & (gap > 1e-12)).any())  # at a tie either is right
        assert int(differ.sum()) <= 2


@settings(max_examples=100, deadline=None, derandomize=True)
@given(a=NUMBER, gamma=POSITIVE, beta=POSITIVE)
def test_relu_takes_the_cheaper_branch_at_the_edge_of_a_flip(a: float, gamma: float, beta: float) -> None:
    # sqrt(beta / (beta + gamma)) (a - m) = a is the m at which both branches cost the same.
    edge = a - a / math.sqrt(beta / (beta + gamma))
    for m in (edge, edge * (1 + 1e-9), edge * (1 - 1e-9), 0.0):
        at, mt = torch.tensor([a], dtype=torch.float64), torch.tensor([m], dtype=torch.float64)
        twin, gap = _two_candidates(at, mt, gamma, beta)
        z = prox.relu(at, mt, gamma, beta)
        assert float(gap) < 1e-7 or torch.allclose(z, twin, rtol=0, atol=1e-12)


def test_a_unit_that_is_on_never_leaves_the_positive_side() -> None:
    generator = torch.Generator().manual_seed(2)
    a, m = _uniform(generator, 1000, low=-9, high=9), _uniform(generator, 1000, low=0, high=4)
    assert float(prox.relu(a, m, 2.0, 0.7).min()) >= 0


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_a_smooth_z_update_is_stationary(name: str) -> None:
    act = _activation(MODULES[name])
    assert act.derivative is not None
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        a, m = _uniform(generator, 2, 500, low=-8, high=8)
        gamma, beta = _penalties(generator)
        z = act.z_update(a, m, gamma, beta)
        gradient = 2 * gamma * (act.forward(z) - a) * act.derivative(z) + 2 * beta * (z - m)
        assert float(gradient.abs().max()) <= 1e-5  # a cost that is within rounding of its minimum


@pytest.mark.parametrize("name", [name for name in MODULES if name != "sign"])
def test_the_derivative_is_the_finite_difference_away_from_kinks(name: str) -> None:
    act = _activation(MODULES[name])
    assert act.derivative is not None
    z = torch.linspace(-4.03, 7.07, 313, dtype=torch.float64)
    step = 1e-6
    slope = (act.forward(z + step) - act.forward(z - step)) / (2 * step)
    torch.testing.assert_close(act.derivative(z), slope, rtol=0, atol=1e-8)


def test_sign_stays_or_lands_on_the_other_side_of_its_jump() -> None:
    for dtype in (torch.float32, torch.float64):
        m = torch.tensor([2.0, -2.0, 0.0, 0.3, -0.3], dtype=dtype)
        a = torch.tensor([-5.0, 5.0, -1.0, 0.0, 0.0], dtype=dtype)
        z = prox.sign(a, m, 1.0, 1.0)
        assert z.dtype == dtype
        assert Sign()(z).tolist() == [-1, 1, -1, 1, -1]
        assert float(z[:3].abs().max()) < 1e-30
        assert z[3:].tolist() == m[3:].tolist()


def test_a_fixed_point_of_the_activation_stays_where_it_is() -> None:
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    for name, module in MODULES.items():
        act = _activation(module)
        # Far more weight on z = m: where a is h(m) already, nothing can be gained by moving.
        torch.testing.assert_close(act.z_update(act.forward(z), z, 2.0, 0.5), z, rtol=0, atol=1e-9, msg=name)


def test_modules_without_a_z_update_are_unknown() -> None:
    for module in (nn.GELU(), nn.Softmax(1), nn.Linear(2, 3), nn.Dropout(), nn.BatchNorm1d(3), nn.PReLU()):
        assert activation_of(module) is None


# -- losses ------------------------------------------------------------------------------------------------------------


def _scalar_losses() -> dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]]:
    """name: (prox, loss of z and y)."""
    return {
        "squared": (prox.squared, lambda z, y: (z - y).square()),
        "hinge": (prox.hinge, lambda z, y: torch.where(y > 0.5, 1 - z, z).clamp_min(0)),
        "logistic": (prox.logistic, lambda z, y: nn.functional.softplus(z) - y * z),
    }


@pytest.mark.parametrize("name", _scalar_losses())
def test_no_grid_point_is_cheaper_than_the_prox_of_the_loss(name: str) -> None:
    solve, loss = _scalar_losses()[name]
    generator = torch.Generator().manual_seed(4)
    for _ in range(12):
        m, dual = _uniform(generator, 2, 100, 1)
        y = (torch.rand(100, 1, generator=generator) < 0.5).double()
        beta = _penalties(generator)[1]
        dual = dual / 4 if name == "squared" else dual.sigmoid() - 1 + y * 0.5  # so that the minimum is on the grid
        for given_dual in (None, dual):
            lam = torch.zeros_like(m) if given_dual is None else given_dual

            def cost(z: Tensor, m: Tensor = m, y: Tensor = y, lam: Tensor = lam, beta: float = beta) -> Tensor:
                return loss(z, y) + lam * z + beta * (z - m).square()

            z = solve(m, y, beta, given_dual)
            assert float((cost(z)[:, 0] - _grid_minimum(cost, 100)).max()) <= 1e-9


@settings(max_examples=150, deadline=None, derandomize=True)
@given(w=st.one_of(st.sampled_from(KINKS), st.floats(-4, 4)), beta=POSITIVE, y=st.sampled_from([0.0, 1.0]))
def test_the_prox_of_the_hinge_is_right_at_its_kinks(w: float, beta: float, y: float) -> None:
    for m in (w, w + 1 / (2 * beta), w - 1 / (2 * beta)):
        mt, yt = torch.tensor([[m]], dtype=torch.float64), torch.tensor([[y]], dtype=torch.float64)

        def cost(z: Tensor, mt: Tensor = mt) -> Tensor:
            return (1 - z if y > 0.5 else z).clamp_min(0) + beta * (z - mt).square()

        assert float(cost(prox.hinge(mt, yt, beta))) <= float(_grid_minimum(cost, 1)) + 1e-9


@pytest.mark.parametrize("beta", [1e-6, 1e-4, 1e-2, 0.5, 5.0])
def test_the_logistic_prox_is_stationary(beta: float) -> None:
    generator = torch.Generator().manual_seed(5)
    m, dual = _uniform(generator, 2, 2000, 1, low=-30, high=30)
    y = (torch.rand(2000, 1, generator=generator) < 0.5).double()
    for lam in (torch.zeros_like(m), torch.tanh(dual) * 0.5 + (0.5 - y) * -1.0):
        z = prox.logistic(m, y, beta, lam)
        gradient = torch.sigmoid(z) - y + lam + 2 * beta * (z - m)
        assert float(gradient.abs().max()) <= 1e-9


@pytest.mark.parametrize("beta", [1e-6, 1e-4, 1e-2, 0.5, 5.0])
@pytest.mark.parametrize("num_outputs", [2, 3, 10])
def test_the_softmax_prox_is_stationary_within_its_iterations(beta: float, num_outputs: int) -> None:
    generator = torch.Generator().manual_seed(6)
    m = 3 * torch.randn(2000, num_outputs, generator=generator, dtype=torch.float64)
    y = nn.functional.one_hot(torch.randint(num_outputs, (2000,), generator=generator), num_outputs).double()
    for smoothing in (0.0, 0.1):
        target = y * (1 - smoothing) + smoothing / num_outputs
        z = prox.softmax(m, target, beta)
        gradient = torch.softmax(z, 1) - target + 2 * beta * (z - m)
        assert float(gradient.abs().max()) <= 1e-9
    # With a multiplier that the loss itself could give: minus a gradient, scaled.
    dual = 0.5 * (y - torch.softmax(m, 1))
    z = prox.softmax(m, y, beta, dual)
    assert float((torch.softmax(z, 1) - y + dual + 2 * beta * (z - m)).abs().max()) <= 1e-9


@pytest.mark.parametrize("beta", [1e-4, 1e-2, 0.5, 5.0])
def test_softmax_of_two_outputs_is_the_logistic_prox_of_their_difference(beta: float) -> None:
    generator = torch.Generator().manual_seed(7)
    m = 2 * torch.randn(500, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (500,), generator=generator)
    pair = prox.softmax(m, nn.functional.one_hot(y, 2).double(), beta)
    difference = prox.logistic(m[:, 1:] - m[:, :1], y[:, None].double(), beta / 2)
    torch.testing.assert_close(pair[:, 1:] - pair[:, :1], difference, rtol=0, atol=1e-10)


def test_far_outputs_do_not_overflow() -> None:
    m = torch.tensor([[800.0, -800.0, 0.0], [-800.0, 800.0, 5.0]], dtype=torch.float64)
    y = torch.eye(3, dtype=torch.float64)[[0, 0]]
    z = prox.softmax(m, y, 1.0)
    assert bool(z.isfinite().all())
    assert float((torch.softmax(z, 1) - y + 2 * (z - m)).abs().max()) <= 1e-9
    assert bool(prox.logistic(m, y, 1.0).isfinite().all())


def test_a_row_of_the_softmax_prox_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(8)
    m = 4 * torch.randn(301, 5, generator=generator, dtype=torch.float64)
    y = nn.functional.one_hot(torch.randint(5, (301,), generator=generator), 5).double()
    alone = torch.cat([prox.softmax(m[i : i + 1], y[i : i + 1], 0.7) for i in range(301)])
    torch.testing.assert_close(prox.softmax(m, y, 0.7), alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.09, 1.0])
def test_the_softmax_prox_bears_any_multiplier(beta: float) -> None:
    generator = torch.Generator().manual_seed(9)
    m, dual = 30 * torch.randn(2, 400, 7, generator=generator, dtype=torch.float64)
    y = nn.functional.one_hot(torch.randint(7, (400,), generator=generator), 7).double()
    z = prox.softmax(m, y, beta, dual / 10)
    gradient = torch.softmax(z, 1) - y + dual / 10 + 2 * beta * (z - m)
    assert float(gradient.abs().max()) <= 1e-9


def test_no_rows_are_no_trouble() -> None:
    none, target = torch.empty(0, 3, dtype=torch.float64), torch.empty(0, 3, dtype=torch.float64)
    for solve in (prox.squared, prox.hinge, prox.logistic, prox.softmax):
        assert solve(none, target, 1.0).shape == (0, 3)
    for module in MODULES.values():
        assert _activation(module).z_update(none, none, 1.0, 1.0).shape == (0, 3)
