"""Learning gates of ADMM, in sweeps and never in seconds, with a control that must not pass them."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch

from chains import SQUARED, accuracy, bind, bundled, chain, held_out, quarters, scaled, sweeps
from piecework import data, losses
from piecework.training import Batch

DIGITS_GATE = 0.96
"""Test accuracy of 64-100-50-10 on digits."""


@cache
def _digits(seed: int, mode: str = "resynchronised") -> tuple[float, float]:
    """Test accuracy after the first sweep, and after thirty."""
    found = bundled("digits")
    model = scaled(found, [100, 50], seed=seed)
    training = bind(model, mode=mode, seed=seed)
    training.step(found.train)
    floor = accuracy(model, SQUARED, held_out(found))
    sweeps(training, found.train, 29)
    return floor, accuracy(model, SQUARED, held_out(found))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_digits_pass_the_gate_in_thirty_sweeps(seed: int) -> None:
    floor, reached = _digits(seed)
    assert reached >= DIGITS_GATE
    assert reached >= floor + 0.05


def test_the_published_algorithm_does_not_pass_the_gate() -> None:
    """The control: a gate that everything passes would show nothing."""
    _, reached = _digits(1, "taylor2016")
    assert reached < DIGITS_GATE - 0.1


@pytest.mark.skipif(
    "PIECEWORK_DATA" not in os.environ, reason="HIGGS is no bundled set; PIECEWORK_DATA names its place"
)
def test_higgs_passes_the_gate_in_thirty_sweeps() -> None:
    found = data.load("higgs", dtype=torch.float32)
    model = scaled(found, [300])
    training = bind(model)
    training.step(found.train)
    floor = reached = accuracy(model, SQUARED, held_out(found))
    assert floor >= 0.64
    for _ in range(29):
        training.step(found.train)
        reached = accuracy(model, SQUARED, held_out(found))
        if reached >= max(0.675, floor + 0.02):
            break
    assert reached >= 0.675
    assert reached >= floor + 0.02


@pytest.mark.parametrize("loss", ["squared", "hinge", "softmax"])
def test_every_loss_learns_digits(loss: str) -> None:
    found, kind = bundled("digits"), losses.named(loss)
    model = scaled(found, [50, 30])
    training = bind(model, kind)
    rows = sweeps(training, found.train, 1)
    floor = accuracy(model, kind, held_out(found))
    rows += sweeps(training, found.train, 14)
    reached = accuracy(model, kind, held_out(found))
    assert reached >= 0.95
    assert reached >= floor + 0.02
    assert rows[-1]["loss"] < 0.35 * rows[0]["loss"]


@pytest.mark.parametrize("loss", ["squared", "hinge", "logistic"])
def test_every_loss_learns_breast_cancer(loss: str) -> None:
    found, kind = bundled("breast_cancer"), losses.named(loss)
    model = scaled(found, [30])
    rows = sweeps(bind(model, kind), found.train, 20)
    assert accuracy(model, kind, held_out(found)) >= 0.92
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


# activation: the part of the first sweep's loss that thirty sweeps may leave
ACTIVATIONS = dict.fromkeys(("relu", "leaky-relu", "hard-sigmoid", "tanh", "sigmoid"), 0.7) | {"sign": 0.9}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(24,), (24, 13)])
def test_every_activation_learns_more_than_its_random_features(activation: str, hidden: tuple[int, ...]) -> None:
    batch = quarters(501)
    model = chain(5, *hidden, 4, activation=activation)
    rows = sweeps(bind(model), batch, 30)
    assert rows[-1]["loss"] < ACTIVATIONS[activation] * rows[0]["loss"]


def test_a_linear_network_learns_what_a_linear_map_can() -> None:
    found = bundled("digits", torch.float64)
    narrow = scaled(found, [20], activation="identity")
    rows = sweeps(bind(narrow, output_ridge=1e-6), found.train, 25)
    whole = sweeps(bind(scaled(found, []), output_ridge=1e-6), found.train, 1)
    assert rows[-1]["loss"] < 1.02 * whole[0]["loss"] < 0.8 * rows[0]["loss"]


def test_permuted_labels_teach_nothing() -> None:
    found = bundled("digits")
    generator = torch.Generator().manual_seed(3)
    shuffled = Batch(found.train.x, found.train.y[torch.randperm(len(found.train), generator=generator)])
    test = held_out(found)
    for mode in ("resynchronised", "taylor2016"):
        model = scaled(found, [50])
        sweeps(bind(model, mode=mode), shuffled, 10)
        majority = float(torch.bincount(test.y).max()) / len(test)
        assert accuracy(model, SQUARED, test) <= majority + 3 * (majority * (1 - majority) / len(test)) ** 0.5


def test_flips_acceleration_and_penalties_are_switches_that_leave_a_network_that_learns() -> None:
    batch = quarters(501)
    for settings in ({"flips": False}, {"acceleration": False}, {"gamma": 10.0}, {"gamma": 0.1, "beta": 0.1}):
        rows = sweeps(bind(chain(5, 24, 4), **settings), batch, 30)
        assert rows[-1]["loss"] < 0.7 * rows[0]["loss"], settings
