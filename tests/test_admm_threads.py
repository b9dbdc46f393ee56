"""The threads of a pass: what they find does not depend on their number, nor on who is first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from chains import bind, chain, flat, quarters, sweeps
from piecework import losses
from piecework.methods.admm import crew
from piecework.training import Batch

close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _train(batch: Batch, number: int, **settings):  # type: ignore[no-untyped-def]
    torch.set_num_threads(number)
    model = chain(5, 24, 7, 4, activation=settings.pop("activation", "relu"))
    training = bind(model, losses.named(settings.pop("loss", "squared")), tile=64, **settings)
    rows = sweeps(training, batch, 4)
    return training, flat(model), rows[-1]["loss"]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "squared"}, {"loss": "softmax"}, {"loss": "hinge"}, {"loss": "squared", "multiplier": True},
        {"loss": "softmax", "multiplier": True}, {"activation": "sign"}, {"activation": "tanh", "acceleration": False},
    ],
)  # fmt: skip
def test_the_number_of_threads_does_not_matter(settings) -> None:  # type: ignore[no-untyped-def]
    batch = quarters(1000)
    alone, weights, value = _train(batch, 1, **settings)
    assert len(alone._crew.tiles) == 1
    for number in (2, 3):
        training, other, same = _train(batch, number, **settings)
        assert len(training._crew.tiles) == number
        assert training._crew._pool is not None
        close(other, weights)
        assert same == pytest.approx(value, rel=1e-12)


@pytest.mark.usefixtures("threads")
def test_two_threads_give_the_same_bits_every_time() -> None:
    _, first, value = _train(quarters(1000), 2)
    for _ in range(3):
        _, again, same = _train(quarters(1000), 2)
        assert torch.equal(again, first)
        assert same == value


class _Watching(nn.Module):
    """Notes which thread prepares a tile, among how many its operations are divided, and whether it keeps gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, int, bool]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.mm(x.t(), x)
        self.seen.add((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        return x


@pytest.mark.usefixtures("threads")
def test_within_a_sweep_a_thread_works_alone_and_afterwards_everybody_has_what_he_had() -> None:
    torch.set_num_threads(2)
    watching = _Watching()
    batch = quarters(1000)
    sweeps(bind(nn.Sequential(watching, chain(5, 24, 4)), tile=64), batch, 2)
    assert len({thread for thread, _, _ in watching.seen}) == 2
    assert {(number, grad) for _, number, grad in watching.seen} == {(1, False)}
    found = [torch.get_num_threads()]
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2, 2]


@pytest.mark.usefixtures("threads")
def test_a_thread_keeps_the_number_it_took_whatever_others_set() -> None:
    torch.set_num_threads(2)
    found = []
    taken, others_set = threading.Event(), threading.Event()

    def look() -> None:
        crew._take_threads(1)
        taken.set()
        others_set.wait()
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=look)
    thread.start()
    taken.wait()
    torch.set_num_threads(3)
    others_set.set()
    thread.join()
    assert found == [1]


@pytest.mark.usefixtures("threads")
def test_wide_layers_and_few_rows_leave_the_threads_to_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    few = bind(chain(5, 24, 4), tile=16)
    sweeps(few, quarters(16 * 2 * crew.TILES_APART - 1), 1)
    assert len(few._crew.tiles) == 2
    assert few._crew._pool is None
    sweeps(few, quarters(16 * 2 * crew.TILES_APART), 1)
    assert few._crew._pool is not None
    monkeypatch.setattr(crew, "WIDEST", 23)
    wide = bind(chain(5, 24, 4))
    assert len(wide._crew.tiles) == 1
    monkeypatch.setattr(crew, "WIDEST", 24)
    monkeypatch.setattr(crew, "MOST_WORKERS", 2)
    torch.set_num_threads(4)
    both = bind(chain(5, 24, 4))
    assert (len(both._crew.tiles), both._crew._threads) == (2, 2)


@pytest.mark.usefixtures("threads")
def test_a_tile_has_so_many_numbers_for_each_thread_that_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    wide = chain(5, 500, 4)
    apart = bind(wide)._crew.tiles
    monkeypatch.setattr(crew, "WIDEST", 499)
    together = bind(wide)._crew.tiles
    assert [tiles.rows for tiles in apart] == [640, 640]
    assert [tiles.rows for tiles in together] == [1280]


class _Refusing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x == 7).any():
            raise ValueError("seven")
        return x


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("row", [0, 999])
def test_an_error_in_any_thread_is_the_error_of_the_sweep(row: int) -> None:
    torch.set_num_threads(2)
    batch = quarters(1000)
    batch.x[row] = 7
    with pytest.raises(ValueError, match="seven"):
        sweeps(bind(nn.Sequential(_Refusing(), chain(5, 24, 4)), tile=64), batch, 1)
