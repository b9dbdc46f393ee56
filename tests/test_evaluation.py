from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from piecework import evaluation, losses
from piecework.data import Dataset
from piecework.group import Group
from piecework.history import History
from piecework.testing import threads
from piecework.testing.check import classes, same, weights
from piecework.training import Batch
from plain_sgd import PlainSGD
from runs import SOFTMAX, network, train


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_is_the_same_in_any_tiles_and_on_any_ranks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = train(PlainSGD(full=True), steps=1)
    monkeypatch.setattr(evaluation, "TILE", 5)

    def work(group: Group) -> History:
        return train(PlainSGD(full=True), steps=1, group=group)[0]

    for history in threads(size, work):
        for part in ("train", "validation", "test"):
            assert history.rows[0][part]["loss"] == pytest.approx(whole.rows[0][part]["loss"], rel=1e-12)
            assert history.rows[0][part]["score"] == whole.rows[0][part]["score"]


def _regression(targets: Tensor) -> Dataset:
    x = torch.randn(len(targets), 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    part = Batch(x, targets)
    moments = {"target_mean": torch.zeros(targets.shape[1]), "target_scale": torch.ones(targets.shape[1])}
    return replace(classes(), train=part, validation=None, test=None, task="regression", classes=(), **moments)


def test_r2_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import r2_score

    generator = torch.Generator().manual_seed(7)
    targets = torch.randn(24, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.0]) + 1e6
    data, squared = _regression(targets), losses.named("squared")
    training = PlainSGD(lr=1e-3).bind(network(), squared)
    for rows in (slice(0, 24), slice(3, 8)):
        ours = evaluation.merged(
            [evaluation.sums(training.model, data.train, part, squared, "regression") for part in (rows, slice(0, 0))],
            "regression",
        )
        with torch.no_grad():
            z = training.model(data.train.x[rows])
        assert ours["score"] == pytest.approx(r2_score(targets[rows].numpy(), z.numpy()), rel=1e-9)


def test_r2_of_a_target_that_never_varies_is_that_of_scikit_learn() -> None:
    identity, squared = nn.Identity(), losses.named("squared")
    y = torch.full((5, 1), 3.0, dtype=torch.float64)
    for x, score in ((y, 1.0), (y + 1, 0.0)):
        sums = evaluation.sums(identity, Batch(x, y), slice(0, 5), squared, "regression")
        assert evaluation.merged([sums], "regression")["score"] == score


def test_an_output_that_is_not_finite_is_not_a_right_decision() -> None:
    x = torch.tensor([[1.0, 0, 0], [math.nan, 0, 0], [0, math.inf, 0]])
    sums = evaluation.sums(nn.Identity(), Batch(x, torch.tensor([0, 0, 1])), slice(0, 3), SOFTMAX, "multiclass")
    assert evaluation.merged([sums], "multiclass") == {"loss": None, "score": 1 / 3}


def test_evaluation_leaves_every_module_in_its_own_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.BatchNorm1d(7), nn.Linear(7, 3)).double()
    model[2].eval()
    before = weights(model)
    evaluation.sums(model, classes().train, slice(0, 24), SOFTMAX, "multiclass")
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert same(before, weights(model))
