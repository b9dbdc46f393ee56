"""DeepFacto's wish for few factors a row: its measure, its slope, and that it acts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from piecework import Batch, DeepFacto, factors, losses
from piecework.methods.deepfacto.codes import density
from piecework.models import mlp
from piecework.training import BadInput


def rows(num: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(num, 5, generator=generator, dtype=torch.float64)
    return Batch(x, (x[:, 0] > x[:, 1]).long() + (x[:, 2] > 0.7).long())


def model() -> torch.nn.Module:
    return mlp(5, [9], 3, factors=4, seed=1, dtype=torch.float64)


def encoder_move(**settings: Any) -> Tensor:
    """What one step of gradient descent does to the first weights."""
    network, batch = model(), rows()
    weight = network[0].weight
    before = weight.detach().clone()
    recipe = DeepFacto(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0), **settings)
    recipe.bind(network, losses.Softmax()).step(batch)
    return weight.detach() - before


def test_density_is_1_for_one_factor_and_the_root_of_the_rank_for_all_alike() -> None:
    one = torch.eye(5, dtype=torch.float64)
    assert density(one) == 1
    torch.testing.assert_close(density(7 * torch.ones_like(one)), torch.tensor(5.0, dtype=torch.float64).sqrt())
    images = torch.rand(3, 5, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(density(images), density(images.movedim(1, -1).reshape(-1, 5)))


def test_codes_of_zeros_have_no_density_and_a_finite_slope() -> None:
    codes = torch.zeros(3, 4, requires_grad=True)
    found = density(codes)
    (slope,) = torch.autograd.grad(found, codes)
    assert found == 0
    assert slope.isfinite().all()


@pytest.mark.parametrize("decoder", [0.0, 2.0])
def test_contrast_tends_to_implicit_with_sparsity_too(decoder: float) -> None:
    common: dict[str, Any] = {"sparsity": 0.7, "decoder": decoder, "reconstruction": 2.0}
    truth = encoder_move(through="implicit", **common)
    assert (truth - encoder_move(through="implicit", **{**common, "sparsity": 0.0})).norm() > 1e-2 * truth.norm()
    gaps = [
        float((encoder_move(through="contrast", coupling=weight, code_steps=3000, **common) - truth).norm())
        for weight in (1e4, 1e5)
    ]
    assert gaps[1] < 1e-3 * truth.norm()
    assert gaps[1] < 0.2 * gaps[0]


@pytest.mark.parametrize("through", ["implicit", "contrast", "envelope", "block-admm"])
def test_codes_become_sparser(through: Any) -> None:
    batch, found = rows(60), []
    for sparsity in (0.0, 1.0):
        network = model()
        training = DeepFacto(through=through, sparsity=sparsity, lr=0.01).bind(network, losses.Softmax())
        for _ in range(60):
            training.step(batch)
        training.sync()
        found.append(float(density(factors.codes(network, batch.x))))
    assert found[1] < found[0] - 0.05


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(BadInput, match="sparsity must be at least 0"):
        DeepFacto(sparsity=-0.1)
