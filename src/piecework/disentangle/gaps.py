"""MIG, SAP and DCI: is an attribute in one factor, and does a factor hold one attribute.

MIG: Chen et al., Isolating Sources of Disentanglement in VAEs, arXiv 1802.04942. SAP: Kumar et al., Variational
Inference of Disentangled Latent Concepts, arXiv 1711.00848. DCI: Eastwood, Williams, A Framework for the Quantitative
Evaluation of Disentangled Representations, ICLR 2018.

Differs from the papers: what they choose on the rows they score (the best factor and the runner-up) is chosen on the
training part here, so a gap can be negative; SAP's linear classifier on one factor is the exact best threshold, by
balanced accuracy. Pass the same rows twice for the usual figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..training import BadInput
from . import inputs
from .inputs import Array, Rows


def mig(train_codes: Rows, train_labels: Rows, test_codes: Rows, test_labels: Rows, *, bins: int = 20) -> Array:
    """(a,) mutual information gap: (I(v; best factor) - I(v; runner-up)) / H(v) on the second part.

    codes: (n, r), (m, r), r at least 2, cut into equal bins over the training range (codes beyond it go to the outer
    bins). labels: (n, a), (m, a) attributes or classes, or vectors. I is of counts: for unrelated variables it is not
    0 but about (bins - 1)(values - 1) / 2m nats, for every factor alike. NaN where v is constant in the second part."""
    train, test, y, z = _parts(train_codes, train_labels, test_codes, test_labels)
    low, high = train.min(0), train.max(0)
    width = np.where(high > low, high - low, 1.0)
    cells = [np.clip((part - low) / width * bins, 0, bins - 1).astype(np.int64) for part in (train, test)]
    columns = np.arange(y.shape[1])
    first, second = _best_two(np.stack([_information(cells[0], y[:, k], bins) for k in columns], axis=1))
    gaps = np.full(len(columns), np.nan)
    for k in columns:
        shares = np.unique(z[:, k], return_counts=True)[1] / len(z)
        if len(shares) > 1:
            known = _information(cells[1], z[:, k], bins)
            gaps[k] = (known[first[k]] - known[second[k]]) / -(shares * np.log(shares)).sum()
    return gaps


def _information(cells: Array, labels: Array, bins: int) -> Array:
    """(r,) mutual information in nats of each column of cells (n, r) with the labels (n,)."""
    values, codes = np.unique(labels, return_inverse=True)
    num_factors, width = cells.shape[1], bins * len(values)
    flat = np.arange(num_factors) * width + cells * len(values) + codes[:, None]
    counts = np.bincount(flat.ravel(), minlength=num_factors * width)
    joint: Array = counts.reshape(num_factors, bins, len(values)) / len(cells)
    apart = joint.sum(1, keepdims=True) * joint.sum(2, keepdims=True)
    there = joint > 0
    terms = np.where(there, joint * np.log(np.where(there, joint, 1) / np.where(there, apart, 1)), 0)
    information: Array = terms.sum((1, 2))
    return information


def sap(train_codes: Rows, train_attributes: Rows, test_codes: Rows, test_attributes: Rows) -> Array:
    """(a,) separated attribute predictability: balanced accuracy of the best factor minus that of the runner-up.

    Each factor predicts the attribute by the threshold and direction that are best on the training part; the two
    factors are chosen there, too. Balanced accuracy starts at 1/2, so 1/2 is the largest gap. codes: (n, r), (m, r),
    r at least 2; attributes: (n, a), (m, a) of 0 and 1, or vectors. NaN where the attribute is constant in either
    part."""
    train, test, y, z = _parts(train_codes, train_attributes, test_codes, test_attributes)
    has, truth = inputs.attributes(y, len(train)), inputs.attributes(z, len(test))
    gaps = np.full(has.shape[1], np.nan)
    for k in range(has.shape[1]):
        if has[:, k].all() or truth[:, k].all() or not has[:, k].any() or not truth[:, k].any():
            continue
        score, threshold, up = _thresholds(train, has[:, k])
        said = (test > threshold) == up
        right = said == truth[:, k, None]
        found = (right[truth[:, k]].mean(0) + right[~truth[:, k]].mean(0)) / 2
        first, second = _best_two(score[:, None])
        gaps[k] = found[first[0]] - found[second[0]]
    return gaps


def _thresholds(codes: Array, has: Array) -> tuple[Array, Array, Array]:
    """(r,) each: best balanced accuracy, its threshold, and whether the attribute lies above it."""
    order = np.argsort(codes, axis=0, kind="stable")
    values, positive = np.take_along_axis(codes, order, axis=0), has[order]
    lead = np.cumsum(~positive, axis=0)[:-1] / (~has).sum() - np.cumsum(positive, axis=0)[:-1] / has.sum()
    lead = np.where(values[1:] > values[:-1], lead, 0.0)
    row, column = np.abs(lead).argmax(0), np.arange(codes.shape[1])
    best = lead[row, column]
    return 0.5 + np.abs(best) / 2, (values[row, column] + values[row + 1, column]) / 2, best >= 0


@dataclass(frozen=True, eq=False)
class DCI:
    """Three shares from 0 to 1, and what they come from."""

    disentanglement: float
    """1 where every factor matters for one attribute only; factors weighted by how much they matter."""
    completeness: float
    """1 where every attribute needs one factor only; attributes alike."""
    informativeness: float
    """Accuracy on the second part, mean over attributes."""
    importance: Array
    """(r, a), columns that add up to 1 (or are 0)."""


def dci(
    train_codes: Rows, train_labels: Rows, test_codes: Rows, test_labels: Rows, *, trees: int = 50, seed: int = 0
) -> DCI:
    """DCI with a random forest of scikit-learn an attribute, fitted on the training part.

    codes: (n, r), (m, r), r at least 2; labels: (n, a), (m, a) attributes or classes, a at least 2. trees: of each
    forest. Disentanglement and completeness are of importances on the training part."""
    from sklearn.ensemble import RandomForestClassifier

    train, test, y, z = _parts(train_codes, train_labels, test_codes, test_labels)
    columns, right = [], []
    for k in range(y.shape[1]):
        forest = RandomForestClassifier(trees, max_features=None, random_state=seed, min_samples_leaf=3)
        forest.fit(train, y[:, k])
        columns.append(forest.feature_importances_)
        right.append(np.mean(forest.predict(test) == z[:, k]))
    importance = np.stack(columns, axis=1)
    disentanglement, completeness = dci_of_importance(importance)
    return DCI(disentanglement, completeness, float(np.mean(right)), importance)


def dci_of_importance(importance: Rows) -> tuple[float, float]:
    """Disentanglement and completeness of importances (r, a), not negative, r and a at least 2.

    A factor without importance has no weight; an attribute without any counts 0. Raises BadInput."""
    table = inputs.codes(importance)
    if min(table.shape) < 2 or (table < 0).any() or not table.any():
        raise BadInput(f"importances of shape {table.shape} must be at least 2 x 2, not negative, and not all 0")
    of_factor, of_attribute = table.sum(1), table.sum(0)
    focus = _focus(table[of_factor > 0])
    complete = np.zeros(table.shape[1])
    complete[of_attribute > 0] = _focus(table.T[of_attribute > 0])
    weights = of_factor[of_factor > 0] / of_factor.sum()
    return float(focus @ weights), float(complete.mean())


def _focus(rows: Array) -> Array:
    """1 - entropy of each row, in units of the largest possible entropy."""
    shares = rows / rows.sum(1, keepdims=True)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    focus: Array = 1 + (shares * logs).sum(1) / np.log(rows.shape[1])
    return focus


def _best_two(strength: Array) -> tuple[Array, Array]:
    """(a,) the best and the second-best row of each column (r, a); of equals the first."""
    order = np.argsort(-strength, axis=0, kind="stable")
    return order[0], order[1]


def _parts(
    train_codes: Rows, train_labels: Rows, test_codes: Rows, test_labels: Rows
) -> tuple[Array, Array, Array, Array]:
    train, test = inputs.codes(train_codes), inputs.codes(test_codes)
    inputs.same_factors(train, test)
    if train.shape[1] < 2:
        raise BadInput("a gap between factors needs at least two")
    y, z = (part[:, None] if part.ndim == 1 else part for part in map(inputs.array, (train_labels, test_labels)))
    if y.ndim != 2 or y.shape[1:] != z.shape[1:] or (len(y), len(z)) != (len(train), len(test)):
        raise BadInput(
            f"labels have shapes {y.shape} and {z.shape}; they must be ({len(train)}, a) and ({len(test)}, a)"
        )
    return train, test, y, z
