"""MIG, SAP and DCI against loops and cases done by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, mutual_info_score

from piecework.disentangle import dci, dci_of_importance, mig, sap
from piecework.disentangle.gaps import _information
from piecework.training import BadInput


def perfect(seed, rows=400):
    """One factor an attribute, with noise that does not blur it, and three factors of noise."""
    random = np.random.default_rng(seed)
    has = random.random((rows, 3)) < 0.5
    codes = np.concatenate([3 * has + random.random((rows, 3)), random.normal(size=(rows, 3))], axis=1)
    return codes, has


def information_by_loops(cells, labels):
    total, n = 0.0, len(cells)
    for cell, label in itertools.product(set(cells), set(labels)):
        both = sum(a == cell and b == label for a, b in zip(cells, labels, strict=True)) / n
        if both:
            total += both * math.log(both / (np.mean(cells == cell) * np.mean(labels == label)))
    return total


def test_mutual_information_agrees_with_loops_and_scikit_learn():
    random = np.random.default_rng(0)
    cells, labels = random.integers(0, 5, size=(57, 3)), random.integers(-2, 1, size=57)
    found = _information(cells, labels, bins=5)
    for k in range(3):
        assert found[k] == pytest.approx(information_by_loops(cells[:, k], labels), rel=1e-12)
        assert found[k] == pytest.approx(mutual_info_score(cells[:, k], labels), rel=1e-10)


def test_one_factor_an_attribute_has_gaps_near_one_half_for_sap_and_one_for_mig():
    (train, y), (test, z) = perfect(1, 4000), perfect(2, 4000)
    assert (mig(train, y, test, z) > 0.97).all()
    np.testing.assert_allclose(sap(train, y, test, z), 0.5, atol=0.03)


def test_random_codes_have_no_gaps():
    random = np.random.default_rng(3)
    codes, has = random.normal(size=(2000, 6)), random.random((2000, 3)) < 0.5
    parts = codes[:1000], has[:1000], codes[1000:], has[1000:]
    assert np.abs(mig(*parts)).max() < 0.03
    assert np.abs(sap(*parts)).max() < 0.06


def test_two_copies_of_a_factor_have_no_gap():
    codes, has = perfect(4)
    both = np.concatenate([codes, codes], axis=1)
    np.testing.assert_allclose(mig(both, has, both, has), 0, atol=1e-12)
    np.testing.assert_allclose(sap(both, has, both, has), 0, atol=1e-12)


def test_mig_by_hand():
    labels = np.array([0, 0, 1, 1])
    codes = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert mig(codes, labels, codes, labels)[0] == pytest.approx(1.0, rel=1e-12)
    codes[0, 1], codes[1, 1] = 0.0, 0.0  # the second factor now has 3 zeros, one of them with label 1
    known = math.log(2) - (0.75 * (2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3)))
    assert mig(codes, labels, codes, labels)[0] == pytest.approx(1 - known / math.log(2), rel=1e-12)


def test_mig_takes_classes_and_codes_outside_the_training_range():
    random = np.random.default_rng(5)
    labels = random.integers(0, 4, size=500)
    codes = np.stack([labels + 0.0, random.normal(size=500)], axis=1)
    assert mig(codes, labels, codes, labels)[0] > 0.9
    assert mig(codes, labels, codes * 9 - 2, labels)[0] > 0.2


def threshold_by_brute_force(codes, has):
    values = np.unique(codes)
    best = (0.5, None, True)
    for threshold, up in itertools.product((values[1:] + values[:-1]) / 2, (True, False)):
        score = balanced_accuracy_score(has, (codes > threshold) == up)
        if score > best[0] + 1e-12:
            best = (score, threshold, up)
    return best


def test_sap_agrees_with_trying_all_thresholds():
    random = np.random.default_rng(6)
    has = random.random(41) < 0.4
    codes = random.integers(0, 9, size=(41, 3)) + np.outer(has, [3, -2, 0])
    score = []
    for column in codes.T:
        best, threshold, up = threshold_by_brute_force(column, has)
        assert balanced_accuracy_score(has, (column > threshold) == up) == best
        score.append(best)
    first, second = sorted(score)[::-1][:2]
    assert sap(codes, has, codes, has)[0] == pytest.approx(first - second, rel=1e-12)


def test_sap_has_no_figure_where_an_attribute_is_constant():
    codes, has = perfect(7, 24)
    has[:, 1] = True
    assert np.isnan(sap(codes, has, codes, has)).tolist() == [False, True, False]
    assert np.isnan(mig(codes, has, codes, has)).tolist() == [False, True, False]


def test_dci_of_importances_by_hand():
    assert dci_of_importance(np.eye(3)) == pytest.approx((1.0, 1.0))
    assert dci_of_importance(np.ones((4, 3))) == pytest.approx((0.0, 0.0), abs=1e-12)
    split = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])  # two factors share an attribute
    shared = 1 - math.log(2) / math.log(3)
    assert dci_of_importance(split) == pytest.approx((1.0, (shared + 1) / 2))
    joint = np.array([[1.0, 1.0], [0.0, 0.0]])  # one factor holds both
    assert dci_of_importance(joint) == pytest.approx((0.0, 1.0), abs=1e-12)
    weighed = np.array([[3.0, 0.0], [0.5, 0.5]])
    assert dci_of_importance(weighed)[0] == pytest.approx(3 / 4)


def test_dci_tells_perfect_codes_from_mixed_ones():
    (train, y), (test, z) = perfect(8), perfect(9)
    turn = np.linalg.qr(np.random.default_rng(10).normal(size=(6, 6)))[0]
    clear, mixed = dci(train, y, test, z), dci(train @ turn, y, test @ turn, z)
    assert clear.importance.shape == (6, 3)
    np.testing.assert_allclose(clear.importance.sum(0), 1, rtol=1e-12)
    assert clear.disentanglement > 0.8 > 0.5 > mixed.disentanglement
    assert clear.completeness > 0.8 > 0.5 > mixed.completeness
    assert clear.informativeness == 1
    assert dci(train, y, test, z).disentanglement == clear.disentanglement


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c, h: mig(c[:, :1], h, c[:, :1], h), "at least two"),
        (lambda c, h: mig(c, h, c[:, :3], h), "6 factors and the others 3"),
        (lambda c, h: sap(c, h, c, h[:, :2]), "labels have shapes"),
        (lambda c, h: dci_of_importance(c[:, :1]), "at least 2 x 2"),
        (lambda c, h: dci_of_importance(-np.eye(2)), "not negative"),
    ],
)
def test_parts_that_do_not_fit_are_refused(call, said):
    with pytest.raises(BadInput, match=said):
        call(*perfect(11, 24))
