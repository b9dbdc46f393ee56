"""Block-ADMM through layers without a derivative: their blocks, their proximal steps, and one call for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piecework import Batch, BlockADMM, losses
from piecework.nn import BlackBox, VectorQuantiser

LOSS = losses.Softmax()


def _rows(n: int = 24, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return Batch(x, (x[:, :3] + 0.3 * x[:, 2:]).argmax(1), torch.arange(n))


def _linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in layer.parameters():
            one.copy_(torch.randn(one.shape, generator=generator, dtype=torch.float64) / inputs**0.5)
    return layer


def _around(layer: nn.Module, *, width: int = 7) -> nn.Sequential:
    """The layer between two linear ones."""
    return nn.Sequential(_linear(5, width, 1), layer, _linear(width, 3, 2))


def test_the_candidates_of_a_black_box_come_from_a_seed_and_leave_the_global_generator_alone() -> None:
    def moved(seed: int, noise: int) -> Tensor:
        model = _around(BlackBox(torch.floor, candidates=5))
        training = BlockADMM(lr=0.1, beta=0.01, seed=seed).bind(model, LOSS)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        training.step(_rows())
        training.step(_rows())
        assert torch.equal(torch.get_rng_state(), before)
        return model[0].weight.detach()

    assert torch.equal(moved(0, 1), moved(0, 2))
    assert not torch.equal(moved(0, 1), moved(1, 1))


class _Kept(torch.optim.SGD):
    """Plain gradient descent that keeps what it was given."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.0) -> None:
        super().__init__(parameters, lr=lr)
        self.given: list[list[Tensor]] = []

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.given.append([one.grad.clone() for one in self.param_groups[0]["params"]])
        super().step()


def _given(training: Any, block: int, number: int = 0) -> list[Tensor]:
    """What the optimiser of a block was given in its step of this number."""
    given: list[Tensor] = training._blocks[block].optimizer.given[number]
    return given


def _close(one: Tensor, other: Tensor, error: float = 1e-12) -> bool:
    return float((one - other).norm()) <= error * float(other.norm()) and float(other.norm()) > 0


def _codewords(k: int = 9, d: int = 7) -> Tensor:
    return torch.randn(k, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("prox", ["linear", "exact"])
def test_codewords_get_the_gradient_of_backpropagation(prox: Any) -> None:
    model, batch = _around(VectorQuantiser(_codewords())), _rows()
    (wanted,) = torch.autograd.grad(LOSS(model(batch.x), batch.y), [model[1].codebook])
    training = BlockADMM(beta=0.01, prox=prox, optimizer=_Kept).bind(model, LOSS)
    training.step(batch)
    assert _close(_given(training, 1)[0], wanted)
