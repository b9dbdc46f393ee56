"""Bundled sets, splits, statistics and what a target means."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from piecework import data
from piecework.data import Source, assemble, scaling, splits, targets
from piecework.training import BadInput, Batch


def rows_of(batch: Batch) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for row in batch.x.flatten(1)}


@pytest.mark.parametrize(
    ("name", "task", "num_features", "num_outputs", "num_rows"),
    [
        ("digits", "multiclass", 64, 10, 1797),
        ("breast_cancer", "binary", 30, 1, 569),
        ("wine", "multiclass", 13, 3, 178),
        ("diabetes", "regression", 10, 1, 442),
    ],
)
def test_bundled_sets_are_always_there(name, task, num_features, num_outputs, num_rows):
    found = data.load(name)
    assert (found.name, found.task, found.num_features, found.num_outputs) == (name, task, num_features, num_outputs)
    assert found.validation is None
    assert found.test is not None
    assert len(found.test) == num_rows // 5
    assert len(found.train) + len(found.test) == num_rows
    assert found.train.x.dtype == found.mean.dtype == found.scale.dtype == torch.float32
    if task == "regression":
        assert found.train.y.shape == (len(found.train), 1)
        assert found.train.y.dtype == torch.float32
    else:
        assert found.train.y.shape == (len(found.train),)
        assert found.train.y.dtype == torch.int64
        assert sorted(set(found.train.y.tolist())) == list(range(len(found.classes)))


def test_class_labels_are_sorted_text():
    assert data.load("digits").classes == tuple("0123456789")
    assert data.load("breast_cancer").classes == ("benign", "malignant")


def test_digits_are_pictures_with_one_scale():
    digits = data.load("digits", dtype=torch.float64)
    assert digits.scale.unique().tolist() == [16.0]
    torch.testing.assert_close(digits.mean, digits.train.x.mean(0), rtol=1e-12, atol=1e-12)


def test_parts_are_disjoint_and_complete():
    whole = data.load("breast_cancer", dtype=torch.float64)
    parts = data.load("breast_cancer", dtype=torch.float64, validation=0.1)
    assert parts.validation is not None
    train, validation, test = (rows_of(part) for part in (parts.train, parts.validation, parts.test))
    assert not train & validation
    assert not (train | validation) & test
    assert train | validation == rows_of(whole.train)
    assert test == rows_of(whole.test)


def test_the_seed_decides_the_split():
    first, same, other = (data.load("wine", seed=seed, validation=0.2) for seed in (3, 3, 4))
    assert torch.equal(first.train.x, same.train.x)
    assert torch.equal(first.validation.x, same.validation.x)
    assert torch.equal(first.test.x, same.test.x)
    assert rows_of(first.test) != rows_of(other.test)


def test_rows_are_the_first_of_the_split():
    whole, few = data.load("digits", seed=5), data.load("digits", seed=5, rows=37, test_rows=11)
    assert torch.equal(few.train.x, whole.train.x[:37])
    assert torch.equal(few.test.x, whole.test.x[:11])
    torch.testing.assert_close(few.mean, whole.train.x[:37].mean(0))


def test_validation_rows_count_among_the_rows_asked_for():
    few = data.load("digits", rows=100, validation=0.1)
    assert (len(few.train), len(few.validation)) == (90, 10)


def test_statistics_leave_out_validation_and_test_rows():
    parts = data.load("diabetes", validation=0.25, dtype=torch.float64)
    torch.testing.assert_close(parts.mean, parts.train.x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.scale, parts.train.x.std(0, correction=0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.train.y.mean(0), torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.train.y.std(0, correction=0), torch.ones(1, dtype=torch.float64))
    raw = parts.validation.y * parts.target_scale + parts.target_mean
    assert torch.equal(raw.round(), raw.round(decimals=6))


def test_every_beginning_and_end_of_an_order_is_stratified():
    classes = np.repeat([0, 1, 2, 3], [500, 240, 24, 1])
    np.random.default_rng(0).shuffle(classes)
    order = splits.ordering(len(classes), classes, seed=7, key=1)
    assert sorted(order) == list(range(len(classes)))
    assert sorted(classes[order[:4]]) == [0, 1, 2, 3]
    for kept in (100, 300, 612, 700):
        counts = np.bincount(classes[order[:kept]], minlength=4)
        np.testing.assert_allclose(counts, np.bincount(classes) * kept / len(classes), atol=4)


def test_a_class_with_one_row_stays_in_the_training_rows():
    y = np.array([0] * 30 + [1] * 30 + [2])
    x = np.random.default_rng(1).normal(size=(61, 3))
    for seed in range(8):
        parts = assemble(Source(name="rare", x=x, y=y), task="multiclass", seed=seed, validation=0.2)
        assert parts.train.y.bincount(minlength=3).min() == 1


def test_an_own_test_set_is_kept_and_subsets_are_drawn_by_seed():
    random = np.random.default_rng(2)
    x, y = random.normal(size=(60, 3)), np.tile([0, 1], 30)
    source = Source(name="own", x=x, y=y, x_test=x[:24] + 9, y_test=y[:24])
    whole = assemble(source, dtype=torch.float64)
    np.testing.assert_array_equal(whole.train.x.numpy(), x)
    np.testing.assert_array_equal(whole.test.x.numpy(), x[:24] + 9)
    few = assemble(source, dtype=torch.float64, rows=10, test_rows=6, seed=1)
    assert rows_of(few.train) < rows_of(whole.train)
    assert rows_of(few.test) < rows_of(whole.test)
    assert few.train.y.bincount().tolist() == [5, 5]


@pytest.mark.parametrize(
    ("y", "task", "classes"),
    [
        (np.tile([0, 1], 6), "binary", ("0", "1")),
        (np.tile([7.0, -2.0, 3.0], 5), "multiclass", ("-2", "3", "7")),
        (np.tile([True, False], 3), "binary", ("False", "True")),
        (np.tile(["b", "a", "c"], 5), "multiclass", ("a", "b", "c")),
        (np.tile([b"b", b"a"], 5), "binary", ("a", "b")),
        (np.arange(24), "regression", ()),
        (np.linspace(0, 1, 24), "regression", ()),
        (np.repeat(np.arange(101), 6), "regression", ()),
        (np.random.default_rng(0).normal(size=(24, 3)), "regression", ()),
    ],
)
def test_the_task_is_inferred_and_said(y, task, classes):
    x = np.random.default_rng(0).normal(size=(len(y), 3))
    found = assemble(Source(name="inferred", x=x, y=y))
    assert (found.task, found.classes) == (task, classes)
    assert f": {task}" in found.note
    assert found.num_outputs == {"binary": 1, "multiclass": 3, "regression": 1 if y.ndim == 1 else 3}[task]


def test_classes_are_numbered_in_sorted_order():
    y = np.tile(["b", "a", "c"], 8)
    x = np.arange(24.0).reshape(24, 1)
    found = assemble(Source(name="letters", x=x, y=y), dtype=torch.float64)
    for part in (found.train, found.test):
        assert [found.classes[c] for c in part.y.tolist()] == [y[int(row)] for row in part.x[:, 0].tolist()]


def test_the_task_can_be_given():
    y = np.tile([0, 1], 12)
    source = Source(name="given", x=np.random.default_rng(0).normal(size=(24, 2)), y=y)
    assert assemble(source, task="multiclass").num_outputs == 2
    assert assemble(source, task="regression").classes == ()
    assert data.load("diabetes").note.startswith("regression")


@pytest.mark.parametrize(
    ("y", "task", "said"),
    [
        (np.tile([0, 1, 2], 8), "binary", "3 classes"),
        (np.tile(["a", "b"], 12), "regression", "holds labels"),
        (np.zeros(24), None, "is 0 in every row"),
        (np.zeros(24), "multiclass", "is 0 in every row"),
        (np.full(24, 0.5), None, "0.5 in every training row"),
        (np.linspace(0, 1, 24), "multiclass", "more than 12 different values"),
        (np.array([f"id{i}" for i in range(24)]), None, "more than 12 different values"),
        (np.zeros((24, 2)), "binary", "has 2 columns"),
    ],
)
def test_a_task_that_cannot_be_is_refused(y, task, said):
    source = Source(name="odd", x=np.random.default_rng(0).normal(size=(24, 2)), y=y)
    with pytest.raises(BadInput, match=said):
        assemble(source, task=task)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rows": 0}, "--rows must be"),
        ({"rows": True}, "--rows must be"),
        ({"test_rows": -1}, "--test-rows must be"),
        ({"rows": 5000}, "more than the 1438 training rows"),
        ({"test_rows": 5000}, "more than the 359 test rows"),
        ({"rows": 5}, "10 classes need at least as many training rows, and there are 5"),
        ({"validation": 1.0}, "--validation is a fraction"),
        ({"validation": float("nan")}, "--validation is a fraction"),
        ({"validation": 1e-6}, "0 to choose by"),
        ({"seed": 0.5}, "--seed must be"),
        ({"task": "ranking"}, "--task 'ranking'"),
        ({"dtype": torch.float16}, "--dtype must be"),
        ({"target": "class"}, "digits has its own target"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(BadInput, match=said) as refusal:
        data.load("digits", **settings)
    assert "\n" not in str(refusal.value)


def test_moments_agree_with_their_slow_twin_across_tiles(monkeypatch):
    monkeypatch.setattr("piecework.data.checks.TILE", 24)
    x = np.random.default_rng(3).normal(size=(101, 5)) * [1, 1e-3, 1e4, 1, 0] + [0, 1, -1e6, 1e9, 3.7]
    mean, spread = scaling.moments(x)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(spread, x.std(0), rtol=1e-9, atol=1e-13)  # numpy finds 7e-15 in a constant
    assert spread[4] == 0


def test_constant_columns_have_scale_one():
    x = np.random.default_rng(0).normal(size=(24, 3))
    x[:, 1] = 0.1
    x[::2, 2], x[1::2, 2] = 0.3, 0.1 + 0.2  # rounding errors of one value
    found = assemble(Source(name="constant", x=x, y=np.tile([0, 1], 12)))
    assert found.scale[1:].tolist() == [1.0, 1.0]


def test_a_column_that_float32_cannot_tell_from_its_mean_is_refused():
    x = np.random.default_rng(0).normal(size=(24, 2))
    x[:, 1] += 1.7e9
    source = Source(name="times", x=x, y=np.tile([0, 1], 12), feature_names=("a", "time"))
    with pytest.raises(BadInput, match=r"column 'time' varies by .* too little for float32; .*float64"):
        assemble(source)
    assert assemble(source, dtype=torch.float64).scale[1] < 2


def test_a_spread_that_cannot_be_held_is_refused():
    x = np.array([[1e200], [-1e200]] * 12)
    with pytest.raises(BadInput, match="too far apart"):
        assemble(Source(name="wide", x=x, y=np.tile([0, 1], 12)), dtype=torch.float64)


def test_bytes_stay_bytes():
    x = np.random.default_rng(0).integers(0, 256, size=(24, 5, 3), dtype=np.uint8)
    found = assemble(Source(name="bytes", x=x, y=np.tile([0, 1], 12), white=255.0))
    assert found.train.x.dtype == torch.uint8
    assert found.train.x.shape == (20, 5, 3)
    assert found.scale.tolist() == [255.0] * 15
    torch.testing.assert_close(found.mean, found.train.x.flatten(1).float().mean(0))


def test_arrays_that_cannot_be_written_are_copied():
    x, y = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32), np.arange(24) % 2
    for array in (x, y):
        array.flags.writeable = False
    found = assemble(Source(name="frozen", x=x, y=y, x_test=x, y_test=y))
    found.train.x.zero_()
    found.train.y.zero_()
    assert x.any()
    assert y.any()


def test_class_codes_that_are_in_order_are_not_copied():
    y = np.tile(np.arange(3), 8)
    assert np.shares_memory(targets.codes(y, np.arange(3)), y)


def test_a_data_set_that_does_not_fit_together_is_refused():
    wine = data.load("wine")
    for change in ({"scale": wine.scale[:3]}, {"classes": ()}, {"feature_names": ("a",)}):
        with pytest.raises(BadInput):
            dataclasses.replace(wine, **change)
