"""Losses: values, decisions, closed-form derivatives against autograd, proximal maps, and what each refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from piecework import losses
from piecework.losses import CurvedLoss, Hinge, Logistic, Loss, Softmax, Squared, encode
from piecework.training import BadInput, CannotTrain

# name: (loss, outputs)
CASES: dict[str, tuple[Loss, int]] = {
    "squared, two classes": (Squared(), 1),
    "squared, five classes": (Squared(), 5),
    "hinge, two classes": (Hinge(), 1),
    "hinge, five classes": (Hinge(), 5),
    "logistic": (Logistic(), 1),
    "smoothed logistic": (Logistic(label_smoothing=0.2), 1),
    "softmax": (Softmax(), 5),
    "smoothed softmax": (Softmax(label_smoothing=0.2), 5),
}


def _problem(outputs: int, *, rows: int = 37, seed: int = 0) -> tuple[Tensor, Tensor]:
    """z (rows, outputs) and y (rows,) classes."""
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    return z, torch.randint(max(2, outputs), (rows,), generator=generator)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> tuple[Loss, Tensor, Tensor]:
    loss, outputs = request.param
    return loss, *_problem(outputs)


def test_the_call_is_the_total_over_the_number_of_samples(case: tuple[Loss, Tensor, Tensor]) -> None:
    loss, z, y = case
    torch.testing.assert_close(loss(z, y) * len(z), loss.total(z, y), rtol=1e-14, atol=0)
    assert loss(z, y).shape == loss.total(z, y).shape == ()
    assert loss.total(z.float(), y).dtype == torch.float64


def test_a_total_of_no_rows_is_zero(case: tuple[Loss, Tensor, Tensor]) -> None:
    loss, z, y = case
    assert float(loss.total(z[:0], y[:0])) == 0
    assert float(loss(z[:0], y[:0])) == 0


def test_the_gradient_is_that_of_autograd(case: tuple[Loss, Tensor, Tensor]) -> None:
    loss, z, y = case
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, y) * len(z), leaf)
    torch.testing.assert_close(loss.gradient(z, y), expected, rtol=0, atol=1e-13)


def test_the_curvature_is_that_of_autograd(case: tuple[Loss, Tensor, Tensor]) -> None:
    loss, z, y = case
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.functional.hvp(lambda z: loss(z, y) * len(z), z, v)[1]
    torch.testing.assert_close(loss.hessian_mv(z, y, v), expected, rtol=0, atol=1e-12)


def test_the_curvature_stays_below_its_bound(case: tuple[Loss, Tensor, Tensor]) -> None:
    loss, z, y = case
    if loss.curvature_bound is None:  # the hinge: straight pieces
        assert not bool(loss.hessian_mv(z, y, torch.ones_like(z)).any())
        return
    for scale in (0.0, 0.3, 3.0):
        for row in range(5):
            columns = [
                loss.hessian_mv(scale * z[row : row + 1], y[row : row + 1], e[None])
                for e in torch.eye(z.shape[1], dtype=z.dtype)
            ]
            assert float(torch.linalg.eigvalsh(torch.cat(columns))[-1]) <= loss.curvature_bound + 1e-12


def test_the_prox_has_the_least_cost_of_all_points_nearby(case: tuple[Loss, Tensor, Tensor]) -> None:
    loss, m, y = case
    beta, dual = 0.7, 0.1 * torch.sin(m)

    def cost(z: Tensor) -> float:
        return float(loss.total(z, y) + (z * dual).sum() + beta * (z - m).square().sum())

    z = loss.prox(m, y, beta, dual)
    least, generator = cost(z), torch.Generator().manual_seed(2)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            assert cost(z + size * torch.randn(z.shape, generator=generator, dtype=torch.float64)) >= least


def test_the_prox_without_a_multiplier_is_the_one_with_a_multiplier_of_zero(case: tuple[Loss, Tensor, Tensor]) -> None:
    loss, m, y = case
    torch.testing.assert_close(loss.prox(m, y, 0.7), loss.prox(m, y, 0.7, torch.zeros_like(m)), rtol=0, atol=1e-14)


def test_the_published_multiplier_step_is_half_way_to_minus_the_gradient() -> None:
    for loss, outputs in ((Squared(), 5), (Logistic(), 1), (Softmax(), 5)):
        m, y = _problem(outputs)
        beta, dual = 0.8, 0.2 * torch.cos(_problem(outputs, seed=3)[0])
        z = loss.prox(m, y, beta, dual)
        g = loss.gradient(z, y)
        torch.testing.assert_close(dual + beta * (z - m), (dual - g) / 2, rtol=0, atol=1e-12)
        torch.testing.assert_close(dual + 2 * beta * (z - m), -g, rtol=0, atol=1e-12)


def test_the_published_multiplier_of_the_hinge_stays_between_zero_and_minus_its_slope() -> None:
    m, y = _problem(1, rows=501)
    dual = torch.zeros_like(m)
    for step in range(20):
        z = Hinge().prox(m + torch.sin(torch.tensor(float(step))), y, 0.6, dual)
        dual = dual + 0.6 * (z - m - torch.sin(torch.tensor(float(step))))
        assert bool(((dual >= -1e-12) & (dual <= 1 + 1e-12))[y == 1].all())
        assert bool(((dual <= 1e-12) & (dual >= -1 - 1e-12))[y == 0].all())


def test_values_are_those_of_the_definitions() -> None:
    z, y = _problem(5)
    one_hot = nn.functional.one_hot(y, 5).double()
    signs = 1 - 2 * one_hot  # max(1 - z, 0) where the class is right, max(z, 0) where it is not
    assert float(Squared()(z, y)) == pytest.approx(float((z - one_hot).square().sum() / 37))
    assert float(Hinge()(z, y)) == pytest.approx(float((signs * z + one_hot).clamp_min(0).sum() / 37))
    assert float(Softmax()(z, y)) == pytest.approx(float(nn.functional.cross_entropy(z, y)))
    smooth = nn.functional.cross_entropy(z, y, label_smoothing=0.3)
    assert float(Softmax(label_smoothing=0.3)(z, y)) == pytest.approx(float(smooth))
    column, binary = _problem(1)
    expected = nn.functional.binary_cross_entropy_with_logits(column[:, 0], binary.double())
    assert float(Logistic()(column, binary)) == pytest.approx(float(expected))
    smoothed = nn.functional.binary_cross_entropy_with_logits(column[:, 0], binary * 0.7 + 0.15)
    assert float(Logistic(label_smoothing=0.3)(column, binary)) == pytest.approx(float(smoothed))


def test_targets_of_smoothed_softmax_are_the_gradients_zero() -> None:
    _, y = _problem(5)
    loss = Softmax(label_smoothing=0.1)
    torch.testing.assert_close(loss.targets(y, 5, torch.float64).sum(1), torch.ones(37, dtype=torch.float64))
    best = loss.targets(y, 5, torch.float64).log()
    assert float(loss.gradient(best, y).abs().max()) < 1e-14


def test_plain_losses_are_without_smoothing() -> None:
    assert Softmax(label_smoothing=0.1).plain() == Softmax()
    assert Logistic(label_smoothing=0.1).plain() == Logistic()
    for loss in (Squared(), Hinge()):
        assert loss.plain() == loss


def test_decisions_follow_the_thresholds() -> None:
    z = torch.tensor([[-0.2], [0.2], [0.7]])
    assert Logistic().decide(z).tolist() == [0, 1, 1]
    for loss in (Squared(), Hinge()):
        assert loss.decide(z).tolist() == [0, 0, 1]
    rows = torch.tensor([[0.1, 0.9, 0.2], [0.5, -1.0, 0.4]])
    for many in (Squared(), Hinge(), Softmax()):
        assert many.decide(rows).tolist() == [1, 0]
        assert many.decide(rows).dtype == torch.int64


def test_classes_are_encoded_and_real_targets_pass() -> None:
    y = torch.tensor([2, 0, 1])
    assert encode(y, 3, torch.float32).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert encode(torch.tensor([1, 0]), 1, torch.float64).tolist() == [[1], [0]]
    real = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    assert encode(real, 2, torch.float32).dtype == torch.float32
    assert Squared().targets(real, 2, torch.float64).tolist() == real.tolist()
    assert float(Squared()(real + 1, real)) == 2
    assert Squared().residual(real + 1, real).square().tolist() == [[pytest.approx(2), pytest.approx(2)]]


def test_losses_are_found_by_name_and_by_task() -> None:
    assert {name: type(losses.named(name)) for name in losses.NAMES} == losses.NAMES
    assert [losses.auto(task).name for task in ("binary", "multiclass", "regression")] == [
        "logistic",
        "softmax",
        "squared",
    ]
    with pytest.raises(BadInput, match=r"no loss 'hunge'; there are squared, hinge, logistic, softmax"):
        losses.named("hunge")


def test_a_loss_that_does_not_fit_the_task_says_which_would() -> None:
    for loss in (Hinge(), Softmax()):
        with pytest.raises(CannotTrain, match="real numbers; use squared"):
            loss.check("regression", 3)
    with pytest.raises(CannotTrain, match="use softmax"):
        Logistic().check("multiclass", 3)
    with pytest.raises(CannotTrain, match="use logistic"):
        Softmax().check("binary", 1)
    for fits in (Squared(), Hinge(), Logistic()):
        fits.check("binary", 1)
    for fits in (Squared(), Hinge(), Softmax()):
        fits.check("multiclass", 3)
    Squared().check("regression", 2)


CURVED = {name: case for name, case in CASES.items() if "hinge" not in name}


@pytest.mark.parametrize("name", CURVED)
def test_the_root_times_its_transpose_is_the_curvature(name: str) -> None:
    loss, outputs = CURVED[name]
    z, y = _problem(outputs)
    units = [torch.eye(outputs, dtype=z.dtype)[c].expand_as(z) for c in range(outputs)]
    root = torch.stack([_curved(loss).root_mv(z, y, unit) for unit in units], dim=2)
    transposed = torch.stack([_curved(loss).root_t_mv(z, y, unit) for unit in units], dim=2)
    hessian = torch.stack([loss.hessian_mv(z, y, unit) for unit in units], dim=2)
    torch.testing.assert_close(transposed, root.transpose(1, 2), rtol=0, atol=1e-14)
    torch.testing.assert_close(root @ root.transpose(1, 2), hessian, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", CURVED)
def test_the_root_times_the_residual_is_the_gradient(name: str) -> None:
    loss, outputs = CURVED[name]
    z, y = _problem(outputs)
    torch.testing.assert_close(
        _curved(loss).root_mv(z, y, _curved(loss).residual(z, y)), loss.gradient(z, y), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_residuals_stay_finite_where_a_row_is_wrong_and_sure_of_it(name: str, dtype: torch.dtype) -> None:
    loss, outputs = CURVED[name]
    z, y = _problem(outputs)
    z = (400 * z).to(dtype)
    s = _curved(loss).residual(z, y)
    assert bool(s.isfinite().all())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    scale = float(loss.gradient(z, y).abs().max())
    torch.testing.assert_close(
        _curved(loss).root_mv(z, y, s), loss.gradient(z, y), rtol=tolerance, atol=tolerance * scale
    )


def test_the_squared_residual_gives_the_total() -> None:
    z, y = _problem(5)
    s = Squared().residual(z, y)
    assert float(s.square().sum() / 2) == pytest.approx(float(Squared().total(z, y)), rel=1e-14)


def _curved(loss: Loss) -> CurvedLoss:
    assert isinstance(loss, Squared | Logistic | Softmax)
    return loss
