"""AUC of single factors, within groups and across; intervals by identity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from piecework import disentangle
from piecework.training import BadInput


def auc_by_pairs(scores, attribute, groups):
    won, pairs = 0.0, 0
    for i, j in itertools.product(range(len(scores)), repeat=2):
        if attribute[i] and not attribute[j] and groups[i] == groups[j]:
            won += float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j])
            pairs += 1
    return won / pairs if pairs else np.nan


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(2, 25), levels=st.integers(1, 9), groups=st.integers(1, 4))
def test_auc_agrees_with_all_pairs(seed, rows, levels, groups):
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, size=(rows, 3)).astype(float)
    has = random.random((rows, 3)) < 0.5
    of_row = random.integers(0, groups, size=rows)
    found = disentangle.auc(scores, has, of_row)
    expected = [auc_by_pairs(scores[:, k], has[:, k], of_row) for k in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


def test_auc_agrees_with_scikit_learn():
    random = np.random.default_rng(0)
    scores, has = random.normal(size=101).round(1), random.random(101) < 0.3
    assert disentangle.auc(scores, has)[0] == pytest.approx(roc_auc_score(has, scores), rel=1e-12)


def chosen_by_brute_force(train, has, groups):
    best = (-1.0, 0, 1)
    for k, sign in itertools.product(range(train.shape[1]), (1, -1)):
        found = auc_by_pairs(sign * train[:, k], has, groups)
        if found > best[0] + 1e-12:
            best = (found, k, sign)
    return best


@pytest.mark.parametrize("grouped", [False, True])
def test_the_factor_is_chosen_on_the_training_part_alone(grouped):
    random = np.random.default_rng(1)
    train, test = random.integers(0, 6, size=(31, 5)).astype(float), random.normal(size=(24, 5))
    has, truth = random.random((31, 3)) < 0.4, random.random((24, 3)) < 0.4
    groups = random.integers(0, 2, size=31), random.integers(0, 2, size=24)
    found = disentangle.single_factor_auc(train, has, test, truth, groups=groups if grouped else None)
    if not grouped:
        groups = np.zeros(31), np.zeros(24)
    for k in range(3):
        best, factor, sign = chosen_by_brute_force(train, has[:, k], groups[0])
        assert (found.factor[k], found.sign[k]) == (factor, sign)
        assert found.train_auc[k] == pytest.approx(best, rel=1e-12)
        assert found.auc[k] == pytest.approx(auc_by_pairs(sign * test[:, factor], truth[:, k], groups[1]), rel=1e-12)
    assert found.mean == pytest.approx(found.auc.mean())
    np.testing.assert_array_equal(found.scores(test), test[:, found.factor] * found.sign)


def test_the_sign_of_a_factor_does_not_matter():
    has = np.tile([False, True, True], 8)
    codes = np.stack([-has.astype(float), np.zeros(24)], axis=1)
    found = disentangle.single_factor_auc(codes, has, codes, has)
    assert (found.factor[0], found.sign[0], found.auc[0]) == (0, -1, 1.0)


def test_a_code_of_the_coarse_label_alone_scores_the_floor_and_chance_within_groups():
    digit = np.tile(np.arange(10), 30)
    parity, has = digit % 2, disentangle.one_hot(digit)
    code = np.stack([parity, 1 - parity], axis=1)
    plain = disentangle.single_factor_auc(code, has, code, has)
    np.testing.assert_allclose(plain.auc, 5 / 9 + 0.5 * 4 / 9, rtol=1e-12)
    within = disentangle.single_factor_auc(code, has, code, has, groups=(parity, parity))
    np.testing.assert_allclose(within.auc, 0.5, rtol=1e-12)


def test_random_codes_score_chance_within_groups():
    random = np.random.default_rng(2)
    digit = np.tile(np.arange(10), 200)
    codes, has = random.normal(size=(2000, 8)), disentangle.one_hot(digit)
    train, test = np.arange(1000), np.arange(1000, 2000)
    groups = digit[train] % 2, digit[test] % 2
    found = disentangle.single_factor_auc(codes[train], has[train], codes[test], has[test], groups=groups)
    assert (found.train_auc > 0.5).all()
    assert abs(found.mean - 0.5) < 0.03


def test_tensors_of_a_graph_and_vectors_are_taken():
    codes = torch.arange(5.0, requires_grad=True)
    has = torch.tensor([0, 0, 1, 0, 1])
    assert disentangle.single_factor_auc(codes, has, codes, has).auc[0] == pytest.approx(5 / 6)


def test_an_attribute_that_does_not_vary_is_nan_in_the_report_and_refused_in_the_choice():
    codes, has = np.arange(6.0)[:, None], np.array([[0, 1], [1, 1], [0, 0], [1, 0], [0, 0], [1, 1]])
    found = disentangle.single_factor_auc(codes, has, codes[:2], has[:2])
    assert found.auc[0] == 1
    assert np.isnan(found.auc[1])
    assert found.mean == 1
    with pytest.raises(BadInput, match="attribute 1 is the same in all training rows"):
        disentangle.single_factor_auc(codes[:2], has[:2], codes, has)
    with pytest.raises(BadInput, match="of every group"):
        disentangle.single_factor_auc(codes, has, codes, has, groups=(has[:, 0], has[:, 0]))
    with pytest.raises(BadInput, match="no attribute varies"):
        disentangle.single_factor_auc(codes, has, codes[:1], has[:1])


def test_one_hot_keeps_the_classes_it_is_given():
    assert disentangle.one_hot(np.array([5, 3, 5])).tolist() == [[False, True], [True, False], [False, True]]
    assert disentangle.one_hot(np.array([3]), np.array([3, 4])).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("codes", "attributes", "said"),
    [
        (np.zeros((5, 2, 2)), np.zeros(5), "codes have shape"),
        (np.full((5, 2), np.nan), np.zeros(5), "row 0, factor 0 is nan"),
        (np.zeros((5, 2)), np.zeros(3), "attributes have shape"),
        (np.zeros((5, 2)), np.arange(5), "0 or 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(codes, attributes, said):
    with pytest.raises(BadInput, match=said):
        disentangle.single_factor_auc(codes, attributes, codes, attributes)


def test_an_interval_by_identity_is_wider_than_one_by_row_where_rows_repeat():
    random = np.random.default_rng(3)
    values = random.normal(size=24).repeat(5)
    identities = np.arange(24).repeat(5)
    by_identity = disentangle.interval(lambda rows: float(values[rows].mean()), identities)
    by_row = disentangle.interval(lambda rows: float(values[rows].mean()), np.arange(120))
    assert by_identity.estimate == by_row.estimate == pytest.approx(values.mean())
    assert by_identity.low < by_identity.estimate < by_identity.high
    ratio = (by_identity.high - by_identity.low) / (by_row.high - by_row.low)
    assert ratio == pytest.approx(np.sqrt(5), rel=0.15)
    exact = 2 * 1.96 * values[::5].std() / np.sqrt(24)
    assert by_identity.high - by_identity.low == pytest.approx(exact, rel=0.1)


def test_draws_without_a_figure_are_left_out_and_counted():
    has, identities = np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])
    found = disentangle.interval(lambda rows: disentangle.auc(np.arange(4.0)[rows], has[rows])[0], identities, draws=64)
    assert 0 < found.num_draws < 64
    assert (found.estimate, found.low, found.high) == (0, 0, 0)
    with pytest.raises(BadInput, match="NaN in every draw"):
        disentangle.interval(lambda rows: float("nan"), identities)
    with pytest.raises(BadInput, match="at least two"):
        disentangle.interval(lambda rows: 0.0, np.zeros(4))
