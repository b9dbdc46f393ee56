"""Figures of codes of people: whether pictures of one person have like codes, also of people never trained on.

Likeness is the cosine of two codes (n, r); a code of zeros is like nothing (cosine 0). It depends on the scale of each
factor: bring the columns of the dictionary to length 1, and the codes with them, before comparing methods."""

from __future__ import annotations

import numpy as np

from ..training import BadInput
from . import inputs
from .inputs import Array, Rows
from .roc import auc


def pair_auc(codes: Rows, people: Rows) -> float:
    """P(two pictures of one person are more alike than two of different people), over all pairs of the n codes.

    people: (n,). Raises BadInput where there is no pair of one kind."""
    unit, who = _unit(codes, people)
    first, second = np.triu_indices(len(unit), k=1)
    same = who[first] == who[second]
    if same.all() or not same.any():
        raise BadInput("pair_auc needs two pictures of one person and two of different people")
    return float(auc((unit @ unit.T)[first, second], same)[0])


def nearest(train_codes: Rows, train_people: Rows, test_codes: Rows, test_people: Rows) -> float:
    """The share of test codes whose most alike training code is of the same person; of equals the first counts."""
    train, known = _unit(train_codes, train_people)
    test, truth = _unit(test_codes, test_people)
    inputs.same_factors(train, test)
    return float(np.mean(known[(test @ train.T).argmax(1)] == truth))


def one_shot(codes: Rows, people: Rows) -> float:
    """The accuracy of the most alike of one known picture a person, in the mean over all choices of the known ones.

    Exact, without drawing: with known picture g of its person, picture q is right with probability
    prod over other people p of the share of p's pictures that are less like q than g is (equally alike is wrong).
    Chance is 1 / people. Raises BadInput for fewer than two people, and where nobody has two pictures."""
    unit, who = _unit(codes, people)
    values, of_row, counts = np.unique(who, return_inverse=True, return_counts=True)
    if len(values) < 2 or counts.max() < 2:
        raise BadInput("one_shot needs two people, and somebody with two pictures")
    alike = unit @ unit.T
    member = (of_row[None, :] == np.arange(len(values))[:, None]).astype(np.float64)
    right = 0.0
    for q, person in enumerate(of_row):
        known = np.flatnonzero((of_row == person) & (np.arange(len(who)) != q))
        below = member @ (alike[q][:, None] < alike[q][None, known]) / counts[:, None]
        below[person] = 1.0
        right += float(below.prod(0).sum()) / counts[person]
    return right / (len(who) - len(values))


def top_purity(codes: Rows, people: Rows, top: int = 7) -> Array:
    """(r,) for each factor: of the `top` rows with the largest codes, the share of the person who is there most often.

    Rows at the factor's least value do not activate it and count for nobody. Not above
    min(top, pictures of a person) / top; compare with the same for shuffled people. Raises BadInput unless
    1 <= top <= n."""
    table = inputs.codes(codes)
    who = np.unique(inputs.labels(people, len(table), "people"), return_inverse=True)[1]
    if not 1 <= top <= len(table):
        raise BadInput(f"top is from 1 to the {len(table)} rows, got {top}")
    purity = np.zeros(table.shape[1])
    for k, column in enumerate(table.T):
        best = np.argsort(-column, kind="stable")[:top]
        active = best[column[best] > column.min()]
        purity[k] = np.bincount(who[active], minlength=1).max() / top
    return purity


def _unit(codes: Rows, people: Rows) -> tuple[Array, Array]:
    table = inputs.codes(codes)
    length = np.linalg.norm(table, axis=1, keepdims=True)
    return table / np.where(length > 0, length, 1.0), inputs.labels(people, len(table), "people")
