"""Gauss-Newton on many ranks: the step of one rank, whatever the shards, and one choice of a solver for all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from piecework.group import Group, Solo
from piecework.methods.gauss_newton.choice import SOLVERS
from piecework.testing import processes, threads
from piecework.training import Batch
from plain_gauss_newton import OUTPUTS, bind, flat, metrics, named, network, rows

NUM = 53
SHARDS: dict[int, tuple[int, ...]] = {1: (NUM,), 2: (50, 3), 4: (20, 0, 1, 32)}
close = partial(torch.testing.assert_close, rtol=0, atol=1e-8)


def _cut(batch: Batch, group: Group, sizes: Sequence[int]) -> Batch:
    start = sum(sizes[: group.rank])
    part = slice(start, start + sizes[group.rank])
    return Batch(batch.x[part], batch.y[part])


def _train(
    group: Group,
    *,
    case: str = "squared-3",
    sizes: Sequence[int] | None = None,
    steps: int = 2,
    hidden: tuple[int, ...] = (5,),
    **settings: Any,
) -> dict[str, Any]:
    """Weights, metrics and the solvers after some steps on this rank's rows."""
    model = network(OUTPUTS[case], hidden=hidden, seed=1 + group.rank)  # rank 0 decides
    training = bind(model, named(case), group=group, **{"inner_tolerance": 1e-11, "damping": 1e-2, **settings})
    own = _cut(rows(NUM, case), group, sizes or SHARDS[group.size])
    told, solvers = [], []
    for _ in range(steps):
        told.append({name: value for name, value in metrics(training, own).items() if "seconds" not in name})
        solvers.append(training.words["solver"])
    return {"weights": flat(model), "metrics": told, "solvers": solvers, "state": training.state_dict()["choice"]}


def _compare(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for one in found:
        assert torch.equal(one["weights"], found[0]["weights"])
        close(one["weights"], alone["weights"])
        for told, expected in zip(one["metrics"], alone["metrics"], strict=True):
            for name in ("loss", "damping", "rejected"):
                assert told[name] == pytest.approx(expected[name], rel=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", ["squared", "softmax"])
def test_many_ranks_give_the_step_of_one(solver: str, ranks: int, case: str) -> None:
    work = partial(_train, case=case, solver=solver)
    _compare(threads(ranks, work), work(Solo()))


@pytest.mark.parametrize("sizes", [(NUM, 0), (50, 3), (20, 0, 1, 32)])
def test_factors_of_the_samples_so_far_do_not_see_the_ranks(sizes: tuple[int, ...]) -> None:
    """A sample of all rows is the same one on any number of ranks."""
    work = partial(_train, solver="kfac", sample_rows=NUM, inner_tolerance=None, steps=4)
    _compare(threads(len(sizes), partial(work, sizes=sizes)), work(Solo()))


@pytest.mark.parametrize("kind", ["tensorsketch", "srht"])
def test_sketches_of_rows_do_not_see_the_ranks(kind: str) -> None:
    work = partial(_train, solver="sketch", sketch=kind, sketch_rows=2.0)
    _compare(threads(4, work), work(Solo()))


@pytest.mark.parametrize("sizes", [(0, NUM), (0, 0, NUM, 0), (52, 1)])
@pytest.mark.parametrize("settings", [{"eliminate_output": True}, {"geodesic": True, "solver": "cg"}, {"tile": 5}])
def test_empty_shards_and_other_settings_change_nothing(sizes: tuple[int, ...], settings: dict[str, Any]) -> None:
    alone = _train(Solo(), **settings)
    _compare(threads(len(sizes), partial(_train, sizes=sizes, **settings)), alone)


@pytest.mark.parametrize(("solver", "memory"), [("cg", 40e3), ("nystrom", 90e3)])
def test_products_without_factors_do_not_see_the_ranks(solver: str, memory: float) -> None:
    """The factors of 53 rows of 3-64-64-1 take 106 kB, and may take half of what is allowed."""
    work = partial(_train, case="squared", solver=solver, hidden=(64, 64), memory=memory / 2**30)
    _compare(threads(4, work), work(Solo()))


def test_rejected_steps_are_rejected_on_all_ranks() -> None:
    work = partial(_train, damping=1e-12, steps=4, solver="exact")
    alone = work(Solo())
    assert sum(one["rejected"] for one in alone["metrics"]) > 0
    for one in threads(2, work):
        assert [told["rejected"] for told in one["metrics"]] == [told["rejected"] for told in alone["metrics"]]


def test_all_ranks_choose_the_same_solver_and_remember_it() -> None:
    """Also where their machines differ: the rates are those of rank 0, the memory that of the rank with least."""

    def work(group: Group) -> dict[str, Any]:
        return _train(group, solver="auto", memory=1.0 if group.rank else 4.0, steps=3)

    found = threads(4, work)
    for one in found:
        assert one["solvers"] == found[0]["solvers"]
        assert one["state"] == found[0]["state"]
        assert torch.equal(one["weights"], found[0]["weights"])


def test_the_memory_of_the_poorest_rank_counts_for_all() -> None:
    sizes = (20, 20, 13)

    def work(group: Group, least: float) -> list[str]:
        memory = (least if group.rank == 2 else 4e9) / 2**30
        found: list[str] = _train(group, case="squared", memory=memory, sizes=sizes)["solvers"]
        return found

    assert all("cg" not in solvers for solvers in threads(3, partial(work, least=4e9)))
    assert threads(3, partial(work, least=8e3)) == [["cg", "cg"]] * 3


def test_a_resume_goes_on_with_the_same_solver_and_bits() -> None:
    sizes = SHARDS[4]

    def work(group: Group) -> tuple[bool, list[str], list[str]]:
        own = _cut(rows(NUM, "softmax"), group, sizes)
        whole = bind(network(3), named("softmax"), group=group)
        words = [metrics(whole, own) and whole.words["solver"] for _ in range(5)]
        first = bind(network(3), named("softmax"), group=group)
        for _ in range(2):
            first.step(own)
        second = bind(copy.deepcopy(first.model), named("softmax"), group=group)
        second.load_state_dict(first.state_dict())
        again = [metrics(second, own) and second.words["solver"] for _ in range(3)]
        return torch.equal(flat(whole.model), flat(second.model)), words[2:], again

    for equal, words, again in threads(4, work):
        assert equal
        assert words == again


@pytest.mark.parametrize("sizes", [(27, 26), (53, 0)])
def test_samples_are_drawn_on_each_rank_from_its_own_rows(sizes: tuple[int, ...]) -> None:
    work = partial(_train, sizes=sizes, sample_rows=20, momentum=0.5, lr=0.2, steps=3, solver="exact")
    found = threads(2, work)
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    assert found[0]["metrics"] == found[1]["metrics"]
    if 0 in sizes:
        close(found[0]["weights"], _train(Solo(), **work.keywords | {"sizes": (53,)})["weights"])


def test_no_rows_anywhere_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"at least one row|no rows"):
        threads(2, partial(_train, sizes=(0, 0)))


def _weights(group: Group) -> Tensor:
    found: Tensor = _train(group, sizes=(50, 3) if group.size == 2 else None)["weights"]
    return found


def test_real_processes_give_the_weights_of_one() -> None:
    alone = _weights(Solo())
    for one in processes(2, _weights, timeout=90):
        close(one, alone)
