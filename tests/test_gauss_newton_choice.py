"""The cost model and the choice: who is taken where, within what memory, and what a resumed run remembers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from jacobian_cases import dense
from piecework.methods.gauss_newton import choice, cost
from piecework.methods.gauss_newton.choice import SOLVERS
from piecework.methods.gauss_newton.cost import REFERENCE, SAME_KIND, SCALE, Estimate, Rates, Shape, Solver, estimates
from piecework.training import Batch, CannotTrain
from plain_gauss_newton import bind, flat, metrics, named, network, plain, rows

RATES = Rates(*(SCALE * part for part in REFERENCE.values()))
USUAL = Shape(
    rows=1000,
    columns=200_000,
    outputs=1,
    width=2000,
    factors=True,
    double=False,
    single=True,
    inputs=256,
    dense=False,
    per_row=0.0,
    dimension=250.0,
    condition=1e4,
    loose=1e-2,
    tight=1e-2,
)


def _cheapest(rates: Rates = RATES, **changes: Any) -> Solver:
    found = estimates(replace(USUAL, **changes), rates, {})
    return min(found.values(), key=lambda one: one.seconds).solver


@pytest.mark.parametrize(
    ("solver", "shape"),
    [
        ("exact", {}),
        ("exact", {"dimension": 1000.0, "condition": 1e10}),
        ("cholesky", {"rows": 100_000, "columns": 60, "dimension": 60.0, "condition": 1e8}),
        ("kfac", {"rows": 15_000, "columns": 5000, "width": 300, "inputs": 64, "dimension": 2500.0}),
        ("rpchol", {"rows": 30_000, "width": 500, "columns": 20_000, "dimension": 100.0, "condition": 1e10}),
        ("cg", {"rows": 50_000, "columns": 3_000_000, "dimension": 50_000.0, "condition": 30.0}),
        ("sketch", {"rows": 4000, "columns": 16 * 65_536, "width": 65_552, "inputs": 16, "dimension": 4000.0}),
        ("nystrom", {"rows": 30_000, "factors": False, "dimension": 20.0, "condition": 1e10}),
    ],
)
def test_each_solver_is_cheapest_somewhere(solver: str, shape: dict[str, Any]) -> None:
    assert _cheapest(**shape) == solver


def test_qr_is_taken_for_its_digits_not_its_seconds() -> None:
    """Of J and not of J^T J: in float64 with fewer parameters than rows, where it is cheap or the damping is small."""
    model, batch = network(), rows(211)
    for damping, expected in ((1e-3, "qr"), (1e-12, "qr")):
        training = bind(model, damping=damping)
        training.step(batch)
        assert training.words["solver"] == expected


def test_costs_grow_as_the_operations_do() -> None:
    twice = estimates(replace(USUAL, rows=2000), RATES, {})
    once = estimates(USUAL, RATES, {})
    assert twice["exact"].bytes == 4 * once["exact"].bytes
    assert 2.5 < twice["exact"].seconds / once["exact"].seconds < 8
    assert twice["cholesky"].bytes == once["cholesky"].bytes
    wide = estimates(replace(USUAL, width=4000), RATES, {})
    gram = wide["exact"].seconds - once["exact"].seconds
    assert gram == pytest.approx(1000**2 * 2000 / RATES.gemm32, rel=0.2)  # and two products


def test_without_factors_only_products_are_left() -> None:
    assert set(estimates(USUAL, RATES, {})) == set(SOLVERS)
    assert set(estimates(replace(USUAL, factors=False), RATES, {})) == {"cg", "nystrom"}


def test_iterations_that_were_counted_replace_those_that_were_guessed() -> None:
    guessed, counted = (estimates(USUAL, RATES, known)["cg"] for known in ({}, {"cg": 7.0}))
    assert counted.iterations == 7
    assert counted.seconds / guessed.seconds == pytest.approx(9 / (guessed.iterations + 2))
    assert estimates(USUAL, RATES, {})["exact"].iterations == 0


def test_one_quick_solve_does_not_wipe_out_what_was_counted() -> None:
    training = bind(network(), solver="cg", damping=1e-3)
    training.step(rows(53))
    made = training._choice.linearise(training._objective.point(rows(53)), 1.0, step=1, tolerance=0.1)
    counts = []
    for iterations in (40, 1, 30):
        training._choice.note(made, iterations, 1.0)
        counts.append(training.state_dict()["choice"]["known"]["cg"][0])
    assert counts == [40, 20, 30]


def test_where_few_directions_count_kronecker_factors_take_more_iterations() -> None:
    many, few = (estimates(replace(USUAL, dimension=d), RATES, {}) for d in (250.0, 10.0))
    assert few["kfac"].iterations == pytest.approx(5 * many["kfac"].iterations)


def test_a_tighter_tolerance_and_a_worse_condition_cost_iterations() -> None:
    usual = estimates(USUAL, RATES, {})["cg"].iterations
    assert estimates(replace(USUAL, loose=1e-8), RATES, {})["cg"].iterations == pytest.approx(4 * usual)
    assert estimates(replace(USUAL, condition=4e4), RATES, {})["cg"].iterations == pytest.approx(2 * usual)


def test_low_rank_that_is_too_low_costs_iterations() -> None:
    enough = {"rows": 30_000, "dimension": 200.0}
    usual, capped = (estimates(replace(USUAL, **{**enough, **more}), RATES, {}) for more in ({}, {"dimension": 2e4}))
    for name in ("rpchol", "nystrom"):
        assert capped[name].iterations > 3 * usual[name].iterations


def test_a_kernel_in_double_is_counted_as_one() -> None:
    once, double = (estimates(replace(USUAL, rows=10_000, single=single), RATES, {}) for single in (True, False))
    assert 1.5 < double["exact"].seconds / once["exact"].seconds < 4
    assert double["sketch"].seconds == once["sketch"].seconds


@pytest.mark.parametrize(("limit", "expected"), [(250, "exact"), (10_000, "cg")])
def test_a_solver_that_would_end_early_gives_way_to_a_sure_one(limit: int, expected: str) -> None:
    """6e6 of condition: some 2500 iterations that are predicted to be cheaper than K."""
    model = network()
    choose = bind(model, inner_iterations=limit)._choice._cheapest
    shape = replace(USUAL, rows=16_000, columns=12_000, width=400, dimension=1e4, condition=6e6)
    found = estimates(shape, RATES, {})
    cheap = replace(found["cg"], seconds=found["exact"].seconds / 2)
    assert choose([found["exact"], cheap], shape, 1e-3) == expected
    assert choose([found["rpchol"], replace(cheap, seconds=found["rpchol"].seconds / 2)], shape, 1e-3) == "cg"
    assert choose([found["exact"], replace(cheap, seconds=found["exact"].seconds / 11)], shape, 1e-3) == "cg"


# -- rates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.6, 1.0, 1.7])
def test_noise_of_a_measurement_does_not_change_the_rates_that_decide(noise: float) -> None:
    shaken = replace(RATES, gemm64=noise * RATES.gemm64, qr64=RATES.qr64 / noise, skinny32=noise * RATES.skinny32)
    assert shaken.snapped() == RATES.snapped()
    assert RATES.snapped() == RATES


def test_a_faster_machine_of_the_same_kind_decides_alike() -> None:
    twice = Rates(*(2 * getattr(RATES, name) for name in REFERENCE))
    assert twice.snapped() == RATES


def test_a_processor_with_slow_float64_is_seen_as_one() -> None:
    slow = replace(RATES, gemm64=RATES.gemm64 / 40, cholesky64=RATES.cholesky64 / 40)
    assert slow.snapped().gemm64 == pytest.approx(RATES.gemm64 / SAME_KIND**3)
    assert slow.snapped().gemm32 == RATES.gemm32
    large = {"rows": 10_000, "dimension": 1e4, "columns": 3_000_000, "double": True, "single": False, "condition": 1e8}
    assert (_cheapest(**large), _cheapest(slow, **large)) == ("exact", "sketch")


# -- memory ------------------------------------------------------------------------------------------------------------


def _gib(numbers: float) -> float:
    return numbers / 2**30


@pytest.mark.parametrize("solver", ["exact", "qr", "cholesky", "rpchol", "sketch"])
@pytest.mark.parametrize("numbers", [8e3, 15e3])
def test_a_solver_beyond_the_memory_is_refused_with_one_that_fits(solver: str, numbers: float) -> None:
    """The factors take 6 kB, and may take half. Taking the solver that the sentence names does work."""
    memory = {"memory": _gib(numbers)}
    with pytest.raises(
        CannotTrain, match=f"solver {solver} (would need|needs the factors of) .*53 rows and 26 parameters.* KiB"
    ) as error:
        bind(network(), solver=solver, **memory).step(rows(53))
    (named_one,) = (name for name in SOLVERS if f"; solver {name} needs" in str(error.value))
    assert str(error.value).count(". ") == 0
    assert metrics(bind(network(), solver=named_one, **memory), rows(53))["stalled"] == 0


@pytest.mark.parametrize("kilobytes", [4, 8, 20, 50, 100, 1000])
def test_auto_takes_what_fits(kilobytes: int) -> None:
    training = bind(network(), memory=_gib(1e3 * kilobytes))
    assert metrics(training, rows(53))["stalled"] == 0
    assert (training.words["solver"] in ("cg", "nystrom")) == (kilobytes < 20)


def test_factors_beyond_the_memory_leave_the_solvers_by_products() -> None:
    """56 kB of factors may take half of 100: the normal equations of 26 parameters would fit, J would not."""
    training = bind(network(), memory=_gib(100e3))
    assert metrics(training, rows(500))["stalled"] == 0
    assert training.words["solver"] in ("cg", "nystrom")
    with pytest.raises(CannotTrain, match="solver qr needs the factors"):
        bind(network(), solver="qr", memory=_gib(100e3)).step(rows(500))


def test_a_memory_in_which_nothing_fits_is_a_sentence() -> None:
    with pytest.raises(CannotTrain, match=r"; take fewer rows in a step \(sample_rows\), or raise memory"):
        bind(network(), memory=_gib(100.0)).step(rows(53))


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_the_choice_is_made_at_steps_that_double_and_is_state() -> None:
    batch = rows(53, "softmax")
    training = bind(network(3), named("softmax"))
    looks = []
    for _ in range(8):
        training.step(batch)
        state = training.state_dict()["choice"]
        assert state["solver"] == training.words["solver"]
        looks.append(state["next"])
    assert looks[0] == 1
    assert looks == sorted(looks)
    assert looks[-1] >= 7


def test_a_resumed_run_keeps_a_choice_that_it_would_not_make() -> None:
    """The state says cg: it is not asked again before its time."""
    batch = rows(53)
    training = bind(network(), **plain())
    training.step(batch)
    state = copy.deepcopy(training.state_dict())
    assert training.words["solver"] != "cg"
    state["choice"]["solver"], state["choice"]["next"] = "cg", 3
    resumed = bind(copy.deepcopy(training.model), **plain())
    resumed.load_state_dict(state)
    words = []
    for _ in range(4):
        resumed.step(batch)
        words.append(resumed.words["solver"])
    assert words[:2] == ["cg", "cg"]
    assert words[2] != "cg"


def test_counted_iterations_are_state() -> None:
    training = bind(network(), solver="cg", damping=1e-3)
    told = metrics(training, rows(53))
    (count, damping) = training.state_dict()["choice"]["known"]["cg"]
    assert 0 < count <= told["iterations"]
    assert (count == told["iterations"]) == (told["rejected"] == 0)
    assert damping > 0
    other = bind(network(), solver="cg")
    other.load_state_dict(training.state_dict())
    assert other.state_dict()["choice"] == training.state_dict()["choice"]


def test_predicted_and_spent_seconds_are_told() -> None:
    told = metrics(bind(network(), solver="exact"), rows(53))
    assert 0 < told["predicted_seconds"] < 1
    assert 0 < told["solve_seconds"] < 60


def test_an_estimate_says_what_it_counted_on() -> None:
    found = estimates(USUAL, RATES, {})
    assert all(isinstance(one, Estimate) and one.solver == name for name, one in found.items())
    assert all(one.iterations > 0 for name, one in found.items() if name not in choice.DIRECT)


@pytest.mark.parametrize(("seconds", "made"), [(0.0, True), (1e9, False)])
def test_a_pilot_is_made_only_where_it_is_cheap(seconds: float, made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "SMALL", 0.0)  # nothing is quick
    monkeypatch.setattr(choice, "pilot", lambda *_: seconds)
    training = bind(network())
    training.step(rows(53))
    assert (training.state_dict()["choice"]["dimension"] > 0) == made


@pytest.mark.parametrize(
    ("solver", "damping"), [("exact", 1e-3), ("sketch", 1e-3), ("cg", 30.0), ("rpchol", 30.0), ("kfac", 30.0)]
)
def test_solvers_whose_retries_are_dear_start_with_more_damping(solver: str, damping: float) -> None:
    told = metrics(bind(network(), solver=solver, adapt=False), rows(53))
    assert told["damping"] == pytest.approx(damping)


# -- single precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10])
@pytest.mark.parametrize("solver", ["auto", "exact"])
def test_single_precision_models_are_solved_in_double_where_they_need_it(damping: float, solver: str) -> None:
    """tanh 2-64-64-1: the step against the quadratic model of a float64 copy, |s - J d|^2 + damping |d|^2."""
    batch = rows(256, features=2, seed=3)
    single = network(hidden=(64, 64), features=2).float()
    small = Batch(batch.x.float(), batch.y.float())
    double = copy.deepcopy(single).double()
    j = 2**0.5 * dense(double, small.x.double()).detach()[:, 0]
    s = 2**0.5 * (double(small.x.double()).detach() - small.y.double())[:, 0]
    before = flat(single).double()
    told = metrics(bind(single, **plain(damping=damping, solver=solver)), small)
    d = before - flat(single).double()
    k = j @ j.t()
    weight = damping * float(k.diagonal().mean())
    best = j.t() @ torch.linalg.solve(k + weight * torch.eye(256, dtype=k.dtype), s)

    def left(d: torch.Tensor) -> float:
        return float((s - j @ d).square().sum() + weight * d.square().sum())

    assert left(d) - left(best) < 1e-4 * (left(torch.zeros_like(d)) - left(best))
    assert told["linear_residual"] <= 1e-2
    assert told["stalled"] == 0


def test_what_single_precision_does_not_solve_to_the_tolerance_is_formed_in_double() -> None:
    batch = rows(24)
    small = Batch(batch.x.float(), batch.y.float())
    told = metrics(bind(network().float(), **plain(solver="exact", inner_tolerance=1e-11)), small)
    assert told["linear_residual"] < 1e-11
    told = metrics(bind(network().float(), **plain(solver="exact")), small)
    assert 1e-9 < told["linear_residual"] < 1e-2


def test_a_damping_at_which_single_precision_was_not_tried_says_nothing_of_it() -> None:
    model = network().float()
    batch = Batch(rows(24).x.float(), rows(24).y.float())
    training = bind(model, solver="exact", damping=1e-8)
    made = training._choice.linearise(training._objective.point(batch), None, step=0, tolerance=1e-2)
    made.system.solve(training._objective.point(batch).s, made.unit)
    training._choice.note(made, 1, made.unit)
    assert not made.system.single
    assert training.state_dict()["choice"]["double_below"] == 0


def test_a_dense_sketch_is_counted_with_its_columns() -> None:
    units, dense, wide = (
        estimates(replace(USUAL, rows=20_000, **more), RATES, {})["sketch"]
        for more in ({}, {"dense": True, "per_row": 4.0}, {"dense": True, "per_row": 64.0})
    )
    assert [one.bytes / 20_000**2 for one in (units, dense, wide)] == [12, 12 + 4 * 12, 12 + 64 * 12]
    assert wide.seconds > 10 * dense.seconds
    with pytest.raises(CannotTrain, match="solver sketch would need"):
        bind(network(), solver="sketch", sketch="srht", sketch_rows=64.0, memory=1e-3).step(rows(53))


def test_kronecker_factors_of_rows_are_a_diagonal() -> None:
    """A network with parameters of its own has no layer with factors, and no (P, P) matrix either."""
    found = estimates(replace(USUAL, inputs=0), RATES, {})["kfac"]
    assert found.bytes == 4 * 6 * USUAL.columns


def test_rates_are_state(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bind(network())
    first.step(rows(53))
    state = first.state_dict()
    second = bind(copy.deepcopy(first.model))
    second.load_state_dict(state)
    monkeypatch.setattr(choice, "measured", lambda *_: pytest.fail("measured again"))
    second.step(rows(53))
    assert second.state_dict()["choice"]["rates"] == state["choice"]["rates"] != []


@pytest.mark.parametrize("relative", [1.0, 1e-2])
def test_a_part_of_the_rows_tells_the_dimension_and_condition_of_all(
    relative: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = bind(network(hidden=(16,)))._objective
    point = objective.point(rows(700))
    jacobian = objective.jacobian(point.batch)
    damping = relative * float(jacobian.diagonal().mean())
    found = []
    for most in (700, 200):
        monkeypatch.setattr(cost, "PILOT_ROWS", most)
        explored = bind(network())._choice._explored(replace(USUAL, rows=700, columns=81), jacobian, damping)
        found.append((explored.dimension, explored.condition))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.1)
    assert found[1][1] == pytest.approx(found[0][1], rel=0.2)
    kernel = dense(objective.model, point.batch.x)[:, 0].detach() * 2**0.5
    values = torch.linalg.eigvalsh(kernel @ kernel.t()).clamp_min(0)
    assert found[0][0] == pytest.approx(float((values / (values + damping)).sum()), rel=1e-3)
    assert found[0][1] == pytest.approx(float(values[-1]) / damping + 1, rel=1e-3)
