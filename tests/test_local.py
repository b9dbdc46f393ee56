"""Local against the credit matrix written out, and against backpropagation where they are the same."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kept import Kept
from local_cases import LOSS, all_losses, brute_force, given, given_to_heads, network, noisy, rows, same, weights, worst
from piecework import Adam, Batch, Local, losses
from piecework.group import Solo
from piecework.methods.local.at_work import LocalAtWork
from piecework.methods.local.credit import credit, grown, routes
from piecework.models import mlp

COUPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "overlap": {"coupling": "overlap"},
    "next-only": {"coupling": "overlap", "use_own_loss": False},
    "chunk-2": {"coupling": "chunk", "reach": 2},
    "chunk-4": {"coupling": "chunk", "reach": 4},
    "interlock-2": {"coupling": "interlock", "reach": 2},
    "interlock-3": {"coupling": "interlock", "reach": 3},
    "interlock-6": {"coupling": "interlock", "reach": 6},
}

# Row k, column j: what block k of six learns from the loss of block j; written out, not computed.
MATRICES = {
    "greedy": ["1.....", ".1....", "..1...", "...1..", "....1.", ".....1"],
    "overlap": ["11....", ".11...", "..11..", "...11.", "....11", ".....1"],
    "next-only": [".1....", "..1...", "...1..", "....1.", ".....1", ".....1"],
    "chunk-2": [".1....", ".1....", "...1..", "...1..", ".....1", ".....1"],
    "chunk-4": ["...1..", "...1..", "...1..", "...1..", ".....1", ".....1"],
    "interlock-2": [".1....", "..1...", "...1..", "....1.", ".....1", ".....1"],
    "interlock-3": ["..1...", "...1..", "....1.", ".....1", ".....1", ".....1"],
    "interlock-6": [".....1"] * 6,
}


def _matrix(name: str) -> list[list[float]]:
    return [[float(one == "1") for one in row] for row in MATRICES[name]]


def _bound(model: nn.Module, **more: Any) -> LocalAtWork:
    return Local(**{"blocks": 6, "optimizer": Kept, "every_head": True, "probe_every": 0, **more}).bind(model, LOSS)


@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize("n", [1, 3, 24])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_step_goes_along_the_credit_matrix(name: str, n: int, kind: Any) -> None:
    batch = rows(n)
    training = _bound(network(), heads=kind, **COUPLINGS[name])
    metrics = training.step(batch)
    assert worst(given(training), brute_force(training, batch, _matrix(name))) < 1e-12
    own = [
        torch.autograd.grad(loss, stage.head.parameters)
        for loss, stage in zip(all_losses(training, batch), training.stages, strict=True)
        if stage.head is not None
    ]
    assert worst(given_to_heads(training), own) < 1e-12
    for number, loss in enumerate(all_losses(training, batch)):
        told = metrics["loss" if number == 5 else f"local_loss_{number}"]
        assert abs(float(told - loss.detach())) < 1e-12


@settings(max_examples=30, deadline=None)
@drawn(entries=st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.7, 2.5]), min_size=10, max_size=10))
def test_any_upper_triangular_matrix_is_followed(entries: list[float]) -> None:
    left = iter(entries)
    matrix = [[next(left) if j >= k else 0.0 for j in range(4)] for k in range(4)]
    matrix[3][3] = 1.0
    batch = rows(7)
    recipe = Local(blocks=4, optimizer=Kept, every_head=True, probe_every=0)
    training = LocalAtWork(recipe, network(depth=4), LOSS, Solo(), matrix=matrix)
    training.step(batch)
    wanted = brute_force(training, batch, matrix)
    for k, stage in enumerate(training.stages):
        assert isinstance(stage.block.optimizer, Kept)
        if any(matrix[k]):
            assert worst(stage.block.optimizer.given, [wanted[k]]) < 1e-12
        else:
            assert not stage.block.optimizer.given


def test_a_matrix_of_ones_is_deep_supervision() -> None:
    ones = [[float(j >= k) for j in range(6)] for k in range(6)]
    training = LocalAtWork(
        Local(blocks=6, optimizer=Kept, every_head=True, probe_every=0), network(), LOSS, Solo(), matrix=ones
    )
    batch = rows()
    training.step(batch)
    total = torch.stack(all_losses(training, batch)).sum()
    wanted = [torch.autograd.grad(total, stage.block.parameters, retain_graph=True) for stage in training.stages]
    assert worst(given(training), wanted) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("coupling", ["chunk", "interlock"])
def test_a_chunk_of_all_blocks_and_an_interlock_of_all_are_backpropagation_bit_for_bit(
    coupling: Any, dtype: torch.dtype
) -> None:
    one, other = network(dtype=dtype), network(dtype=dtype)
    plain = Adam(lr=0.01, weight_decay=0.1).bind(one, LOSS)
    recipe = Local(coupling=coupling, reach=6, blocks=6, lr=0.01, weight_decay=0.1, probe_every=7)
    local = recipe.bind(other, LOSS)
    for seed in range(20):
        batch = rows(seed=seed, dtype=dtype)
        assert torch.equal(plain.step(batch)["loss"], local.step(batch)["loss"])
    assert same(weights(one), weights(other))


def _ran(steps: int = 9, *, model: nn.Module | None = None, **more: Any) -> list[Tensor]:
    model = network() if model is None else model
    training = Local(**{"blocks": 6, "lr": 0.01, "probe_every": 0, **more}).bind(model, LOSS)
    for seed in range(steps):
        training.step(rows(seed=seed))
    return weights(model)


def test_couplings_that_are_the_same_are_so_bit_for_bit() -> None:
    greedy = _ran()
    assert same(_ran(coupling="interlock", reach=1), greedy)
    assert same(_ran(coupling="chunk", reach=1), greedy)
    assert same(_ran(coupling="interlock", reach=2), _ran(coupling="overlap", use_own_loss=False))
    assert not same(_ran(coupling="overlap"), greedy)
    assert not same(_ran(coupling="interlock", reach=2), greedy)


@pytest.mark.parametrize(("name", "seen"), [("greedy", 0), ("overlap", 1), ("interlock-3", 2), ("chunk-2", 1)])
def test_a_gradient_does_not_depend_on_blocks_and_heads_further_than_its_losses(name: str, seen: int) -> None:
    def gradient(disturbed: int | None, head: int | None) -> list[Tensor]:
        training = _bound(network(), **COUPLINGS[name])
        training.step(rows())  # nothing moves: it makes the heads
        with torch.no_grad():
            for stage in training.stages:
                for one in stage.block.parameters if stage.number == disturbed else ():
                    one.add_(1.0)
                if stage.number == head and stage.head is not None:
                    for one in stage.head.parameters:
                        one.add_(1.0)
        training.step(rows())
        return given(training)[0]

    before = gradient(None, None)
    for number in range(1, 6):
        assert same(gradient(number, None), before) == (number > seen), f"block {number}"
    learnt_from = {j for j, entry in enumerate(MATRICES[name][0]) if entry == "1"}
    for number in range(5):
        assert same(gradient(None, number), before) == (number not in learnt_from), f"head {number}"


def test_heads_do_not_know_what_the_blocks_learn_from() -> None:
    def trajectory(name: str) -> list[Tensor]:
        model = network()
        own = {id(one) for one in model.parameters()}

        def factory(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            found = list(parameters)
            return torch.optim.SGD(found, lr=0.0 if id(found[0]) in own else 0.1, momentum=0.9)

        training = _bound(model, optimizer=factory, **COUPLINGS[name])
        for seed in range(5):
            training.step(rows(seed=seed))
        return [one.detach().clone() for stage in training.stages if stage.head for one in stage.head.parameters]

    greedy = trajectory("greedy")
    assert all(same(trajectory(name), greedy) for name in COUPLINGS)


def test_two_linear_blocks_with_squared_loss_have_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(11, width, generator=generator, dtype=torch.float64) for width in (5, 2))
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    w1, w2 = (one.detach() for one in model.parameters())
    for own in (True, False):
        recipe = Local(coupling="overlap", use_own_loss=own, optimizer=Kept, every_head=True, probe_every=0)
        training = recipe.bind(model, losses.Squared())
        training.step(Batch(x, y))
        assert training.stages[0].head is not None
        a, b = training.stages[0].head.parameters
        h = x @ w1.T
        d12 = 2 / 11 * ((h @ w2.T - y) @ w2).T @ x
        d11 = 2 / 11 * ((h @ a.T + b - y) @ a).T @ x
        d22 = 2 / 11 * (h @ w2.T - y).T @ h
        assert worst(given(training), [[d12 + d11 if own else d12], [d22]]) < 1e-12


def test_the_gradient_through_all_blocks_is_that_of_finite_differences() -> None:
    model, batch = network(depth=3), rows(5)
    training = Local(blocks=3, coupling="interlock", reach=3, optimizer=Kept, probe_every=0).bind(model, LOSS)
    training.step(batch)
    direction = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = training.stages[0].block.parameters[0]
    values = []
    with torch.no_grad():
        for length in (1e-5, -1e-5):
            weight.add_(length * direction)
            values.append(float(LOSS(model(batch.x), batch.y)))
            weight.sub_(length * direction)
    slope = float((given(training)[0][0] * direction).sum())
    assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-6 * abs(slope)


@pytest.mark.parametrize(
    ("reach", "counts"), [(1, [0] * 6), (2, [0, 1, 1, 1, 1, 1]), (3, [0, 1, 2, 2, 2, 1]), (6, [0, 1, 1, 1, 1, 1])]
)
def test_only_derivatives_that_a_lower_block_learns_from_travel(reach: int, counts: list[int]) -> None:
    found = routes(credit("interlock", 6, reach), [True] * 6)
    assert [len(one) for one in found.down] == counts


def test_nothing_travels_to_blocks_that_do_not_learn() -> None:
    found = routes(credit("interlock", 6, 6), [False, False, True, False, True, True])
    assert [len(one) for one in found.down] == [0, 0, 0, 1, 1, 1]
    assert found.used == (False,) * 5 + (True,)


class _Products(TorchDispatchMode):
    """Flops of matrix products. torch's FlopCounterMode has hooks that torch.autograd.grad does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_end_to_end_costs_the_products_of_backpropagation() -> None:
    def products(training: Any) -> int:
        training.step(rows())
        with _Products() as counter:
            training.step(rows())
        return counter.total

    plain = products(Adam().bind(network(), LOSS))
    for coupling in ("chunk", "interlock"):
        recipe = Local(coupling=coupling, reach=6, blocks=6, probe_every=0)  # type: ignore[arg-type]
        assert products(recipe.bind(network(), LOSS)) == plain
    # Greedy leaves out the products for the inputs of five blocks, and adds three for each of five heads.
    greedy = products(Local(blocks=6, probe_every=0).bind(network(), LOSS))
    assert greedy - plain == 5 * 3 * 2 * 24 * 7 * 3 - 4 * 2 * 24 * 7 * 7 - 2 * 24 * 7 * 3


class _Live:
    """Counts what autograd keeps between forward and backward passes, in bytes."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> _Live:
        live = self

        class Kept_:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                live.now += self.size
                live.most = max(live.most, live.now)

            def __del__(self) -> None:
                live.now -= self.size

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Kept_, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


def _most_kept(depth: int, **more: Any) -> int:
    model = mlp(5, [7] * (depth - 1), 7, activation="tanh", dtype=torch.float64)
    training = Local(blocks=depth, probe_every=0, **more).bind(model, LOSS)
    batch = Batch(rows().x, rows().y)
    training.step(batch)
    with _Live() as live:
        training.step(batch)
    assert live.now == 0
    return live.most


def test_greedy_keeps_one_graph_however_deep_and_others_as_many_as_they_must() -> None:
    assert _most_kept(4) == _most_kept(12)
    assert _most_kept(12, coupling="chunk", reach=2) < _most_kept(12, coupling="chunk", reach=4)
    assert _most_kept(8, coupling="chunk", reach=2) == _most_kept(12, coupling="chunk", reach=2)
    assert _most_kept(8, coupling="interlock", reach=2) == _most_kept(12, coupling="interlock", reach=2)
    assert _most_kept(12, coupling="chunk", reach=12) > 5 * _most_kept(12)


def test_statistics_move_once_a_batch_and_looking_changes_no_bit() -> None:
    found = []
    for every in (0, 1):
        model = noisy()
        training = Local(blocks=4, coupling="overlap", lr=0.01, probe_every=every, seed=3).bind(model, LOSS)
        for seed in range(6):
            metrics = training.step(rows(seed=seed))
        assert int(model[2].num_batches_tracked) == 6
        assert [name for name in metrics if name.startswith("cosine")] == [f"cosine_{k}" for k in range(4) if every]
        found.append(weights(model))
    assert same(*found)


def test_the_cosine_is_one_where_a_block_learns_from_the_loss_itself() -> None:
    batch = rows()
    for name, exact in (("interlock-6", range(6)), ("interlock-3", range(3, 6)), ("greedy", range(5, 6))):
        metrics = _bound(network(), probe_every=1, **COUPLINGS[name]).step(batch)
        ones = [k for k in range(6) if abs(float(metrics[f"cosine_{k}"]) - 1) < 1e-12]
        assert ones == list(exact)
    training = _bound(network(), probe_every=1)
    metrics = training.step(batch)
    true = brute_force(training, batch, _matrix("interlock-6"))
    for k, (ours, theirs) in enumerate(zip(given(training), true, strict=True)):
        one, other = (torch.cat([piece.flatten() for piece in pieces]) for pieces in (ours, theirs))
        wanted = torch.cosine_similarity(one, other, dim=0)
        assert abs(float(metrics[f"cosine_{k}"] - wanted)) < 1e-12


def test_a_late_derivative_is_that_of_the_weights_of_then() -> None:
    """Written out: block k of three steps in step t along its gradient of step t - delay, at the weights of then."""
    model, twin = network(depth=3), network(depth=3)
    recipe = Local(
        blocks=3, coupling="interlock", reach=3, staleness=2, probe_every=0, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    training = recipe.bind(model, LOSS)
    blocks, delays = [twin[0:2], twin[2:4], twin[4:]], [4, 2, 0]
    past: list[list[list[Tensor]]] = []
    for step in range(9):
        batch = rows(seed=step)
        training.step(batch)
        loss = LOSS(twin(batch.x), batch.y)
        past.append([list(torch.autograd.grad(loss, list(b.parameters()), retain_graph=True)) for b in blocks])
        with torch.no_grad():
            for k, (block, delay) in enumerate(zip(blocks, delays, strict=True)):
                for one, gradient in zip(
                    block.parameters(), past[step - delay][k] if step >= delay else (), strict=False
                ):
                    one.sub_(0.1 * gradient)
    assert worst([model.parameters()], [twin.parameters()]) < 1e-12


def test_the_own_loss_of_overlap_waits_for_the_late_one() -> None:
    model, twin = network(depth=2), network(depth=2)
    recipe = Local(coupling="overlap", staleness=1, probe_every=0, optimizer=partial(torch.optim.SGD, lr=0.1))
    training = recipe.bind(model, LOSS)
    late: list[Tensor] = []
    for step in range(7):
        batch = rows(seed=step)
        if step == 0:  # the start of the head, before it moves
            head = Local(optimizer=Kept, probe_every=0, heads="linear").bind(network(depth=2), LOSS)
            head.step(batch)
            assert head.stages[0].head is not None
            judge = head.stages[0].head.module
        training.step(batch)
        h = twin[:2](batch.x)
        own, last = LOSS(judge(h), batch.y), LOSS(twin[2:](h), batch.y)
        first, second, third = list(twin[:2].parameters()), list(twin[2:].parameters()), list(judge.parameters())
        now = torch.autograd.grad(own + last, first, retain_graph=True)
        moves = [*zip(second, torch.autograd.grad(last, second, retain_graph=True), strict=True)]
        moves += [*zip(third, torch.autograd.grad(own, third), strict=True), *zip(first, late, strict=False)]
        late = list(now)
        with torch.no_grad():
            for one, gradient in moves:
                one.sub_(0.1 * gradient)
    assert worst([model.parameters()], [twin.parameters()]) < 1e-12


def test_annealing_goes_block_by_block_from_the_coupling_to_backpropagation() -> None:
    assert [grown(1, 4, (2, 8), step) for step in range(10)] == [1, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [grown(2, 3, (0, 1), step) for step in range(3)] == [2, 3, 3]
    training = _bound(network(), anneal=(1, 6), every_head=True)
    for step, reach in enumerate([1, 1, 2, 3, 4, 5, 6, 6]):
        batch = rows(seed=step)
        training.step(batch)
        assert worst(given(training), brute_force(training, batch, credit("interlock", 6, reach))) < 1e-12


def test_an_annealed_run_is_the_runs_of_its_couplings_one_after_another() -> None:
    model, twin = network(depth=3), network(depth=3)
    sgd = partial(torch.optim.SGD, lr=0.1)
    whole = Local(blocks=3, coupling="chunk", reach=1, anneal=(2, 6), optimizer=sgd, every_head=True).bind(model, LOSS)
    reaches = [1, 1, 1, 1, 2, 2, 3, 3]
    parts = {
        reach: Local(blocks=3, coupling="chunk", reach=reach, optimizer=sgd, every_head=True).bind(twin, LOSS)
        for reach in (1, 2, 3)
    }
    before = parts[1]
    for step, reach in enumerate(reaches):
        whole.step(rows(seed=step))
        if parts[reach] is not before:
            parts[reach].load_state_dict(before.state_dict())
            before = parts[reach]
        before.step(rows(seed=step))
    assert same(weights(model), weights(twin))


def test_frozen_layers_stay_and_what_lies_below_them_learns() -> None:
    model = network(depth=4)
    model[2].requires_grad_(False)
    start = weights(model)
    Local(blocks=4, coupling="interlock", reach=4, lr=0.1).bind(model, LOSS).step(rows())
    moved = [not torch.equal(one, before) for one, before in zip(weights(model), start, strict=True)]
    assert moved == [True, True, False, False, True, True, True, True]


def test_the_deployed_model_is_the_plain_one() -> None:
    model, plain = noisy(), noisy()
    training = Local(blocks=4, lr=0.01).bind(model, LOSS)
    names = list(model.state_dict())
    for seed in range(3):
        training.step(rows(seed=seed))
    training.sync()
    assert training.model is model
    assert list(model.state_dict()) == names
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain.eval()(rows().x), model.eval()(rows().x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_step_reports_the_users_loss_before_it(smoothing: float) -> None:
    model = network()
    training = Local(blocks=3, label_smoothing=smoothing).bind(model, LOSS)
    for seed in range(3):
        before = LOSS(model(rows(seed=seed).x), rows(seed=seed).y).detach()
        assert abs(float(training.step(rows(seed=seed))["loss"] - before)) < 1e-12


def test_a_coupling_that_grows_may_be_late_and_skips_only_the_steps_that_it_is_late_by() -> None:
    """Written out: greedy up to step 3, then backpropagation one step late in the lower of two blocks."""
    model, twin = network(depth=2), network(depth=2)
    head = Local(optimizer=Kept, probe_every=0).bind(network(depth=2), LOSS)
    head.step(rows(seed=0))
    assert head.stages[0].head is not None
    judge = head.stages[0].head.module
    sgd = partial(torch.optim.SGD, lr=0.1)
    training = Local(anneal=(0, 4), staleness=1, probe_every=0, optimizer=sgd).bind(model, LOSS)
    first, second, third = list(twin[:2].parameters()), list(twin[2:].parameters()), list(judge.parameters())
    late: list[Tensor] = []
    for step in range(9):
        batch = rows(seed=step)
        training.step(batch)
        h = twin[:2](batch.x)
        own, last = LOSS(judge(h), batch.y), LOSS(twin[2:](h), batch.y)
        moves = [*zip(second, torch.autograd.grad(last, second, retain_graph=True), strict=True)]
        if step < 4:
            learnt = torch.autograd.grad(own, first, retain_graph=True)
            moves += [*zip(first, learnt, strict=True), *zip(third, torch.autograd.grad(own, third), strict=True)]
        else:
            moves += [*zip(first, late, strict=False)]
            late = list(torch.autograd.grad(last, first))
        with torch.no_grad():
            for one, gradient in moves:
                one.sub_(0.1 * gradient)
    assert worst([model.parameters()], [twin.parameters()]) < 1e-12


@pytest.mark.parametrize(("late", "limit"), [(0, 38.0), (1, 1.0)])
def test_momentum_gives_a_high_limit_of_the_rate_and_lateness_takes_it_away(late: int, limit: float) -> None:
    def length(rate: float) -> float:
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        with torch.no_grad():
            for one in model.parameters():
                one.fill_(1.0)
        moving = partial(torch.optim.SGD, lr=rate, momentum=0.9, dampening=0.9)
        recipe = Local(
            coupling="interlock", staleness=late, optimizer=(moving, partial(torch.optim.SGD, lr=0.0)), probe_every=0
        )
        training = recipe.bind(model, losses.Squared())
        batch = Batch(torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
        for _ in range(600):
            training.step(batch)
        return float(next(model.parameters()).detach().abs())

    assert length(0.9 * limit / 2) < 0.5  # the loss is the square of the first weight: its curvature is 2
    assert length(1.1 * limit / 2) > 10.0
