"""The threads of a pass: what they find does not depend on their number, nor on who is first."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from chains import bind, chain, flat, quarters, sweeps
from piecework import losses, testing
from piecework.methods.admm import crew
from piecework.nn import Standardise
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


class _Watching(nn.Identity):
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
    for number, workers, each in [(3, 1, 2), (4, 2, 2), (5, 1, 3), (6, 2, 3)]:
        torch.set_num_threads(number)
        both = bind(chain(5, 24, 4))
        assert (len(both._crew.tiles), both._crew._threads) == (workers, each)


@pytest.mark.usefixtures("threads")
def test_a_tile_has_so_many_numbers_for_each_thread_that_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    wide = chain(5, 500, 4)
    apart = bind(wide)._crew.tiles
    monkeypatch.setattr(crew, "WIDEST", 499)
    together = bind(wide)._crew.tiles
    assert [tiles.rows for tiles in apart] == [640, 640]
    assert [tiles.rows for tiles in together] == [1280]


class _Refusing(nn.Identity):
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
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("threads")
def test_a_pass_that_fails_leaves_nobody_behind_who_writes() -> None:
    torch.set_num_threads(2)
    staff = bind(chain(5, 24, 4), tile=64)._crew
    ended = []

    def work(tiles, share):  # type: ignore[no-untyped-def]
        if tiles is staff.tiles[0]:
            raise ValueError("seven")
        time.sleep(0.2)
        ended.append(tiles)
        return []

    with pytest.raises(ValueError, match="seven"):
        staff.sum(quarters(1000), work)
    assert ended == [staff.tiles[1]]


@pytest.mark.usefixtures("threads")
def test_sums_are_added_in_the_order_of_the_workers_whoever_is_first() -> None:
    torch.set_num_threads(3)
    staff = bind(chain(5, 24, 4), tile=64)._crew
    values = [1e20, -1e20, 1.0]

    def work(tiles, share):  # type: ignore[no-untyped-def]
        worker = staff.tiles.index(tiles)
        time.sleep(0.2 * (worker == 1))
        return [torch.tensor([values[worker]])]

    (total,) = staff.sum(quarters(1000), work)
    assert float(total) == 1.0


@pytest.mark.usefixtures("threads")
def test_workers_do_not_divide_their_operations_wherever_they_are_asked_from() -> None:
    torch.set_num_threads(2)
    staff = bind(chain(5, 24, 4), tile=64)._crew
    (numbers,) = staff.sum(
        quarters(1000), lambda tiles, _: [torch.tensor([torch.get_num_threads()]) * (tiles is staff.tiles[1])]
    )
    assert int(numbers) == 1
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("threads")
def test_a_training_that_is_bound_while_another_sweeps_has_all_threads() -> None:
    torch.set_num_threads(2)
    one, batch = bind(chain(5, 24, 4), tile=64), quarters(1000)
    workers, numbers = [], []

    def bound() -> None:
        other = bind(chain(5, 24, 4), tile=64)
        workers.append(len(other._crew.tiles))
        other.step(batch)
        numbers.append(torch.get_num_threads())

    def look() -> None:
        numbers.append(torch.get_num_threads())

    with one._crew.at_work(batch):
        for call in (bound, look):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        assert torch.get_num_threads() == 1
    assert workers == [2]
    look()
    assert numbers == [2, 2, 2]


@pytest.mark.usefixtures("threads")
def test_ranks_in_memory_have_all_threads_each_and_the_same_bits_every_time() -> None:
    torch.set_num_threads(2)
    batch = quarters(2000)

    def rank(group):  # type: ignore[no-untyped-def]
        model = chain(5, 24, 4)
        training = bind(model, group=group, tile=64)
        half = slice(1000 * group.rank, 1000 * group.rank + 1000)
        sweeps(training, Batch(batch.x[half], batch.y[half]), 3)
        return len(training._crew.tiles), flat(model)

    first = None
    for _ in range(8):
        (ones, weights), (twos, same) = testing.threads(2, rank)
        assert (ones, twos) == (2, 2)
        first = weights if first is None else first
        assert torch.equal(weights, first)
        assert torch.equal(same, first)


@pytest.mark.usefixtures("threads")
def test_a_rank_in_memory_keeps_its_threads_when_another_sets_its_own_at_once() -> None:
    torch.set_num_threads(2)
    has_set = threading.Event()

    def rank(group):  # type: ignore[no-untyped-def]
        if group.rank == 0:
            torch.set_num_threads(1)
            has_set.set()
        assert has_set.wait(10)
        return torch.get_num_threads()

    assert testing.threads(2, rank) == [1, 2]


@pytest.mark.usefixtures("threads")
def test_a_layer_that_draws_random_numbers_is_asked_by_one_thread() -> None:
    torch.set_num_threads(2)
    assert len(bind(nn.Sequential(nn.Dropout(0.1), chain(5, 24, 4)))._crew.tiles) == 1
    scaling = Standardise(torch.zeros(5), torch.ones(5))
    assert len(bind(nn.Sequential(nn.Flatten(), scaling, chain(5, 24, 4)))._crew.tiles) == 2


@pytest.mark.usefixtures("threads")
def test_a_sweep_works_in_inference_mode_and_so_does_a_copy() -> None:
    batch = quarters(1000)
    _, weights, _ = _train(batch, 1, multiplier=True)
    with torch.inference_mode():
        _, same, _ = _train(batch, 2, multiplier=True)
    close(same, weights)
    training, _, value = _train(batch, 2)
    again = copy.deepcopy(training)
    assert float(again.step(batch)["loss"]) < value
