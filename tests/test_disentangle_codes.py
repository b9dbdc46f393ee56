"""Stability, reconstruction and zeros; figures of people; linear probes."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from piecework import disentangle
from piecework.training import BadInput


def test_the_relative_error_and_zeros_by_hand():
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert disentangle.relative_error(rows, torch.zeros(2, 2)) == 1
    assert disentangle.relative_error(rows, rows + torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx(0.2)
    assert disentangle.zeros(np.array([[0.0, 5.0, 0.0], [2.0, 1e-9, 0.0]])) == pytest.approx(4 / 6)
    with pytest.raises(BadInput, match="all zero"):
        disentangle.relative_error(0 * rows, rows)
    with pytest.raises(BadInput, match="reconstruction"):
        disentangle.relative_error(rows, rows[:1])


def test_permuted_and_scaled_columns_are_the_same_code():
    random = np.random.default_rng(0)
    codes = random.random((101, 5))
    other = codes[:, [3, 0, 4, 1, 2]] * [1, -2, 3, 0.1, 9] + 7
    assert disentangle.stability([codes, other]).mean == pytest.approx(1, rel=1e-12)


def test_the_match_is_the_best_of_all_permutations():
    random = np.random.default_rng(1)
    tables = [random.normal(size=(24, r)) for r in (4, 4, 3)]
    found = disentangle.stability(tables)
    for number, (i, j) in enumerate(itertools.combinations(range(3), 2)):
        a, b = sorted((tables[i], tables[j]), key=lambda table: table.shape[1])
        size = np.abs(np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :])
        orders = itertools.permutations(range(b.shape[1]), a.shape[1])
        best = max(np.mean([size[k, c] for k, c in enumerate(order)]) for order in orders)
        assert found.pairs[number] == pytest.approx(best, rel=1e-12)
    assert found.mean == pytest.approx(found.pairs.mean())


def test_codes_without_a_relation_are_as_stable_as_their_null():
    random = np.random.default_rng(2)
    found = disentangle.stability([random.normal(size=(500, 16)) for _ in range(4)], seed=3)
    assert found.mean == pytest.approx(found.null, abs=0.01)
    assert found.null == pytest.approx(0.08, abs=0.01)


def test_dead_columns_match_nothing():
    random = np.random.default_rng(4)
    codes = random.random((57, 4))
    codes[:, 1] = 0.3
    assert disentangle.stability([codes, codes]).mean == pytest.approx(0.75, rel=1e-12)
    for wrong, said in (([codes], "two or more"), ([codes, codes[:5]], "same rows")):
        with pytest.raises(BadInput, match=said):
            disentangle.stability(wrong)


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def test_pair_auc_agrees_with_all_pairs():
    random = np.random.default_rng(5)
    codes, people = random.random((24, 3)), random.integers(0, 5, size=24)
    pairs = list(itertools.combinations(range(24), 2))
    alike = [cosine(codes[i], codes[j]) for i, j in pairs]
    same = [people[i] == people[j] for i, j in pairs]
    assert disentangle.pair_auc(codes, people) == pytest.approx(roc_auc_score(same, alike), rel=1e-12)


def test_one_shot_agrees_with_all_choices_of_known_pictures():
    random = np.random.default_rng(6)
    people = np.array([0, 1, 2, 0, 1, 2, 0, 2, 2])
    codes = random.normal(size=(9, 3)) + 1.2 * np.eye(3)[people]
    accuracies = []
    for known in itertools.product(*(np.flatnonzero(people == p) for p in range(3))):
        rest = [q for q in range(9) if q not in known]
        named = [people[max(known, key=lambda g: cosine(codes[q], codes[g]))] for q in rest]
        accuracies.append(Fraction(int(sum(people[rest] == named)), len(rest)))
    expected = float(sum(accuracies) / len(accuracies))
    assert 0.4 < expected < 0.95
    assert disentangle.one_shot(codes, people) == pytest.approx(expected, rel=1e-12)


def test_codes_that_are_the_person_are_perfect_and_random_ones_chance():
    people = np.repeat(np.arange(10), 10)
    random = np.random.default_rng(7)
    exact = np.eye(10)[people] + 0.01 * random.random((100, 10))
    noise = random.normal(size=(100, 10))
    assert disentangle.pair_auc(exact, people) == 1
    assert disentangle.one_shot(exact, people) == pytest.approx(1, rel=1e-12)
    assert disentangle.nearest(exact[::2], people[::2], exact[1::2], people[1::2]) == 1
    assert disentangle.top_purity(exact, people).tolist() == [1.0] * 10
    assert disentangle.pair_auc(noise, people) == pytest.approx(0.5, abs=0.05)
    assert disentangle.one_shot(noise, people) == pytest.approx(0.1, abs=0.05)
    assert disentangle.top_purity(noise, people).mean() < 0.5


def test_purity_counts_only_rows_that_activate_a_factor():
    people = np.array([3, 3, 3, 8, 8, 8])
    codes = np.array([[0, 9, 1], [0, 8, 1], [0, 0, 1], [5, 7, 1], [0, 0, 1], [0, 0, 1]], dtype=float)
    np.testing.assert_allclose(disentangle.top_purity(codes, people, top=3), [1 / 3, 2 / 3, 0])


def test_figures_of_people_refuse_what_has_no_pairs():
    codes = np.eye(3)
    for call in (disentangle.pair_auc, disentangle.one_shot):
        for people in (np.zeros(3), np.arange(3)):
            with pytest.raises(BadInput, match="two pictures"):
                call(codes, people)
    with pytest.raises(BadInput, match="top is from 1"):
        disentangle.top_purity(codes, np.arange(3), top=4)


def blobs(seed, rows=240):
    """Three classes; two factors tell them apart, two are noise, one is constant."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, size=rows)
    means = np.array([[0, 0], [30, 0], [0, 40]])[labels]
    informative = means + random.normal(size=(rows, 2)) * 5
    return np.concatenate([informative, random.normal(size=(rows, 2)), np.full((rows, 1), 0.1)], axis=1), labels


def test_a_probe_is_the_logistic_regression_of_standardised_codes():
    (train, y), (test, z) = blobs(0), blobs(1)
    found = disentangle.linear_probe(train, y, test, z, inverse_penalty=0.5)
    scaler = StandardScaler().fit(train)
    twin = LogisticRegression(C=0.5, max_iter=5000).fit(scaler.transform(train), y)
    assert found.score == pytest.approx(twin.score(scaler.transform(test), z))
    np.testing.assert_allclose(found.weights[:, :4], twin.coef_[:, :4], atol=1e-4)
    one = disentangle.linear_probe(train, y, test, z, score="auc")
    assert one.scores.shape == (3,)
    assert one.score > 0.99


def test_an_l1_probe_leaves_out_the_noise():
    (train, y), (test, z) = blobs(2), blobs(3)
    found = disentangle.linear_probe(train, y, test, z, penalty="l1", inverse_penalty=0.05)
    assert found.score > 0.95
    assert found.num_factors == 2
    assert disentangle.linear_probe(train, y, test, z).num_factors > 2


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_attributes_have_a_probe_each(penalty):
    (train, y), (test, z) = blobs(4), blobs(5)
    has, truth = (disentangle.one_hot(part, np.arange(4)) for part in (y, z))
    accuracy = disentangle.linear_probe(train, has, test, truth, penalty=penalty)
    areas = disentangle.linear_probe(train, has, test, truth, penalty=penalty, score="auc")
    assert accuracy.weights.shape == (4, 5)
    assert accuracy.scores[3] == 1
    assert np.isnan(areas.scores[3])
    assert areas.score == pytest.approx(areas.scores[:3].mean())
    assert areas.score > 0.95
    for k in (1, 2):
        alone = disentangle.linear_probe(train, y == k, test, z == k, penalty=penalty)
        assert alone.score == pytest.approx(accuracy.scores[k])


def test_two_factors_are_needed_where_two_are_informative():
    (train, y), (test, z) = blobs(6), blobs(7)
    found = disentangle.factors_needed(train, y, test, z)
    assert found.num == 2
    assert set(found.order[:2]) == {0, 1}
    assert sorted(found.order) == list(range(5))
    assert found.scores[0] == pytest.approx(np.mean(z == np.bincount(y).argmax()))
    assert found.scores[-1] == disentangle.linear_probe(train, y, test, z).score
    few = disentangle.linear_probe(train[:, found.order[:2]], y, test[:, found.order[:2]], z)
    assert found.scores[2] == few.score


def test_factors_that_know_nothing_are_not_needed():
    random = np.random.default_rng(8)
    codes, labels = random.normal(size=(60, 3)), np.array([0, 0, 1] * 20)
    found = disentangle.factors_needed(codes, labels, codes[:5] * 0, labels[:5] * 0)
    assert found.num == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"penalty": "l0"}, "l2 or l1"), ({"score": "f1"}, "accuracy or auc"), ({"inverse_penalty": 0.0}, "positive")],
)
def test_probe_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(BadInput, match=said):
        disentangle.linear_probe(np.eye(3), np.arange(3), np.eye(3), np.arange(3), **settings)


def test_a_probe_of_one_class_is_refused():
    with pytest.raises(BadInput, match="all have the label 0"):
        disentangle.linear_probe(np.eye(3), np.zeros(3), np.eye(3), np.zeros(3))
