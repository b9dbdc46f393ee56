"""Linear probes: how well all factors together know a label or attributes, and how many of them it takes.

Codes are standardised by the training part. The probes are scikit-learn's logistic regressions."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..training import BadInput
from . import inputs
from .inputs import Array, Rows
from .roc import auc, one_hot

Penalty = Literal["l2", "l1"]
Score = Literal["accuracy", "auc"]
_INTERCEPT = 10.0
"""liblinear penalises the intercept; a constant feature of this size makes that small."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A probe that was fitted on one part and scored on another."""

    scores: Array
    """(a,) accuracy or AUC of each attribute; for classes, (1,) accuracy, or (C,) one-against-the-rest AUC."""
    train_scores: Array
    """The same on the training part."""
    weights: Array
    """(a, r) or (C, r), for standardised codes (one row for two classes)."""

    @property
    def score(self) -> float:
        """The mean of `scores` over those that are defined."""
        return float(np.nanmean(self.scores))

    @property
    def num_factors(self) -> int:
        """Factors with a weight that is not 0: what an L1 probe uses."""
        return int((self.weights != 0).any(0).sum())


@dataclass(frozen=True, eq=False)
class FactorsNeeded:
    """What few factors know, when those that matter least are left out one after the other."""

    num: int
    """The smallest number of factors whose score reaches the asked share of what all factors gain over none."""
    order: Array
    """(r,) the factors, the one that was kept longest first: chosen on the training part."""
    scores: Array
    """(r + 1,) score on the other part with the first k factors, k = 0 .. r; with none it is the commonest class's."""


def linear_probe(
    train_codes: Rows,
    train_labels: Rows,
    test_codes: Rows,
    test_labels: Rows,
    *,
    penalty: Penalty = "l2",
    inverse_penalty: float = 1.0,
    score: Score = "accuracy",
) -> Probe:
    """Fit a logistic regression on the training part and score it on the other.

    codes: (n, r), (m, r). labels: (n,), (m,) classes (one softmax probe with L2, one probe a class with L1), or
    (n, a), (m, a) attributes of 0 and 1 (one probe each; an attribute that is constant in the training part is
    predicted constant). inverse_penalty: scikit-learn's C; choose it by passing the validation part as the test part.
    Raises BadInput for labels of one class and for shapes that do not go together."""
    if penalty not in ("l2", "l1") or score not in ("accuracy", "auc") or not inverse_penalty > 0:
        raise BadInput(
            f"penalty {penalty!r} is l2 or l1, score {score!r} accuracy or auc, "
            f"and inverse_penalty {inverse_penalty!r} positive"
        )
    train, test = inputs.codes(train_codes), inputs.codes(test_codes)
    inputs.same_factors(train, test)
    middle, spread = train.mean(0), train.std(0)
    # Rounding leaves a spread of about eps in a constant column.
    spread = np.where(spread > 1e-12 * np.abs(middle), spread, 1.0)
    x = (train - middle) / spread, (test - middle) / spread
    y = inputs.array(train_labels), inputs.array(test_labels)
    if y[0].ndim == 2:
        return _attributes(x, y, penalty, inverse_penalty, score)
    y = inputs.labels(y[0], len(train)), inputs.labels(y[1], len(test))
    classes = np.unique(y[0])
    if len(classes) < 2:
        raise BadInput(f"the training rows all have the label {classes[0]}; a probe needs two")
    model = _regression(penalty, inverse_penalty, len(classes)).fit(x[0], y[0])
    if score == "accuracy":
        scores = [np.array([np.mean(model.predict(a) == b)]) for a, b in zip(x, y, strict=True)]
    elif len(classes) == 2:
        scores = [auc(model.decision_function(a), b == classes[1]) for a, b in zip(x, y, strict=True)]
    else:
        scores = [auc(model.decision_function(a), one_hot(b, classes)) for a, b in zip(x, y, strict=True)]
    return Probe(scores[1], scores[0], _weights(model))


def _attributes(x: tuple[Array, Array], y: tuple[Array, Array], penalty: Penalty, c: float, score: Score) -> Probe:
    has = tuple(inputs.attributes(b, len(a)) for a, b in zip(x, y, strict=True))
    logits = tuple(np.empty(b.shape) for b in has)
    weights = np.zeros((has[0].shape[1], x[0].shape[1]))
    for k in range(has[0].shape[1]):
        if has[0][:, k].all() or not has[0][:, k].any():
            for part in logits:
                part[:, k] = 1.0 if has[0][0, k] else -1.0
            continue
        model = _regression(penalty, c, 2).fit(x[0], has[0][:, k])
        weights[k] = _weights(model)
        for part, a in zip(logits, x, strict=True):
            part[:, k] = model.decision_function(a)
    scores = [
        auc(part, b) if score == "auc" else ((part > 0) == b).mean(0) for part, b in zip(logits, has, strict=True)
    ]
    return Probe(scores[1], scores[0], weights)


def _regression(penalty: Penalty, c: float, num_classes: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    if penalty == "l2":
        return LogisticRegression(C=c, max_iter=5000)
    # scikit-learn 1.8 replaced `penalty` by `l1_ratio`.
    old = inspect.signature(LogisticRegression).parameters["penalty"].default == "l2"
    kind: dict[str, Any] = {"penalty": "l1"} if old else {"l1_ratio": 1.0}
    model = LogisticRegression(
        C=c, solver="liblinear", max_iter=5000, intercept_scaling=_INTERCEPT, random_state=0, **kind
    )
    return model if num_classes == 2 else OneVsRestClassifier(model)


def _weights(model: Any) -> Array:
    if hasattr(model, "estimators_"):
        return np.concatenate([each.coef_ for each in model.estimators_])
    weights: Array = model.coef_
    return weights


def factors_needed(
    train_codes: Rows,
    train_labels: Rows,
    test_codes: Rows,
    test_labels: Rows,
    *,
    share: float = 0.95,
    inverse_penalty: float = 1.0,
) -> FactorsNeeded:
    """How many factors an L2 probe needs for `share` of the accuracy that it gains over the commonest class.

    The probe is fitted with all factors, that with the smallest weights (sum of squares over classes or attributes) is
    left out, and so on: r fits on the training part. labels: as of `linear_probe`. A gain of nothing needs none.
    Raises BadInput as `linear_probe` does, and unless 0 < share <= 1."""
    if not 0 < share <= 1:
        raise BadInput(f"share is above 0 and at most 1, got {share!r}")
    train, test = inputs.codes(train_codes), inputs.codes(test_codes)
    kept, dropped = list(range(train.shape[1])), list[int]()
    scores = np.empty(len(kept) + 1)
    while kept:
        probe = linear_probe(train[:, kept], train_labels, test[:, kept], test_labels, inverse_penalty=inverse_penalty)
        scores[len(kept)] = probe.score
        dropped.append(kept.pop(int((probe.weights**2).sum(0).argmin())))
    scores[0] = _commonest(inputs.array(train_labels), inputs.array(test_labels))
    enough = scores >= scores[0] + share * max(scores[-1] - scores[0], 0.0)
    return FactorsNeeded(int(enough.argmax()), np.array(dropped[::-1]), scores)


def _commonest(train: Array, test: Array) -> float:
    """The accuracy of the class that is commonest in the training part."""
    if train.ndim == 2:
        return float(np.mean((train.mean(0) > 0.5) == test))
    values, counts = np.unique(train, return_counts=True)
    return float(np.mean(test == values[counts.argmax()]))
