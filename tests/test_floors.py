"""The floors of a comparison, against plain computations of the same thing."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from piecework import data, floors
from piecework.data import Dataset
from piecework.models import mlp
from piecework.nn import Standardise


def network(found: Dataset, *hidden: int, seed: int = 3) -> nn.Sequential:
    layers = mlp(found.num_features, hidden, found.num_outputs, activation="tanh", seed=seed, dtype=torch.float64)
    return nn.Sequential(OrderedDict(scaling=Standardise(found.mean, found.scale), network=layers))


def set_of(name: str, validation: float = 0.2) -> Dataset:
    return data.load(name, validation=validation, seed=1, dtype=torch.float64)


def standardised(found: Dataset, part: str) -> np.ndarray:
    x = getattr(found, part).x.double().flatten(1)
    return ((x - found.mean) / found.scale).numpy()


def closed_form(a: np.ndarray, y: np.ndarray) -> np.ndarray:
    """W = Y A^T (A A^T + rho I)^-1 as published, samples in columns, with an explicit inverse."""
    big_a = np.concatenate([a, np.ones((len(a), 1))], axis=1).T
    gram = big_a @ big_a.T
    rho = 1e-4 * np.trace(gram) / len(gram)
    return y.T @ big_a.T @ np.linalg.inv(gram + rho * np.eye(len(gram)))


def accuracy(found: Dataset, part: str, decided: np.ndarray) -> float:
    return float((decided == getattr(found, part).y.numpy()).mean())


@pytest.mark.parametrize("name", ["breast_cancer", "wine", "digits"])
def test_the_constant_floor_is_the_most_frequent_class(name: str) -> None:
    found = set_of(name)
    floor = floors.constant(found)
    most = int(np.bincount(found.train.y.numpy()).argmax())
    assert floor.name == "majority class"
    for part in ("train", "validation", "test"):
        assert floor.scores[part] == pytest.approx(accuracy(found, part, np.array(most)))


def test_the_constant_floor_of_numbers_is_their_mean() -> None:
    floor = floors.constant(set_of("diabetes"))
    assert floor.name == "mean"
    assert floor.scores["train"] == pytest.approx(0, abs=1e-12)
    assert floor.scores["test"] is not None
    assert floor.scores["test"] <= 0


@pytest.mark.parametrize("name", ["breast_cancer", "wine"])
def test_the_linear_floor_of_classes_is_scikit_learn_s(name: str) -> None:
    from sklearn.linear_model import LogisticRegression

    found = set_of(name)
    model = LogisticRegression(max_iter=floors.ITERATIONS).fit(standardised(found, "train"), found.train.y.numpy())
    floor = floors.linear(found)
    for part in ("train", "validation", "test"):
        assert floor.scores[part] == pytest.approx(accuracy(found, part, model.predict(standardised(found, part))))
    assert floor.parameters == model.coef_.size + model.intercept_.size


def test_the_linear_floor_of_numbers_is_ridge_regression() -> None:
    found = set_of("diabetes")
    w = closed_form(standardised(found, "train"), found.train.y.numpy())
    floor = floors.linear(found)
    for part in ("train", "test"):
        y = getattr(found, part).y.numpy()
        z = standardised(found, part) @ w[:, :-1].T + w[:, -1]
        assert floor.scores[part] == pytest.approx(1 - ((y - z) ** 2).sum() / ((y - y.mean()) ** 2).sum(), rel=1e-8)


@pytest.mark.parametrize(("name", "hidden"), [("digits", (5,)), ("wine", (24, 3)), ("breast_cancer", (7,))])
def test_random_features_are_the_closed_form_on_the_start(name: str, hidden: tuple[int, ...]) -> None:
    found = set_of(name)
    model = network(found, *hidden)
    floor = floors.random_features(found, model)
    assert floor is not None
    with torch.no_grad():
        features = {part: model[:1](getattr(found, part).x) for part in ("train", "test")}
        features = {part: model.network[:-1](a).numpy() for part, a in features.items()}
    y = found.train.y.numpy()
    targets = y[:, None].astype(float) if found.num_outputs == 1 else np.eye(found.num_outputs)[y]
    w = closed_form(features["train"], targets)
    for part, a in features.items():
        z = a @ w[:, :-1].T + w[:, -1]
        decided = (z[:, 0] > 0.5).astype(int) if found.num_outputs == 1 else z.argmax(1)
        assert floor.scores[part] == pytest.approx(accuracy(found, part, decided))


def test_random_features_leave_the_network_and_the_generator_alone() -> None:
    found = set_of("wine")
    model = network(found, 5)
    before = [parameter.clone() for parameter in model.parameters()]
    state = torch.random.get_rng_state()
    first = floors.random_features(found, model)
    again = floors.random_features(found, model)
    assert first is not None
    assert again is not None
    assert first.scores == again.scores
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_units_that_never_fire_do_not_break_the_closed_form() -> None:
    found = set_of("wine")
    model = network(found, 5)
    model.network[1] = nn.ReLU()
    with torch.no_grad():
        model.network[0].bias.fill_(-1e6)
    floor = floors.random_features(found, model)
    assert floor is not None
    assert floor.scores == pytest.approx(floors.constant(found).scores)


def test_a_network_without_a_hidden_layer_has_no_random_features() -> None:
    found = set_of("wine")
    assert floors.random_features(found, network(found)) is None
    ends_otherwise = nn.Sequential(nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 3), nn.LayerNorm(3))
    assert floors.random_features(found, ends_otherwise) is None


def test_long_tables_are_thinned_out_for_scikit_learn_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set_of("digits")
    monkeypatch.setattr(floors, "MOST", 64 * 120)
    floor = floors.linear(found)
    assert floor.note == "fitted on every 10th row"
    assert floor.scores["test"] is not None
    assert floor.scores["test"] > 0.8


def test_a_class_that_is_thinned_out_is_never_decided_for() -> None:
    weight, bias = torch.ones(1, 4, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    whole, shift = floors._for_all_classes(weight, bias, np.array([0, 2]), 3)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decided = (x @ whole.T + shift).argmax(1)
    assert torch.equal(decided, torch.where(x.sum(1) + 0.5 > 0, 2, 0))


def test_a_floor_s_summary_has_the_keys_of_a_run_s() -> None:
    found = set_of("wine", validation=0.0)
    summary = floors.constant(found).summary(found)
    keys = ["method", "data", "task", "rows", "ranks", "steps", "seconds", "stopped_by", "score_name", "train"]
    keys += ["validation", "test", "best_test_score", "bytes_sent", "rounds", "peak_memory_mb", "parameters"]
    assert set(keys) <= set(summary)
    assert summary["method"] == "floor: majority class"
    assert summary["validation"] is None
