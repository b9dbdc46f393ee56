from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from piecework.checkpoint import RunFolder, load_into
from piecework.deploy import load, save
from piecework.group import Group
from piecework.models import mlp
from piecework.testing import threads
from piecework.testing.check import classes, same, weights
from piecework.training import BadInput
from plain_sgd import PlainSGD
from runs import MLP, SOFTMAX, scaled_network, scaled_training, train_scaled


def test_the_deployed_network_comes_back_from_its_folder(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"model": MLP})
    _, training = train_scaled(run)
    model = load(run.path)
    assert not model.training
    assert torch.equal(model(classes().train.x), training.model(classes().train.x))
    (run.path / "training.pt").unlink()
    assert same(weights(load(run.path)), weights(training.model))


def test_a_network_of_the_users_own_is_filled_and_gets_its_scaling_back(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"model": {"kind": "builder", "builder": "my.package:network"}})
    _, training = train_scaled(run)
    own = mlp(5, [7], 3, activation="tanh", seed=9, dtype=torch.float64)
    for model in (load(run.path, model=own), load(run.path, model=scaled_network())):
        assert torch.equal(model(classes().train.x), training.model(classes().train.x))
    with pytest.raises(BadInput, match=r"has 'network\.2\.weight' of shape \(3, 7\)"):
        load(run.path, model=mlp(5, [7, 7], 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"kind": "builder", "builder": "os:system"}, "is built by 'os:system', which is not imported"),
        ({"kind": "builder", "builder": "antigravity:fly"}, "is built by 'antigravity:fly', which is not imported"),
        (None, "is not one that piecework builds"),
        ("mlp", "is not one that piecework builds"),
        ({**MLP, "hidden": "7"}, "does not say the widths"),
        ({**MLP, "hidden": [-7]}, "does not say the widths"),
        ({**MLP, "hidden": [True]}, "does not say the widths"),
        ({**MLP, "hidden": [10**9, 10**9]}, "describes a larger network than model.safetensors holds"),
        ({**MLP, "activation": ["tanh"]}, "does not say the network's activation"),
        ({**MLP, "activation": "__import__"}, "no activation '__import__'"),
        ({**MLP, "dtype": "Tensor"}, "activation and dtype (float32"),
        ({**MLP, "hidden": [6]}, "has 'network.0.weight' of shape (7, 5)"),
    ],
)
def test_a_recipe_never_makes_load_import_or_allocate(folder: Path, model: Any, sentence: str) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({**recipe, "model": model}))
    RunFolder(folder).recipe  # noqa: B018  showing a run reads it too
    with pytest.raises(BadInput) as refusal:
        load(folder)
    assert sentence in str(refusal.value)
    assert "antigravity" not in sys.modules


def test_a_loop_of_ones_own_is_saved_and_taken_up_again(tmp_path: Path) -> None:
    data = classes()
    whole, parts = scaled_training(), scaled_training()
    for training, steps in ((whole, 5), (parts, 3)):
        for step in range(steps):
            training.step(data.train)
            if training is parts:
                save(training, tmp_path / "own", step=step + 1, recipe={"model": MLP})
    fresh = scaled_training()
    found = load_into(fresh, RunFolder(tmp_path / "own"))
    assert found.fit["step"] == 3
    for _ in range(2):
        fresh.step(data.train)
    assert same(weights(fresh.model), weights(whole.model))
    assert same(weights(load(tmp_path / "own")), weights(parts.model))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(BadInput, match="exists; give another folder"):
        save(fresh, tmp_path / "other")


def test_every_rank_keeps_a_state_of_its_own(tmp_path: Path) -> None:
    def keep(group: Group) -> None:
        training = PlainSGD(lr=0.3).bind(scaled_network(), SOFTMAX, group=group)
        training.velocity[0].fill_(group.rank + 1)
        save(training, tmp_path / "run", step=1, group=group)

    def take(group: Group) -> float:
        training = PlainSGD(lr=0.3).bind(scaled_network(), SOFTMAX, group=group)
        load_into(training, RunFolder(tmp_path / "run"), group=group)
        return float(training.velocity[0].mean())

    threads(3, keep)
    assert threads(3, take) == [1.0, 2.0, 3.0]
    with pytest.raises(BadInput, match=r"was trained on 3 rank\(s\) and cannot go on with 1"):
        load_into(scaled_training(), RunFolder(tmp_path / "run"))


def test_a_folder_that_rank_0_cannot_read_is_told_on_every_rank(folder: Path) -> None:
    (folder / "training.pt").write_bytes(b"garbage")

    def work(group: Group) -> str:
        with pytest.raises(BadInput) as refusal:
            RunFolder(folder).load(group)
        return str(refusal.value)

    said = threads(2, partial(work))
    assert said[0] == said[1]
    assert "training.pt is damaged" in said[0]
