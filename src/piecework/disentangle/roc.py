"""The area under the ROC curve of every factor for every attribute at once, by ranks (Mann and Whitney, 1947).

AUC = P(code of a positive > code of a negative) + P(equal) / 2. With groups, positives are compared with negatives of
their own group only, all such pairs counted alike: a code that knows the group and nothing else has 1/2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..training import BadInput
from . import inputs
from .inputs import Array, Rows


@dataclass(frozen=True, eq=False)
class SingleFactor:
    """For each of a attributes the one factor that knows it best on the training part."""

    factor: Array
    """(a,) its column in the codes."""
    sign: Array
    """(a,) -1 where a small code means that the attribute is there, else 1."""
    train_auc: Array
    """(a,) at least 1/2: it was chosen for it."""
    auc: Array
    """(a,) on the other part, in [0, 1]; NaN where that part has no pair to compare."""

    @property
    def mean(self) -> float:
        """The mean of `auc` over the attributes that could be scored."""
        return float(np.nanmean(self.auc))

    def scores(self, codes: Rows) -> Array:
        """(n, a): the signed code of the chosen factor, for example for `auc(scores[rows], attributes[rows])`."""
        scores: Array = inputs.codes(codes)[:, self.factor] * self.sign
        return scores


def single_factor_auc(
    train_codes: Rows,
    train_attributes: Rows,
    test_codes: Rows,
    test_attributes: Rows,
    *,
    groups: tuple[Rows, Rows] | None = None,
) -> SingleFactor:
    """Choose a factor and its sign for each attribute on the training part, and score it on the other.

    codes: (n, r) and (m, r); attributes: (n, a) and (m, a) of 0 and 1, or vectors; groups: (n,) and (m,) coarse
    classes, for AUC within groups. Of equally good factors the first is taken. An attribute that is the same in a
    whole group has no pairs there. Raises BadInput where an attribute has no pair in the training part, or none has
    one in the other."""
    train, test = inputs.codes(train_codes), inputs.codes(test_codes)
    inputs.same_factors(train, test)
    has, truth = inputs.attributes(train_attributes, len(train)), inputs.attributes(test_attributes, len(test))
    if has.shape[1] != truth.shape[1]:
        raise BadInput(f"the training part has {has.shape[1]} attributes and the other {truth.shape[1]}")
    table = _table(train, has, None if groups is None else groups[0])
    lost = np.flatnonzero(np.isnan(table[0]))
    if len(lost):
        raise BadInput(
            f"attribute {lost[0]} is the same in all training rows{'' if groups is None else ' of every group'}, "
            "so no factor can be chosen for it; leave it out"
        )
    strength = np.maximum(table, 1 - table)
    factor, column = strength.argmax(0), np.arange(has.shape[1])
    sign = np.where(table[factor, column] >= 0.5, 1, -1)
    found = auc(test[:, factor] * sign, truth, None if groups is None else groups[1])
    if np.isnan(found).all():
        raise BadInput("no attribute varies in the rows to report on, so there is nothing to compare")
    return SingleFactor(factor, sign, strength[factor, column], found)


def auc(scores: Rows, attributes: Rows, groups: Rows | None = None) -> Array:
    """(a,) the AUC of column k of the scores (n, a) for column k of the attributes (n, a); vectors are one column.

    NaN where no positive meets a negative (of its group)."""
    values = inputs.codes(scores)
    has = inputs.attributes(attributes, len(values))
    if has.shape != values.shape:
        raise BadInput(f"scores have shape {values.shape} and attributes {has.shape}; they go together by column")
    won, pairs = np.zeros(has.shape[1]), np.zeros(has.shape[1])
    for rows in _parts(groups, len(values)):
        ranks, ones = _ranks(values[rows]), has[rows].sum(0)
        won += (ranks * has[rows]).sum(0) - ones * (ones + 1) / 2
        pairs += ones * (len(ranks) - ones)
    return _ratio(won, pairs)


def one_hot(labels: Rows, classes: Rows | None = None) -> Array:
    """(n, C) bool: attribute k says whether the label is classes[k]. classes: those of the labels, sorted, unless
    given (give them where a part may lack a class)."""
    found = inputs.array(labels)
    table: Array = found[:, None] == (np.unique(found) if classes is None else inputs.array(classes))
    return table


def _table(codes: Array, has: Array, groups: Rows | None) -> Array:
    """(r, a) the AUC of every factor for every attribute: a product of ranks and attributes in each group."""
    won, pairs = np.zeros((codes.shape[1], has.shape[1])), np.zeros(has.shape[1])
    for rows in _parts(groups, len(codes)):
        ranks, ones = _ranks(codes[rows]), has[rows].sum(0)
        won += ranks.T @ has[rows].astype(np.float64) - ones * (ones + 1) / 2
        pairs += ones * (len(ranks) - ones)
    return _ratio(won, pairs)


def _ranks(values: Array) -> Array:
    """Ranks from 1 in each column, equal values the mean of theirs."""
    from scipy.stats import rankdata

    ranks: Array = rankdata(values, axis=0)
    return ranks


def _parts(groups: Rows | None, num_rows: int) -> list[Array]:
    if groups is None:
        return [np.arange(num_rows)]
    found = inputs.labels(groups, num_rows, "groups")
    return [np.flatnonzero(found == group) for group in np.unique(found)]


def _ratio(won: Array, pairs: Array) -> Array:
    ratio: Array = np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)
    return ratio
