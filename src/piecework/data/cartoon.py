"""Cartoon faces: pictures of identities whose attributes are known, for telling whether a code disentangles them.

A person is a tuple of seven binary attributes (glasses, hat, beard, ...), the same in all pictures of the person, and a
continuous shape of its own (eye distance, nose, tones ...). At least two people share each tuple, so that an identity
is not the code of its attributes. Position, light and noise vary from picture to picture, and so does the smile:
it is no property of the person, a negative control that training on identities should suppress. Half the pictures of a
person in each part smile.

A network is to see identities alone; the attributes are for the score. What it makes of people it has never seen is
asked on the `unseen` rows, and among these of combinations of attributes that it has never seen (`held_out`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..training import BadInput, Batch, stream
from .cartoon_drawing import ATTRIBUTES, SHAPES, SIDE, Views, draw
from .source import Array

SIGNS = (0, 0, 1, -1, -1, 1, 1)
"""By ATTRIBUTES: which follow the common cause of the correlated setting, and with which sign."""
CHECKS = np.array([[1, 0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
"""Parity checks of the Hamming code, from which the tuples are taken."""
MAX_SHIFT = 2.0
"""Pixels that a face is moved at most, in each direction."""
GAIN, SLOPE = (0.8, 1.15), 0.25
"""Range of the factor on all tones, and what it gains or loses at most from the middle to an edge."""
_TUPLES, _SHAPE, _VIEW, _NOISE = 1, 2, 3, 4


@dataclass(frozen=True, eq=False)
class CartoonFaces:
    """Pictures, who is on them, and which rows train, choose and report. Rows are in the order of the identities."""

    x: Array
    """(n, 32, 32) uint8 grey levels."""
    identity: Array
    """(n,) int64; the training identities are 0 .. num_train_identities - 1, the unseen ones come after them."""
    smile: Array
    """(n,) bool: the negative control."""
    attributes: Array
    """(num_identities, 7) bool, by `names`."""
    shapes: Array
    """(num_identities, 12) float64: the continuous shape, by `shape_names`; lengths in pixels, tones from 0 to 1."""
    held_out: Array
    """(num_identities,) bool: an unseen identity whose tuple of attributes no training identity has."""
    num_train_identities: int
    train: Array
    """Row numbers, int64, as of the next three: pictures of the training identities."""
    validation: Array
    """Other pictures of the training identities, for every choice."""
    test: Array
    """Still others, to report."""
    unseen: Array
    """All pictures of the identities that are not trained on."""
    names: tuple[str, ...] = ATTRIBUTES
    shape_names: tuple[str, ...] = tuple(SHAPES)

    @property
    def row_attributes(self) -> Array:
        """(n, 7) bool: the attributes of the person on each picture."""
        rows: Array = self.attributes[self.identity]
        return rows

    def batch(self, rows: Array, dtype: torch.dtype = torch.float32) -> Batch:
        """These rows to train on: x (m, 32, 32) from 0 to 1, y the identities."""
        x: Tensor = torch.from_numpy(self.x[rows]).to(dtype) / 255
        return Batch(x, torch.from_numpy(self.identity[rows]))


def cartoon_faces(
    *,
    seed: int = 0,
    tuples: int = 64,
    identities_per_tuple: int = 2,
    unseen_per_tuple: int = 1,
    held_out_tuples: int = 32,
    images: tuple[int, int, int] = (12, 4, 4),
    unseen_images: int = 8,
    correlation: float = 0.0,
    noise: int = 8,
) -> CartoonFaces:
    """Draw a set; the seed decides everything, to the last pixel.

    tuples: combinations of attributes in training, each with `identities_per_tuple` (at least 2) training identities
    and `unseen_per_tuple` unseen ones. held_out_tuples: combinations that only unseen identities have, with
    `identities_per_tuple` each. images: pictures a training identity in the training, validation and test part;
    unseen_images: pictures an unseen identity; all even. noise: largest grey level of 255 added or taken away; the sum
    of two uniform whole numbers, standard deviation about 0.46 `noise`.

    With correlation 0 all tuples differ, and any three attributes have their eight combinations equally often, in
    training and among the held-out ones: no attribute tells anything about two others. With a correlation in (0, 1) a
    common cause makes beard, thick brows and wide face agree with each other and long hair and earrings with their
    opposite, each two with about this correlation; tuples of training then come as often as they are probable, while
    the held-out ones stay as they are: there a code that takes one attribute for another fails. Raises BadInput."""
    _refuse(seed, tuples, identities_per_tuple, unseen_per_tuple, held_out_tuples, images, unseen_images, correlation)
    if isinstance(noise, bool) or not isinstance(noise, int) or not 0 <= noise <= 127:
        raise BadInput(f"noise is a whole number of grey levels from 0 to 127, got {noise!r}")
    seen, held = _draw_tuples(seed, tuples, held_out_tuples, correlation)
    of_train = np.repeat(seen, identities_per_tuple)
    of_unseen = np.concatenate([np.repeat(seen, unseen_per_tuple), np.repeat(held, identities_per_tuple)])
    attributes = _bits(np.concatenate([of_train, of_unseen]))
    counts = np.repeat([sum(images), unseen_images], [len(of_train), len(of_unseen)])
    identity = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(identity)) - np.repeat(np.cumsum(counts) - counts, counts)
    smile = number % 2 == 0
    low, high = np.array(list(SHAPES.values())).T
    shapes = low + (high - low) * _uniform(seed, _SHAPE, len(counts), len(SHAPES))
    trained = identity < len(of_train)
    ends = np.cumsum(images)
    return CartoonFaces(
        x=draw(attributes[identity], shapes[identity], _views(seed, smile, noise)),
        identity=identity,
        smile=smile,
        attributes=attributes,
        shapes=shapes,
        held_out=np.arange(len(counts)) >= len(counts) - held_out_tuples * identities_per_tuple,
        num_train_identities=len(of_train),
        train=np.flatnonzero(trained & (number < ends[0])),
        validation=np.flatnonzero(trained & (number >= ends[0]) & (number < ends[1])),
        test=np.flatnonzero(trained & (number >= ends[1])),
        unseen=np.flatnonzero(~trained),
    )


def _refuse(
    seed: int,
    tuples: int,
    identities: int,
    unseen: int,
    held_out: int,
    images: tuple[int, int, int],
    unseen_images: int,
    correlation: float,
) -> None:
    whole = {"seed": seed, "tuples": tuples, "identities_per_tuple": identities, "unseen_per_tuple": unseen}
    for name, value in {**whole, "held_out_tuples": held_out}.items():
        if isinstance(value, bool) or not isinstance(value, int) or (value < 0 and name != "seed"):
            raise BadInput(f"{name} is a whole number, got {value!r}")
    if tuples not in (16, 32, 64) or held_out not in (0, 16, 32, 64):
        raise BadInput(
            f"tuples is 16, 32 or 64 and held_out_tuples 0, 16, 32 or 64, got {tuples} and {held_out}: "
            "only these can be balanced"
        )
    if identities < 2:
        raise BadInput(
            f"identities_per_tuple is {identities}; it must be at least 2, or an identity is its attributes' code"
        )
    if len(images) != 3 or images[0] < 2 or any(n < 0 or n % 2 for n in (*images, unseen_images)):
        raise BadInput(
            f"images is {images} and unseen_images {unseen_images}; they are even, so that half of them smile, "
            "images three numbers (training, validation, test) and the first at least 2"
        )
    if not 0 <= correlation < 1:
        raise BadInput(f"correlation is from 0 to below 1, got {correlation!r}")


def _draw_tuples(seed: int, seen: int, held_out: int, correlation: float) -> tuple[Array, Array]:
    """The tuples of training and the held-out ones, as numbers from 0 to 127 whose bits are the attributes.

    Both are cosets of linear codes between the Hamming code [7, 4] and the whole space. The words of its dual code all
    have weight 4, and so each coset is an orthogonal array of strength 3. The seed permutes the attributes and moves
    the cosets."""
    generator, everything = stream(seed, _TUPLES), np.arange(2 ** len(ATTRIBUTES))
    order = torch.randperm(len(ATTRIBUTES), generator=generator).numpy()
    moved = int(torch.randint(0, len(everything), (1,), generator=generator))
    syndrome = (_bits(everything ^ moved)[:, order] @ CHECKS.T % 2) @ np.array([4, 2, 1])
    held = everything[(syndrome >= 4) & (syndrome < 4 + held_out // 16)]
    if correlation == 0:
        return everything[syndrome < seen // 16], held
    rest = np.setdiff1d(everything, held)
    follow = np.sqrt(correlation) * np.array(SIGNS) * (2 * _bits(rest) - 1)
    weights = np.cumsum(np.prod(1 + follow, axis=1) + np.prod(1 - follow, axis=1))
    places = np.arange(seen) + float(torch.rand(1, generator=generator, dtype=torch.float64))
    return rest[np.searchsorted(weights / weights[-1], places / seen)], held


def _bits(numbers: Array) -> Array:
    bits: Array = (numbers[:, None] >> np.arange(len(ATTRIBUTES))) & 1 == 1
    return bits


def _views(seed: int, smile: Array, noise: int) -> Views:
    shift_x, shift_y, strength, gain, slope_x, slope_y = _uniform(seed, _VIEW, len(smile), 6).T
    generator, shape = stream(seed, _NOISE), (2, len(smile), SIDE, SIDE)
    halves = torch.randint(0, noise + 1, shape, generator=generator, dtype=torch.int16).numpy()
    return Views(
        shift=MAX_SHIFT * (2 * np.stack([shift_x, shift_y], axis=1) - 1),
        smile=smile * (0.7 + 0.3 * strength),
        gain=GAIN[0] + (GAIN[1] - GAIN[0]) * gain,
        slope=SLOPE * (2 * np.stack([slope_x, slope_y], axis=1) - 1),
        noise=halves.sum(0, dtype=np.int16) - np.int16(noise),
    )


def _uniform(seed: int, key: int, rows: int, columns: int) -> Array:
    """(rows, columns) multiples of 2^-20 from 0 to below 1."""
    whole = torch.randint(0, 1 << 20, (rows, columns), generator=stream(seed, key))
    numbers: Array = whole.numpy() / float(1 << 20)
    return numbers
