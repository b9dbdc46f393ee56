"""The NMF layer: its derivative against differences, its statistics batch by batch, resumption, refusals."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codes import case, uniform
from piecework.nn import NMF
from piecework.solvers import nmf, nnls
from piecework.solvers.nmf import sweep_dictionary
from piecework.training import BadInput


def layer_of(dictionary: Tensor, **settings: float) -> NMF:
    layer = NMF(*dictionary.shape, dtype=dictionary.dtype, **settings)  # type: ignore[arg-type]
    layer.dictionary.copy_(dictionary)
    layer.initialised.fill_(True)
    return layer


def trained(features: int = 7, rank: int = 3, batches: int = 4, **settings: float) -> NMF:
    layer = NMF(features, rank, dtype=torch.float64, **settings)  # type: ignore[arg-type]
    for seed in range(batches):
        layer(case(24, features, rank, seed=seed)[0])
    return layer


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# -- codes and their derivative ----------------------------------------------------------------------------------------


def test_the_output_is_the_code_without_a_label() -> None:
    a, dictionary = case(24, 7, 5)
    layer = layer_of(dictionary, ridge=0.01).eval()
    torch.testing.assert_close(layer(a), nnls(a, dictionary, ridge=0.01).x, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.reconstruct(layer(a)), layer(a) @ dictionary.T)
    error = (a - layer(a) @ dictionary.T).norm() / a.norm()
    torch.testing.assert_close(layer.relative_error(a), error)
    assert float(layer.relative_error(torch.zeros(3, 7))) == 0


@pytest.mark.parametrize(("n", "d", "r"), [(5, 7, 3), (24, 5, 5), (3, 24, 1)])
def test_the_gradient_is_that_of_differences(n: int, d: int, r: int) -> None:
    a, dictionary = case(n, d, r)
    layer = layer_of(dictionary, ridge=0.01).eval()
    weights, step = uniform(n, r, seed=8), 1e-6
    a.requires_grad_()
    codes = layer(a)
    slope = codes @ dictionary.T @ dictionary + 0.01 * codes - a @ dictionary
    assert bool((torch.maximum(codes, slope) > 1e-4).all())  # strict complementarity
    (gradient,) = torch.autograd.grad((weights * codes.sin()).sum(), a)
    with torch.no_grad():
        for column in range(d):
            move = step * torch.eye(d, dtype=torch.float64)[column]
            difference = (weights * (layer(a + move).sin() - layer(a - move).sin())).sum(1) / (2 * step)
            torch.testing.assert_close(gradient[:, column], difference, rtol=0, atol=1e-6)


def test_the_gradient_passes_torch_s_own_check_for_rows_and_dictionary() -> None:
    from piecework.nn.nmf import _Codes

    a, dictionary = case(5, 7, 3)
    assert torch.autograd.gradcheck(
        lambda rows, m: _Codes.apply(rows, m, 0.01), (a.requires_grad_(), dictionary.requires_grad_())
    )


def test_the_gradient_is_bounded_where_columns_are_equal() -> None:
    a, dictionary = case(24, 7, 3)
    layer = layer_of(torch.cat([dictionary, dictionary], 1), ridge=1e-3).eval()
    a.requires_grad_()
    layer(a).square().sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert float(a.grad.abs().amax()) < 1e3


def test_images_have_a_code_a_position() -> None:
    a, dictionary = case(2 * 3 * 5, 7, 4)
    layer = layer_of(dictionary).eval()
    images = a.reshape(2, 3, 5, 7).permute(0, 3, 1, 2)
    codes = layer(images)
    assert codes.shape == (2, 4, 3, 5)
    torch.testing.assert_close(codes.permute(0, 2, 3, 1).reshape(30, 4), layer(a), rtol=0, atol=1e-14)
    flat = layer.reconstruct(codes).permute(0, 2, 3, 1).reshape(30, 7)
    torch.testing.assert_close(flat, layer.reconstruct(layer(a)), rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.relative_error(images), layer.relative_error(a))
    one, other = layer_of(dictionary), layer_of(dictionary)
    one.observe(images, codes)
    other.observe(a, layer(a))
    torch.testing.assert_close(one.dictionary, other.dictionary, rtol=0, atol=1e-12)


def test_single_precision_and_double_agree() -> None:
    a, dictionary = case(24, 7, 5)
    layer = layer_of(dictionary).eval()
    single = copy.deepcopy(layer).float()
    assert single(a).dtype == torch.float32
    torch.testing.assert_close(single(a).double(), layer(a), rtol=0, atol=1e-5)
    assert copy.deepcopy(single).double()(a.float()).dtype == torch.float64
    rows = a.float().requires_grad_()
    single(rows).sum().backward()
    double = a.clone().requires_grad_()
    layer(double).sum().backward()
    assert rows.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(rows.grad.double(), double.grad, rtol=0, atol=1e-4)


# -- the dictionary over the batches -----------------------------------------------------------------------------------


def test_the_first_batch_initialises_the_dictionary() -> None:
    a, _ = case(24, 7, 3)
    layer = NMF(7, 3, dtype=torch.float64)
    before = float(layer.relative_error(a))
    layer(torch.zeros(5, 7))
    assert not layer.initialised
    layer(a)
    assert layer.initialised
    assert float(layer.relative_error(a)) < 0.5 * before
    assert (layer.dictionary >= 0).all()
    torch.testing.assert_close(layer.dictionary.norm(dim=0), torch.ones(3).double())


def test_statistics_move_once_a_batch_at_the_next_one() -> None:
    layer = NMF(7, 3, dtype=torch.float64, forget=0.9)
    batches = [case(24, 7, 3, seed=seed)[0] for seed in range(3)]
    gram, cross = torch.zeros(3, 3).double(), torch.zeros(7, 3).double()
    layer(batches[0])
    for a, after in pairwise(batches):
        dictionary = layer.dictionary.clone()
        codes = nnls(a, dictionary, ridge=1e-3).x
        assert torch.equal(layer.gram, gram)
        gram, cross = 0.9 * gram + codes.T @ codes, 0.9 * cross + a.T @ codes
        layer(after)
        torch.testing.assert_close(layer.gram, gram, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.cross, cross, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.dictionary, sweep_dictionary(dictionary, gram, cross), rtol=0, atol=1e-11)
        gram, cross = layer.gram.clone(), layer.cross.clone()


def test_the_explicit_way_moves_as_the_tracked_one() -> None:
    tracked, explicit = trained(batches=1), trained(batches=1)
    explicit.update_dictionary()
    explicit.track = False
    for seed in range(1, 4):
        a, _ = case(24, 7, 3, seed=seed)
        codes = tracked(a)
        for _ in range(3):
            torch.testing.assert_close(explicit(a), codes, rtol=0, atol=0)
        explicit.observe(a, codes)
    tracked.update_dictionary()
    assert torch.equal(tracked.dictionary, explicit.dictionary)
    assert torch.equal(tracked.gram, explicit.gram)
    before = copy.deepcopy(tracked)
    tracked.update_dictionary()  # there is nothing to apply any more
    assert states_equal(tracked, before)


def test_sums_over_ranks_move_as_one_batch() -> None:
    a, _ = case(24, 7, 3, seed=9)
    whole, parts = trained(), trained()
    codes = whole.eval()(a)
    whole.observe(a, codes)
    one, other = parts.sums(a[:11], codes[:11]), parts.sums(a[11:], codes[11:])
    parts.absorb(one._replace(gram=one.gram + other.gram, cross=one.cross + other.cross))
    torch.testing.assert_close(parts.dictionary, whole.dictionary, rtol=0, atol=1e-12)


def test_evaluation_and_untracked_passes_move_nothing() -> None:
    layer = trained()
    before = copy.deepcopy(layer)
    a, _ = case(24, 7, 3, seed=9)
    layer.eval()(a)
    layer.relative_error(a)
    layer.train().track = False
    layer(a)
    assert states_equal(layer, before)
    layer.track = True
    layer(a)
    assert not states_equal(layer, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_moves_once(reentrant: bool) -> None:
    plain, saving = trained(), trained()
    head = nn.Linear(3, 2).double()
    for seed in range(9, 12):
        a, _ = case(24, 7, 3, seed=seed)
        one, other = a.clone().requires_grad_(), a.clone().requires_grad_()
        head(plain(one)).square().sum().backward()
        head(checkpoint(saving, other, use_reentrant=reentrant)).square().sum().backward()
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert states_equal(plain, saving)


def test_two_passes_may_come_before_one_backward() -> None:
    layer = trained()
    one, other = (case(24, 7, 3, seed=seed)[0].requires_grad_() for seed in (8, 9))
    (layer(one).sum() + layer(other).sum()).backward()
    assert one.grad is not None
    alone = one.detach().clone().requires_grad_()
    trained()(alone).sum().backward()
    torch.testing.assert_close(one.grad, alone.grad)


def test_the_dictionary_learns_what_the_batches_are_made_of() -> None:
    parts = uniform(7, 3, seed=40)
    layer = NMF(7, 3, dtype=torch.float64, ridge=1e-4)
    layer((uniform(24, 3, seed=50) - 0.6).clamp_min(0) @ parts.T)
    test = (uniform(101, 3, seed=1000) - 0.6).clamp_min(0) @ parts.T
    first = float(layer.relative_error(test))
    for seed in range(51, 251):
        layer((uniform(24, 3, seed=seed) - 0.6).clamp_min(0) @ parts.T)
    assert float(layer.relative_error(test)) < min(0.02, 0.7 * first)


def test_a_factor_that_no_code_uses_starts_again() -> None:
    a, _ = case(24, 7, 3, seed=1)
    a = a * torch.tensor([1.0, 1, 1, 1, 1, 0, 0], dtype=torch.float64)
    layer = NMF(7, 3, dtype=torch.float64, forget=0.5)
    layer(a)
    layer.dictionary[:, 1] = torch.eye(7, dtype=torch.float64)[6]  # a direction that no row has
    layer.held.fill_(False)  # and no code so far
    with_dead = float(layer.relative_error(a))
    for _ in range(20):
        layer(a)
    assert int((layer.eval()(a) > 0).any(0).sum()) == 3
    assert float(layer.dictionary[6].max()) == 0
    assert float(layer.relative_error(a)) < 0.9 * with_dead


def test_it_starts_at_what_the_worst_row_lacks_with_a_credit() -> None:
    a, dictionary = case(24, 7, 3)
    layer = layer_of(dictionary)
    codes = layer.eval()(a)
    codes[:, 1] = 0
    missing = (a - codes @ dictionary.T).clamp_min(0)
    worst = missing[missing.norm(dim=1).argmax()]
    layer.observe(a, codes)
    torch.testing.assert_close(layer.dictionary[:, 1], worst / worst.norm())
    credit = layer.gram[1, 1]
    assert 0 < float(credit) < 0.1 * float(layer.gram[0, 0])
    torch.testing.assert_close(layer.cross[:, 1], credit * layer.dictionary[:, 1])
    kept = layer.dictionary[:, 1].clone()
    layer.observe(a, codes)  # codes that still do not use it: it has its time
    torch.testing.assert_close(layer.dictionary[:, 1], kept, rtol=0, atol=1e-12)


def test_a_living_dictionary_is_not_revived() -> None:
    layer = trained(batches=1)
    a, _ = case(24, 7, 3, seed=1)
    sums = layer.sums(a, layer.eval()(a))
    expected = sweep_dictionary(layer.dictionary, sums.gram, sums.cross)
    layer.absorb(sums)
    assert torch.equal(layer.dictionary, expected)


# -- seeds, copies, resumption -----------------------------------------------------------------------------------------


def test_stop_and_resume_is_one_run_bit_for_bit() -> None:
    whole, first = trained(batches=6), trained(batches=3)
    second = NMF(7, 3, dtype=torch.float64, seed=77)
    second(case(24, 7, 3, seed=70)[0])  # what it had seen is forgotten
    second.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        second(case(24, 7, 3, seed=seed)[0])
    assert states_equal(second, whole)


def test_a_state_from_before_the_first_batch_initialises_again() -> None:
    fresh = NMF(7, 3, dtype=torch.float64).state_dict()
    layer = trained(batches=3)
    layer.load_state_dict(fresh)
    for seed in range(2):
        layer(case(24, 7, 3, seed=seed)[0])
    assert states_equal(layer, trained(batches=2))


def test_copies_go_on_alike() -> None:
    layer = trained()
    twin = copy.deepcopy(layer)
    for seed in (8, 9):
        a, _ = case(24, 7, 3, seed=seed)
        assert torch.equal(layer(a), twin(a))
    assert states_equal(layer, twin)


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    state = torch.random.get_rng_state()
    one, same, other = trained(seed=1), trained(seed=1), trained(seed=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert states_equal(one, same)
    assert not states_equal(one, other)


def test_adam_trains_through_the_layer() -> None:
    torch.manual_seed(0)
    x, y = 2 * uniform(240, 5, seed=1) - 1, (uniform(240, 5, seed=1)[:, 0] > 0.5).long()
    model = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), NMF(24, 3), nn.Linear(3, 2)).double()
    start = model[0].weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(15):
        for rows in torch.arange(240).split(24):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()
    assert float((model(x).argmax(1) == y).double().mean()) > 0.95
    with torch.no_grad():
        features = model[:2](x)
        assert float(model[2].relative_error(features)) < 1.5 * nmf(features, 3).relative_error
    assert not torch.equal(model[0].weight, start)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 8}, "more than the 7 features"),
        ({"rank": 0}, "at least 1, got 0"),
        ({"rank": 3, "ridge": 0.0}, "ridge must be above 0"),
        ({"rank": 3, "ridge": math.nan}, "ridge must be above 0"),
        ({"rank": 3, "forget": 1.5}, r"forget must be in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        NMF(7, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("a", "words"),
    [
        (torch.ones(5, 6), r"takes \(n, 7\).*got \(5, 6\)"),
        (torch.ones(5, 7, 3), r"got \(5, 7, 3\)"),
        (torch.ones(7), r"got \(7,\)"),
        (-torch.ones(5, 7), "negative entries, down to -1.*ReLU"),
        (torch.full((5, 7), math.nan), "not finite"),
        (torch.full((5, 7), math.inf), "not finite"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_input_that_has_no_code_is_refused_and_leaves_no_trace(a: Tensor, words: str, training: bool) -> None:
    layer = trained().train(training)
    before = copy.deepcopy(layer)
    with pytest.raises(BadInput, match=words):
        layer(a)
    assert states_equal(layer, before)


def test_no_rows_give_no_codes() -> None:
    layer = trained()
    assert layer(torch.zeros(0, 7)).shape == (0, 3)
    assert layer.eval()(torch.zeros(0, 7, 2, 2)).shape == (0, 3, 2, 2)
