"""Cartoon faces: exact pixels, balanced attributes, parts that do not overlap, and drawing that shows what it says.

tests/golden/data/cartoon.json keeps three pictures and a hash of a small set. They must come again bit for bit, with
any processor. A change that is meant to change them writes them anew, and says so in the changelog:

    python tests/test_cartoon.py"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from piecework.data import cartoon_drawing as drawing
from piecework.data.cartoon import SIGNS, cartoon_faces
from piecework.training import BadInput

GOLDEN = Path(__file__).with_name("golden") / "data" / "cartoon.json"
SMALL = {"tuples": 16, "held_out_tuples": 16, "images": (4, 2, 2), "unseen_images": 2}


def pixels() -> dict[str, object]:
    faces = cartoon_faces(seed=7, **SMALL)
    return {
        "pictures": {str(row): [bytes(line).hex() for line in faces.x[row]] for row in (0, 131, 263)},
        "all": hashlib.sha256(faces.x.tobytes()).hexdigest(),
        "attributes": hashlib.sha256(np.packbits(faces.attributes).tobytes()).hexdigest(),
    }


def plain(attributes, *, smile=0.0, shift=(0.0, 0.0)):
    """One picture of a middling shape in even light."""
    views = drawing.Views(
        shift=np.array([shift]),
        smile=np.array([smile]),
        gain=np.ones(1),
        slope=np.zeros((1, 2)),
        noise=np.zeros((1, 32, 32), dtype=np.int16),
    )
    shapes = np.array([[(low + high) / 2 for low, high in drawing.SHAPES.values()]])
    return drawing.draw(np.array([attributes], dtype=bool), shapes, views)[0].astype(int)


def test_the_pixels_are_those_of_the_last_release():
    assert pixels() == json.loads(GOLDEN.read_text())


def test_the_seed_decides_everything_and_no_global_state_does():
    before = torch.get_rng_state()
    np.random.seed(0)
    first, again, other = (cartoon_faces(seed=seed, **SMALL) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert np.random.random() == np.random.RandomState(0).random()
    assert np.array_equal(first.x, again.x)
    assert not np.array_equal(first.x, other.x)
    assert not np.array_equal(first.attributes, other.attributes)


def test_shapes_types_and_order_are_as_documented():
    faces = cartoon_faces(**SMALL)
    identities = 16 * 2 + 16 + 16 * 2
    assert faces.x.shape == (32 * 8 + 48 * 2, 32, 32)
    assert (faces.x.dtype, faces.identity.dtype) == (np.uint8, np.int64)
    assert faces.attributes.shape == (identities, 7) == (len(faces.held_out), len(faces.names))
    assert faces.shapes.shape == (identities, 12) == (identities, len(faces.shape_names))
    assert np.array_equal(faces.row_attributes[5], faces.attributes[faces.identity[5]])
    batch = faces.batch(faces.train, torch.float64)
    assert batch.x.dtype == torch.float64
    assert 0 <= batch.x.min() < batch.x.max() <= 1
    assert np.array_equal(batch.x.mul(255).round().numpy(), faces.x[faces.train])
    assert sorted(set(batch.y.tolist())) == list(range(faces.num_train_identities))


def test_parts_are_disjoint_and_complete_and_split_by_identity():
    faces = cartoon_faces(seed=1, **SMALL)
    parts = [faces.train, faces.validation, faces.test, faces.unseen]
    assert sorted(np.concatenate(parts)) == list(range(len(faces.x)))
    trained = set(range(faces.num_train_identities))
    for part, images in zip(parts[:3], (4, 2, 2), strict=True):
        assert np.bincount(faces.identity[part]).tolist() == [images] * len(trained)
    assert not trained & set(faces.identity[faces.unseen])


def test_an_identity_is_not_the_code_of_its_attributes():
    faces = cartoon_faces(seed=2)
    _, counts = np.unique(faces.attributes[: faces.num_train_identities], axis=0, return_counts=True)
    assert counts.tolist() == [2] * 64
    assert len(np.unique(faces.shapes, axis=0)) == len(faces.shapes)


@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_held_out_tuples_are_in_no_training_identity(correlation):
    faces = cartoon_faces(seed=3, correlation=correlation, **SMALL)
    seen = {tuple(row) for row in faces.attributes[: faces.num_train_identities]}
    unseen = faces.attributes[faces.num_train_identities :]
    held = faces.held_out[faces.num_train_identities :]
    assert held.sum() == 32
    assert not faces.held_out[: faces.num_train_identities].any()
    assert [tuple(row) in seen for row in unseen] == (~held).tolist()


@pytest.mark.parametrize("tuples", [16, 32, 64])
def test_any_three_attributes_have_their_eight_combinations_equally_often(tuples):
    faces = cartoon_faces(seed=tuples, tuples=tuples, held_out_tuples=tuples, images=(2, 0, 0), unseen_images=2)
    for some in (faces.attributes[: faces.num_train_identities], faces.attributes[faces.held_out]):
        for three in itertools.combinations(range(7), 3):
            counts = np.bincount(some[:, three] @ [4, 2, 1], minlength=8)
            assert counts.tolist() == [len(some) // 8] * 8


def test_the_correlated_setting_correlates_what_it_says():
    of_train, of_held = np.zeros((7, 7)), np.zeros((7, 7))
    for seed in range(5):
        faces = cartoon_faces(seed=seed, correlation=0.5, images=(2, 0, 0), unseen_images=2)
        of_train += np.corrcoef(faces.attributes[: faces.num_train_identities].T) / 5
        of_held += np.corrcoef(faces.attributes[faces.held_out].T) / 5
    signs = np.outer(SIGNS, SIGNS)
    off = ~np.eye(7, dtype=bool)
    assert np.abs((of_train * signs)[(signs != 0) & off] - 0.5).max() < 0.15
    assert np.abs(of_train[(signs == 0) & off]).max() < 0.15
    assert np.abs(of_held[off]).max() < 1e-12


def test_half_the_pictures_of_a_person_smile_in_every_part():
    faces = cartoon_faces(seed=5, **SMALL)
    for part in (faces.train, faces.validation, faces.test, faces.unseen):
        identity, smile = faces.identity[part], faces.smile[part]
        assert np.array_equal(2 * np.bincount(identity[smile]), np.bincount(identity))


@pytest.mark.parametrize("number", range(7))
def test_every_attribute_shows(number):
    rest = np.zeros(7, dtype=bool)
    with_it = rest.copy()
    with_it[number] = True
    changed = np.abs(plain(with_it) - plain(rest)) > 25
    assert changed.sum() >= 8
    rows = {"glasses": (10, 20), "hat": (0, 14), "beard": (15, 31), "thick brows": (9, 15), "earrings": (16, 26)}
    top, bottom = rows.get(drawing.ATTRIBUTES[number], (0, 31))
    assert changed[top : bottom + 1].sum() == changed.sum()


def test_a_face_is_symmetric_and_a_shift_moves_it():
    whole = plain(np.ones(7, dtype=bool))
    assert np.array_equal(whole, whole[:, ::-1])
    assert np.array_equal(plain(np.zeros(7), shift=(2, -1))[:31, 2:], plain(np.zeros(7))[1:, :-2])


def test_a_smile_changes_the_mouth_alone():
    changed = np.abs(plain(np.zeros(7), smile=1.0) - plain(np.zeros(7))) > 25
    assert 12 <= changed[18:27, 10:22].sum() == changed.sum()


def test_distances_agree_with_areas_counted_on_a_fine_grid():
    places = (np.arange(24) - 11.3).astype(np.float32)
    x, y = places[None, None, :], places[None, :, None]
    fine = (np.arange(24 * 16) + 0.5) / 16 - 0.5 - 11.3
    u, v = fine[None, :], fine[:, None]
    cases = [
        (drawing._disc(x, y, 5.3), u * u + v * v < 5.3**2),
        (drawing._ellipse(x, y, 7.5, 4.1), (u / 7.5) ** 2 + (v / 4.1) ** 2 < 1),
        (drawing._box(x, y, 6.2, 3.7, 0.0), (np.abs(u) < 6.2) & (np.abs(v) < 3.7)),
    ]
    for distance, inside in cases:
        cover = np.clip(0.5 - distance[0], 0, 1)
        exact = inside.reshape(24, 16, 24, 16).mean((1, 3))
        assert np.abs(cover - exact).max() < 0.3
        assert cover.sum() == pytest.approx(exact.sum(), rel=0.02)


def test_noise_and_light_vary_from_picture_to_picture():
    quiet, loud = (cartoon_faces(seed=6, noise=noise, **SMALL) for noise in (0, 8))
    difference = loud.x.astype(int) - quiet.x
    assert np.abs(difference).max() == 8
    dull = (quiet.x > 20) & (quiet.x < 230)
    assert difference[dull].std() == pytest.approx(np.sqrt(2 * (9**2 - 1) / 12), rel=0.02)
    assert abs(difference[dull].mean()) < 0.02
    assert quiet.x[:, 0, 0].std() > 10


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 0.5}, "seed is a whole number"),
        ({"tuples": 48}, "16, 32 or 64"),
        ({"held_out_tuples": 8}, "16, 32 or 64"),
        ({"identities_per_tuple": 1}, "at least 2"),
        ({"unseen_per_tuple": -1}, "unseen_per_tuple is a whole number"),
        ({"images": (3, 2, 2)}, "half of them smile"),
        ({"unseen_images": 5}, "half of them smile"),
        ({"correlation": 1.0}, "correlation is from 0 to below 1"),
        ({"noise": -1}, "noise is a whole number"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(BadInput, match=said):
        cartoon_faces(**settings)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(pixels(), indent=1) + "\n")
