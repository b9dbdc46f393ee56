"""Layers with a proximal step: what each of them promises, said once, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from piecework import nn as layers
from piecework.nn import (
    BlackBox,
    LinearProxLayer,
    NonNegative,
    OneHot,
    ProxLayer,
    Quantiser,
    Sign,
    Simplex,
    Sort,
    TopK,
    VectorQuantiser,
)
from piecework.solvers import layer_prox
from piecework.training import BadInput

CODEBOOK = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 2, 1], [-1, 0.5, -2]], dtype=torch.float64)
"""Codewords 1 and 2 are equal."""


def _steps(x: Tensor) -> Tensor:
    return torch.stack([x.round().sum(1), (x > 0.3).sum(1)], 1).to(x.dtype)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "sign": lambda: Sign(dither=0),
    "non-negative": NonNegative,
    "quantiser": lambda: Quantiser(5, dither=False),
    "vector quantiser": lambda: VectorQuantiser(CODEBOOK),
    "top-1": lambda: TopK(1, exchange=True),
    "top-2 by magnitude": lambda: TopK(2, by="magnitude", exchange=True),
    "top-3": lambda: TopK(3, exchange=True),
    "sort": Sort,
    "one-hot": OneHot,
    "simplex": Simplex,
    "black box": lambda: BlackBox(_steps),
}
WITHOUT_DERIVATIVE = ["sign", "quantiser", "vector quantiser", "one-hot", "black box"]
LINEAR = [name for name in LAYERS if name != "black box"]

NUMBER = st.one_of(st.sampled_from([0.0, -0.0, 0.25, -0.25, 0.5, 1.0, -1.0]), st.floats(-9, 9))
PENALTY = st.one_of(st.sampled_from([1e-6, 1.0, 1e6]), st.floats(0.01, 100))
ROWS = st.lists(st.lists(NUMBER, min_size=3, max_size=3), min_size=2, max_size=2)


def _draws(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v, b = 1.5 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return v, b


def _wanted(layer: nn.Module, v: Tensor, b: Tensor) -> Tensor:
    """b, cut to the shape of the layer's output."""
    return b[..., : layer(v).shape[-1]]


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(v=ROWS, b=ROWS, beta_in=PENALTY, beta_out=PENALTY)
def test_the_step_is_never_worse_than_staying(
    name: str, v: list[list[float]], b: list[list[float]], beta_in: float, beta_out: float
) -> None:
    layer, vt, bt = LAYERS[name](), torch.tensor(v, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    bt = _wanted(layer, vt, bt)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        a = layer.prox_input(vt, bt, beta_in, beta_out)

    def cost(a: Tensor) -> Tensor:
        return beta_in / 2 * (a - vt).square().sum(1) + beta_out / 2 * (layer(a) - bt).square().sum(1)

    slack = 1e-12 * (1 + beta_in + beta_out) * (1 + vt.abs().max() + bt.abs().max()) ** 2
    assert a.shape == vt.shape
    assert bool((cost(a) <= cost(vt) + slack).all())
    if name in LINEAR:
        a = layer.prox_input_linear(vt, bt, beta_in)
        change = beta_in / 2 * (a - vt).square().sum(1) + (bt * (layer(a) - layer(vt))).sum(1)
        # a slope far steeper than the penalty moves a far
        assert bool((change <= slack * (1 + 1e3 / beta_in)).all())


@pytest.mark.parametrize("name", LAYERS)
def test_a_float32_step_is_never_worse_than_staying(name: str) -> None:
    layer = LAYERS[name]().float()
    v, b = (t.float() for t in _draws(401, 3, seed=1))
    b = _wanted(layer, v, b)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        a = layer.prox_input(v, b, 0.7, 1.3)
    assert a.dtype is torch.float32
    assert layer(v).dtype is torch.float32
    cost = 0.7 * (a - v).square().sum(1) + 1.3 * (layer(a) - b).square().sum(1)
    assert bool((cost <= 1.3 * (layer(v) - b).square().sum(1) + 1e-5).all())
    assert bool((a != v).any())


@pytest.mark.parametrize("name", LAYERS)
def test_layers_say_what_they_offer(name: str) -> None:
    layer = LAYERS[name]()
    assert isinstance(layer, ProxLayer)
    assert isinstance(layer, LinearProxLayer) == (name in LINEAR)
    assert not isinstance(nn.ReLU(), ProxLayer)
    assert type(layer).__name__ in layers.__all__
    assert type(layer).__name__ in repr(layer)


@pytest.mark.parametrize("name", [name for name in LINEAR if "sort" not in name])
def test_a_wanted_output_that_is_there_already_moves_nothing(name: str) -> None:
    layer, (v, _) = LAYERS[name](), _draws(24, 3, seed=2)
    assert torch.equal(layer.prox_input(v, layer(v).detach(), 1.0, 2.0), v) or name in ("top-3", "simplex")
    torch.testing.assert_close(layer.prox_input(v, layer(v).detach(), 1.0, 2.0), v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_rows_stand_alone_whatever_comes_before_the_last_dimension(name: str) -> None:
    layer, (v, b) = LAYERS[name](), _draws(5, 7, 3, seed=3)
    together = layer.prox_input(v, b, 0.6, 2.0)
    one_by_one = torch.stack([layer.prox_input(v[i, j], b[i, j], 0.6, 2.0) for i in range(5) for j in range(7)])
    torch.testing.assert_close(together.view(35, 3), one_by_one, rtol=0, atol=1e-12)
    linear = layer.prox_input_linear(v, b, 3.0)
    torch.testing.assert_close(linear[2, 4], layer.prox_input_linear(v[2, 4], b[2, 4], 3.0), rtol=0, atol=1e-12)
    assert torch.equal(layer(v)[2, 4], layer(v[2, 4]))
    turned = layer.prox_input(v.mT.contiguous().mT, b.mT.contiguous().mT, 0.6, 2.0)  # not contiguous
    torch.testing.assert_close(turned, together, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_no_rows_are_no_trouble_for_a_layer(name: str) -> None:
    layer, none = LAYERS[name](), torch.empty(0, 3, dtype=torch.float64)
    assert layer.prox_input(none, _wanted(layer, none, none), 1.0, 1.0).shape == (0, 3)
    if name in LINEAR:
        assert layer.prox_input_linear(none, none, 1.0).shape == (0, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_carries_no_graph_and_changes_neither_input_nor_layer(name: str) -> None:
    layer, (v, b) = LAYERS[name](), _draws(24, 3, seed=4)
    b = _wanted(layer, v, b).clone()
    before = copy.deepcopy((v, b, layer.state_dict()))
    a = layer.prox_input(v.requires_grad_(), b.requires_grad_(), 0.5, 2.0)
    assert not a.requires_grad
    assert torch.equal(v, before[0])
    assert torch.equal(b, before[1])
    assert all(torch.equal(t, before[2][key]) for key, t in layer.state_dict().items())


# -- forward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_DERIVATIVE)
def test_no_derivative_is_pretended(name: str) -> None:
    x = _draws(24, 3, seed=5)[0].requires_grad_()
    y = LAYERS[name]().requires_grad_(False)(x)
    assert not y.requires_grad


def test_codewords_get_the_gradients_of_their_rows_and_the_input_none() -> None:
    layer = VectorQuantiser(CODEBOOK)
    x = torch.tensor([[0.9, 0, 0], [0, 2, 1.1], [0.1, 2, 1]], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y.detach(), CODEBOOK[[1, 3, 3]])
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    (y.sum(1) * weights).sum().backward()
    assert layer.codebook.grad is not None
    assert layer.codebook.grad.sum(1).tolist() == [0, 3, 0, 330, 0]
    assert x.grad is None


def test_the_codebook_is_copied_and_saved() -> None:
    codebook = CODEBOOK.clone()
    layer = VectorQuantiser(codebook)
    codebook.zero_()
    assert torch.equal(layer.codebook.detach(), CODEBOOK)
    assert [*layer.state_dict()] == ["codebook"]


def test_layers_give_what_they_say() -> None:
    x = torch.tensor([[0.5, -2.0, 0.1, 0.5]], dtype=torch.float64)
    assert TopK(1, by="magnitude")(x).tolist() == [[0, -2, 0, 0]]
    assert TopK(2)(x).tolist() == [[0.5, 0, 0, 0.5]]
    assert Sort()(x).tolist() == [[-2, 0.1, 0.5, 0.5]]
    assert OneHot()(x).tolist() == [[1, 0, 0, 0]]
    assert NonNegative()(x).tolist() == [[0.5, 0, 0.1, 0.5]]
    torch.testing.assert_close(Simplex()(x), torch.tensor([[7, 0, 1, 7]], dtype=torch.float64) / 15)
    assert Quantiser(3)(torch.tensor([-5.0, -0.51, -0.5, 0.49, 0.5, 5.0])).tolist() == [-1, -1, 0, 0, 1, 1]


def test_backpropagation_through_order_and_projections_is_the_finite_difference() -> None:
    x = _draws(5, 4, seed=6)[0].requires_grad_()
    for layer in (TopK(2), TopK(2, by="magnitude"), Sort(), NonNegative(), Simplex()):
        assert torch.autograd.gradcheck(layer, x)


# -- what a step does where it moves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1e-9, 0.1, 3.0])
def test_a_new_winner_wins_by_the_margin(margin: float) -> None:
    v, b = _draws(401, 5, seed=7)
    a = OneHot(margin).prox_input(v, 5 * b, 0.5, 2.0)
    changed = a.argmax(1) != v.argmax(1)
    assert int(changed.sum()) > 40
    assert bool((changed == (a != v).any(1)).all())
    lead = a.topk(2, 1).values
    torch.testing.assert_close(
        (lead[:, 0] - lead[:, 1])[changed].min(), torch.tensor(margin, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_kept_entries_lead_by_the_margin_where_their_choice_changes(by: str) -> None:
    v, b = _draws(401, 5, seed=8)
    a = TopK(2, by=by, margin=0.05).prox_input(v, b, 0.5, 2.0)
    size, before = (a.abs(), v.abs()) if by == "magnitude" else (a, v)
    changed = (
        (size.argsort(1, descending=True)[:, :2].sort(1).values)
        != (before.argsort(1, descending=True)[:, :2].sort(1).values)
    ).any(1)
    assert int(changed.sum()) > 40
    ordered = size.sort(1, descending=True).values
    assert float((ordered[:, 1] - ordered[:, 2])[changed].min()) >= 0.05 - 1e-12


@pytest.mark.parametrize("margin", [1e-4, 0.01, 0.3])
def test_a_row_that_changes_codeword_is_inside_the_new_cell_by_the_margin(margin: float) -> None:
    v, b = _draws(401, 3, seed=9)
    layer = VectorQuantiser(CODEBOOK, margin=margin)
    a = layer.prox_input(v, b, 0.3, 2.0)
    own, before = layer_prox.nearest(a, CODEBOOK), layer_prox.nearest(v, CODEBOOK)
    changed = own != before
    assert int(changed.sum()) > 40
    halves = (a[:, None] - CODEBOOK).square().sum(2) / 2
    apart = (CODEBOOK[own][:, None] - CODEBOOK).square().sum(2)
    slack = halves - halves.gather(1, own[:, None]) - margin * apart
    assert float(slack[changed].min()) >= -1e-12


# -- black box ---------------------------------------------------------------------------------------------------------


def test_a_black_box_draws_from_the_global_generator_alone() -> None:
    layer, (v, b) = BlackBox(_steps, candidates=9), _draws(24, 3, seed=10)
    answers = []
    with torch.random.fork_rng(devices=[]):
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            answers.append(layer.prox_input(v, b[:, :2], 0.1, 1.0))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], v)


def test_one_candidate_stays_and_more_gain() -> None:
    v, b = _draws(101, 3, seed=11)
    costs = []
    with torch.random.fork_rng(devices=[]):
        for candidates in (1, 4, 64):
            torch.manual_seed(5)
            calls: list[int] = []
            layer = BlackBox(lambda x, calls=calls: calls.append(1) or _steps(x), candidates=candidates)
            a = layer.prox_input(v, b[:, :2], 0.1, 1.0)
            assert len(calls) == candidates
            assert torch.equal(a, v) == (candidates == 1)
            costs.append(float(0.1 * (a - v).square().sum() + (layer(a) - b[:, :2]).square().sum()))
    assert costs[0] > 1.3 * costs[1] > 1.3 * costs[2]


def test_a_black_box_never_chooses_what_is_no_number() -> None:
    v, b = _draws(101, 3, seed=12)
    layer = BlackBox(lambda x: torch.where(x > 0.5, torch.nan, x.round()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        a = layer.prox_input(v, b, 1e-3, 1.0)
    sound = layer(v).isfinite().all(1)
    assert 10 < int(sound.sum()) < 91
    assert bool(layer(a).isfinite().all(1)[sound].all())


def test_a_black_box_may_leave_torch() -> None:
    layer = BlackBox(lambda x: torch.from_numpy(x.numpy().round()))
    x = _draws(5, 3)[0].requires_grad_()
    assert torch.equal(layer(x), x.detach().round())


# -- refusals ----------------------------------------------------------------------------------------------------------

ROW, WIDE = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)

REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "one level": (lambda: Quantiser(1), "at least 2 levels, got 1"),
    "low above high": (lambda: Quantiser(3, 1.0, -1.0), "low=1.0 and high=-1.0"),
    "low equals high": (lambda: Quantiser(3, 1.0, 1.0), "below the highest"),
    "an endless range": (lambda: Quantiser(3, 0.0, float("inf")), "below the highest"),
    "a margin of half a step": (lambda: Quantiser(3, margin=0.5), "below 0.5, got 0.5"),
    "no margin in a cell": (lambda: VectorQuantiser(CODEBOOK, margin=0.0), "above 0"),
    "no margin": (lambda: Sign(0.0), "margin must be a positive number, got 0.0"),
    "a dither below 0": (lambda: Sign(dither=-1.0), "dither must be a positive number, got -1.0"),
    "a margin that is no number": (lambda: OneHot(float("nan")), "margin must be a positive number"),
    "no entries": (lambda: TopK(0), "at least one entry"),
    "an unknown order": (lambda: TopK(1, by="size"), "'value' or 'magnitude', got 'size'"),
    "more entries than there are": (lambda: TopK(4)(ROW), r"4 largest .* shape \(2, 3\)"),
    "more entries than there are, in a step": (lambda: TopK(4).prox_input(ROW, ROW, 1, 1), "4 largest"),
    "a codebook that is a vector": (lambda: VectorQuantiser(CODEBOOK[0]), r"shape \(3,\)"),
    "an empty codebook": (lambda: VectorQuantiser(CODEBOOK[:0]), r"shape \(0, 3\)"),
    "a codebook of integers": (lambda: VectorQuantiser(CODEBOOK.long()), r"torch\.int64"),
    "rows of another width": (lambda: VectorQuantiser(CODEBOOK)(WIDE), r"3 features, and .* \(2, 4\)"),
    "rows of another width, in a step": (lambda: VectorQuantiser(CODEBOOK).prox_input(WIDE, WIDE, 1, 1), "3 features"),
    "no function": (lambda: BlackBox(3), "needs a function of a tensor, got int"),  # type: ignore[arg-type]
    "no candidate": (lambda: BlackBox(_steps, candidates=0), "candidates=0"),
    "no spread": (lambda: BlackBox(_steps, spread=0.0), "spread must be a positive number"),
    "an output that is no tensor": (lambda: BlackBox(lambda x: x.numpy())(ROW), "gave ndarray"),
    "an output of fewer rows": (lambda: BlackBox(lambda x: x[:1])(ROW), r"as many rows .* \(1, 3\)"),
    "an output without rows": (lambda: BlackBox(lambda x: x.sum())(ROW), r"as many rows .* \(\)"),
    "a wanted output of another shape": (lambda: BlackBox(_steps).prox_input(ROW, ROW, 1, 1), r"not \(2, 3\)"),
    "nothing to stay for": (lambda: Sort().prox_input(ROW, ROW, 0.0, 1), "beta_in must be a positive number"),
    "a negative pull": (lambda: BlackBox(_steps).prox_input(ROW, ROW[:, :2], 1.0, -1.0), "beta_out must be"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_means_nothing_is_refused_in_a_sentence(what: str) -> None:
    attempt, message = REFUSALS[what]
    with pytest.raises(BadInput, match=message) as refusal:
        attempt()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", LINEAR)
def test_shapes_and_penalties_that_do_not_fit_are_refused(name: str) -> None:
    layer = LAYERS[name]()
    with pytest.raises(BadInput, match=r"the wanted output must have it too, not \(2, 4\)"):
        layer.prox_input(ROW, WIDE, 1.0, 1.0)
    with pytest.raises(BadInput, match=r"the gradient must have it too, not \(2, 4\)"):
        layer.prox_input_linear(ROW, WIDE, 1.0)
    for beta_in, beta_out in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (1.0, float("nan"))):
        with pytest.raises(BadInput, match="must be a positive number"):
            layer.prox_input(ROW, ROW, beta_in, beta_out)
    with pytest.raises(BadInput, match="beta_in must be a positive number"):
        layer.prox_input_linear(ROW, ROW, 0.0)
