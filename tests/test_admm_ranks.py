"""ADMM on many ranks: the weights of one rank, and messages whose size knows the widths and not the rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import bind, chain, curved, flat, quarters, sweeps
from piecework import losses
from piecework.group import Group, Solo
from piecework.losses import Loss
from piecework.testing import processes, threads
from piecework.training import Batch

close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
WIDTHS = (5, 24, 7, 4)


def _cut(batch: Batch, group: Group, sizes: Sequence[int] | None = None) -> Batch:
    """This rank's rows: nearly equal shares, or so many each."""
    sizes = sizes or [len(batch) * (r + 1) // group.size - len(batch) * r // group.size for r in range(group.size)]
    start = sum(sizes[: group.rank])
    rows = slice(start, start + sizes[group.rank])
    return Batch(batch.x[rows], batch.y[rows])


def _train(
    group: Group,
    *,
    loss: str = "squared",
    number: int = 5,
    sizes: Sequence[int] | None = None,
    activation: str = "relu",
    rows: int = 211,
    **settings: Any,
) -> dict[str, Any]:
    batch = quarters(rows)
    training = bind(
        chain(*WIDTHS, activation=activation), losses.named(loss), group=group, **{"tile": 64, "seed": 3, **settings}
    )
    metrics = sweeps(training, _cut(batch, group, sizes), number)
    return {"weights": flat(training.model), "loss": metrics[-1]["loss"], "metrics": metrics}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("loss", ["squared", "softmax", "hinge"])
def test_many_ranks_give_the_weights_of_one(ranks: int, loss: str) -> None:
    alone = _train(Solo(), loss=loss)
    found = threads(ranks, partial(_train, loss=loss))
    for one in found:
        close(one["weights"], alone["weights"])
        assert one["loss"] == pytest.approx(alone["loss"], rel=1e-12)
        assert torch.equal(one["weights"], found[0]["weights"])


@pytest.mark.parametrize("sizes", [(200, 11), (1, 209, 1), (100, 0, 111), (0, 0, 211, 0)])
@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_uneven_and_empty_shards_change_nothing(sizes: tuple[int, ...], loss: str) -> None:
    alone = _train(Solo(), loss=loss)
    for one in threads(len(sizes), partial(_train, loss=loss, sizes=sizes)):
        close(one["weights"], alone["weights"])
        assert one["loss"] == pytest.approx(alone["loss"], rel=1e-12)


@pytest.mark.parametrize("settings", [{"multiplier": True}, {"acceleration": False}, {"activation": "sign"}])
def test_the_other_settings_too_do_not_see_the_ranks(settings: dict[str, Any]) -> None:
    alone = _train(Solo(), **settings)
    for one in threads(3, partial(_train, **settings)):
        close(one["weights"], alone["weights"])


def test_a_second_run_on_three_ranks_is_equal_to_the_bit() -> None:
    first, second = (threads(3, partial(_train, loss="softmax")) for _ in range(2))
    assert all(torch.equal(one["weights"], other["weights"]) for one, other in zip(first, second, strict=True))
    assert [one["metrics"] for one in first] == [one["metrics"] for one in second]


def test_real_processes_give_the_weights_of_one() -> None:
    alone = _train(Solo())
    for one in processes(2, partial(_train, number=5), timeout=60):
        close(one["weights"], alone["weights"])


def test_the_start_weights_are_those_of_rank_0() -> None:
    def work(group: Group) -> Tensor:
        training = bind(chain(*WIDTHS, seed=1 + group.rank), group=group)
        return flat(training.model)

    for found in threads(3, work):
        assert torch.equal(found, flat(chain(*WIDTHS, seed=1)))


def test_published_algorithm_sums_its_gram_matrices_over_the_ranks() -> None:
    """Its Gaussian start is a rank's own, so equal states are given by hand: z and a of the whole, cut."""
    batch = quarters()

    def work(group: Group, state: dict[str, Any]) -> Tensor:
        training = bind(chain(*WIDTHS), losses.named("hinge"), group=group, mode="taylor2016", warm_sweeps=2)
        rows = [torch.arange(211).tensor_split(group.size)[group.rank]]
        training.load_state_dict(
            {
                "a": [a[rows[0]] for a in state["a"]],
                "z": [z[rows[0]] for z in state["z"]],
                "dual": state["dual"][rows[0]],
                "sweeps": 0,
            }
        )
        sweeps(training, Batch(batch.x[rows[0]], batch.y[rows[0]]), 5)
        return flat(training.model)

    generator = torch.Generator().manual_seed(0)
    state = {
        "a": [torch.randn(211, d, generator=generator, dtype=torch.float64) for d in WIDTHS[1:-1]],
        "z": [torch.randn(211, d, generator=generator, dtype=torch.float64) for d in WIDTHS[1:]],
        "dual": torch.zeros(211, 4, dtype=torch.float64),
    }
    alone = work(Solo(), state)
    for found in threads(3, partial(work, state=state)):
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-9)


# -- bytes -------------------------------------------------------------------------------------------------------------


def _triangle(size: int) -> int:
    return size * (size + 1) // 2


def _expected_bytes(metrics: dict[str, float], moves: int, widths: Sequence[int], loss: Loss, first: bool) -> int:
    """Bytes of one sweep by the formula: direction pass, which ends with the word on other rows, line pass, and trials,
    which end with the loss and the number of rows.

    first: whether the Gram matrix of the features is still to be summed (it is kept afterwards)."""
    sizes, outputs = [d + 1 for d in widths[:-1]], widths[-1]
    exact = loss.name == "squared"
    summed = sizes[0 if first else 1 : -1 if exact else None]
    direction = sum(d * s for s, d in zip(sizes, widths[1:], strict=True)) + sum(map(_triangle, summed)) + 1
    line = moves + moves**2 + (moves * outputs * sizes[-1] if exact else 0)
    trial = _triangle(sizes[-1]) + outputs * sizes[-1] + 2 if exact else 2
    return 8 * (direction + line + int(metrics["trials"]) * trial)


def _bytes(group: Group, *, loss: str, rows: int, acceleration: bool) -> list[tuple[int, int, dict[str, float]]]:
    """Bytes sent, rounds and metrics of each of five sweeps."""
    batch = quarters(rows)
    training = bind(chain(*WIDTHS), losses.named(loss), group=group, acceleration=acceleration, tile=64)
    cut, found = _cut(batch, group), []
    for _ in range(5):
        before, rounds = group.bytes_sent, group.rounds
        metrics = {name: float(value) for name, value in training.step(cut).items()}
        found.append((group.bytes_sent - before, group.rounds - rounds, metrics))
    return found


@pytest.mark.parametrize("acceleration", [False, True])
@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_the_bytes_of_a_sweep_are_those_of_the_formula_whatever_the_rows(loss: str, acceleration: bool) -> None:
    for rows in (211, 977):
        found = threads(3, partial(_bytes, loss=loss, rows=rows, acceleration=acceleration))
        layers = 2 if loss == "squared" else 3
        for rank in found:
            for number, (sent, rounds, metrics) in enumerate(rank[1:], start=1):
                moves = layers * (2 if acceleration and number > 1 and rank[number - 1][2]["accepted"] else 1)
                assert sent == _expected_bytes(metrics, moves, WIDTHS, losses.named(loss), number == 1)
                assert rounds == 2 + metrics["trials"]  # two passes, and one round a trial


def test_the_first_step_sends_one_gram_and_one_cross_product() -> None:
    sent, rounds, _ = threads(3, partial(_bytes, loss="squared", rows=211, acceleration=True))[1][0]
    assert sent == 8 * (_triangle(8) + 4 * 8 + 2)  # the fit of the output layer, and the number of rows
    assert rounds == 1


def test_alone_nothing_is_sent() -> None:
    group = Solo()
    sweeps(bind(chain(*WIDTHS), group=group), curved(outputs=4), 3)
    assert (group.bytes_sent, group.rounds) == (0, 0)
