"""Data sets for the disentanglement benchmarks: a weak label to train on, attributes to ask for, and parts by seed.

Every choice (a setting, a method's rank, when to stop) is made on `validation`; `test` and `unseen` are for the report.

* digits: parity (or below five, or has a loop) is the label, the digit the attribute; 1097 / 200 / 500 rows.
* fashion: tops, trousers, dresses, footwear, bags are the label, the fine class the attribute. Only tops and footwear
  have more than one fine class; the others are left out of the attributes, not out of the rows.
* olivetti: the person is the label, and there are no attributes. 30 people with 7 training and 3 test pictures each,
  10 people unseen; reduced to 32 x 32 by means of 2 x 2 pixels. With 90 test pictures one split says little: use ten.
  Looked for in $PIECEWORK_DATA/olivetti/olivetti.npz (x uint8 (400, 64, 64), y (400,)).
* cartoon: the person is the label, seven attributes of people are known, and whether a picture smiles."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from piecework import data
from piecework.data.splits import ordering
from piecework.disentangle import one_hot

Array = NDArray[Any]

WEAK_DIGITS = {"parity": (1, 3, 5, 7, 9), "below five": (0, 1, 2, 3, 4), "has loop": (0, 6, 8, 9)}
"""The digits for which a weak label is 1."""
COARSE_FASHION = {"top": (0, 2, 4, 6), "trouser": (1,), "dress": (3,), "footwear": (5, 7, 9), "bag": (8,)}
DIGITS_ROWS = (1097, 200, 500)
_SPLIT = int.from_bytes(b"attributes", "big")


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one part. x: (n, d) float64 from 0 to 1; label: (n,) int64, what training may see; fine: (n,) int64, the
    digit, garment or person; attributes: (n, a) bool; groups: (n,) the coarse class within which attributes are
    scored, all 0 where the label is no coarse class of them; identity: (n,) whose rows are drawn together in a
    bootstrap (each row its own where there are no people); control: (n,) bool that no code should know, or None."""

    x: Array
    label: Array
    fine: Array
    attributes: Array
    groups: Array
    identity: Array
    control: Array | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class AttributeSet:
    """A data set in parts. shape: of a picture; names: of the attributes; unseen: people not trained on."""

    name: str
    shape: tuple[int, int]
    names: tuple[str, ...]
    train: Part
    validation: Part | None
    test: Part
    unseen: Part | None = None
    unseen_held_out: Array | None = None
    """(n,) bool, of the unseen rows: the person's combination of attributes is in no training row."""


def digits(seed: int, weak: str = "parity", *, test_seed: int | None = None) -> AttributeSet:
    """weak: a name of WEAK_DIGITS. test_seed: the test rows are those of this seed, whatever the seed of the others.

    Stratified by digit."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = ordering(len(bunch.target), bunch.target, seed if test_seed is None else test_seed, _SPLIT)
    if test_seed is not None:
        rest = order[: sum(DIGITS_ROWS[:2])]
        order[: len(rest)] = rest[ordering(len(rest), bunch.target[rest], seed, _SPLIT + 1)]
    parts = [
        _classes(bunch.data[rows] / 16, bunch.target[rows], [WEAK_DIGITS[weak]], range(10))
        for rows in np.split(order, np.cumsum(DIGITS_ROWS)[:-1])
    ]
    return AttributeSet(f"digits, {weak}", (8, 8), tuple(map(str, range(10))), *parts)


def fashion(seed: int, rows: int | None = None, test_rows: int | None = None) -> AttributeSet:
    """Fashion-MNIST, a sixth of the training rows for validation. rows, test_rows: fewer than the 60,000 and 10,000.

    Raises BadInput where the set cannot be found."""
    found = data.load("fashion-mnist", rows=rows, test_rows=test_rows, validation=1 / 6, seed=seed)
    coarse = list(COARSE_FASHION.values())
    scored = [k for fine in coarse if len(fine) > 1 for k in fine]
    batches = [batch for batch in (found.train, found.validation, found.test) if batch is not None]
    parts = [_classes(b.x.flatten(1).double().numpy() / 255, b.y.numpy(), coarse[1:], scored) for b in batches]
    return AttributeSet("fashion", (28, 28), tuple(found.classes[k] for k in scored), *parts)


def _classes(x: Array, fine: Array, ones: Any, scored: Any) -> Part:
    """label: k + 1 for the classes in ones[k], 0 for the rest."""
    label = np.zeros(len(fine), dtype=np.int64)
    for k, classes in enumerate(ones):
        label[np.isin(fine, classes)] = k + 1
    has = one_hot(fine, np.array(scored))
    return Part(x.astype(np.float64), label, fine.astype(np.int64), has, label, np.arange(len(x)))


def olivetti(seed: int, *, people: int = 30, images: int = 7, validation: int = 0) -> AttributeSet:
    """people: trained on, of 40; images: of the 10 of each for training, `validation` of them set aside for choices.

    Labels are renumbered: 0 .. people - 1 are trained on. Attributes are none (0 columns)."""
    x, y = _olivetti()
    order = ordering(40, None, seed, _SPLIT)
    who = np.argsort(order)[y]
    number = np.empty(len(y), dtype=np.int64)
    for person in range(40):
        rows = np.flatnonzero(who == person)
        number[rows] = ordering(len(rows), None, seed, _SPLIT + 1 + person)
    kept = images - validation

    def part(mask: Array) -> Part:
        none = np.zeros((mask.sum(), 0), dtype=bool)
        return Part(x[mask], who[mask], who[mask], none, np.zeros(mask.sum(), dtype=np.int64), who[mask])

    known = who < people
    return AttributeSet(
        "olivetti",
        (32, 32),
        (),
        part(known & (number < kept)),
        part(known & (number >= kept) & (number < images)) if validation else None,
        part(known & (number >= images)),
        part(~known),
    )


def _olivetti() -> tuple[Array, Array]:
    path = Path(os.environ.get("PIECEWORK_DATA", ".")) / "olivetti" / "olivetti.npz"
    if not path.is_file():
        raise SystemExit(f"there is no {path}; set PIECEWORK_DATA to the folder that has olivetti/olivetti.npz")
    with np.load(path, allow_pickle=False) as file:
        x, y = file["x"], file["y"]
    small = x.reshape(-1, 32, 2, 32, 2).mean((2, 4)) / 255
    return small.reshape(len(x), -1), y


def cartoon(seed: int, correlation: float = 0.0) -> AttributeSet:
    """Cartoon faces at their defaults; the control is the smile."""
    faces = data.cartoon_faces(seed=seed, correlation=correlation)

    def part(rows: Array) -> Part:
        who = faces.identity[rows]
        x = faces.x[rows].reshape(len(rows), -1) / 255
        return Part(x, who, who, faces.attributes[who], np.zeros_like(who), who, faces.smile[rows])

    parts = [part(rows) for rows in (faces.train, faces.validation, faces.test, faces.unseen)]
    held_out = faces.held_out[faces.identity[faces.unseen]]
    name = "cartoon" if correlation == 0 else f"cartoon, correlation {correlation:g}"
    return AttributeSet(name, (32, 32), faces.names, *parts, unseen_held_out=held_out)
