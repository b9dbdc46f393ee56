"""A change that claims not to change numbers proves it here.

tests/golden/NAME.json keeps the training losses of a few steps, and a hash of the weights after them. On the kind of
processor, and with the torch, that wrote them they must come again bit for bit; elsewhere, where matrix products round
otherwise, to 1e-9. A change that is meant to change numbers writes them anew, and says so in the changelog:

    python tests/test_golden.py"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from piecework import Group, losses
from piecework.fit import fit
from piecework.formats import model_bytes
from piecework.methods import ADMM, CG, LBFGS, METHODS, SGD, Adam, BlockADMM, DeepFacto, GaussNewton, Gossip, Local
from piecework.models import mlp
from piecework.testing import threads
from piecework.testing.check import classes
from piecework.training import Method

GOLDEN = Path(__file__).with_name("golden")

RECIPES: dict[str, Callable[[], Method]] = {
    "admm": ADMM,
    "sgd": SGD,
    "adam": partial(Adam, lr=0.03),
    "lbfgs": LBFGS,
    "cg": CG,
    "gauss-newton": GaussNewton,
    "block-admm": partial(BlockADMM, lr=0.03, sweeps=2, local_steps=2, alpha_beta=0.5, dual_step=0.5),
    "deepfacto": partial(DeepFacto, lr=0.03),
    "local": partial(Local, blocks=3, lr=0.03, coupling="overlap", heads="mlp", head_width=4),
    "gossip": partial(Gossip, lr=0.1, overlap=1, on_time=True),
}
RANKS = {"gossip": 3}


def _processor() -> str:
    """What decides how a matrix product rounds: the processor, and the instructions that torch uses on it."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else 'unknown'}, {torch.backends.cpu.get_cpu_capability()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _run(name: str) -> dict[str, Any]:
    return threads(RANKS.get(name, 1), partial(_on_a_rank, RECIPES[name]))[0]


def _on_a_rank(recipe: Callable[[], Method], group: Group) -> dict[str, Any]:
    method, loss = recipe(), losses.named("softmax")
    model = mlp(5, [7, 3], 3, factors=2 if isinstance(method, DeepFacto) else None, seed=1, dtype=torch.float64)
    training = method.bind(model, loss, group=group)
    history = fit(training, classes(), loss=loss, group=group, steps=5, batch_size=24, seed=3, evaluate_every=1)
    return {
        "torch": str(torch.__version__).split("+")[0],
        "processor": _processor(),
        "losses": history["train", "loss"],
        "weights": hashlib.sha256(model_bytes(model.state_dict())).hexdigest(),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_are_those_of_the_last_release(name: str) -> None:
    kept, found = json.loads((GOLDEN / f"{name}.json").read_text()), _run(name)
    if (kept["torch"], kept["processor"]) == (found["torch"], found["processor"]):
        assert found == kept
    assert found["losses"] == pytest.approx(kept["losses"], rel=1e-9)


def test_every_method_of_the_library_has_its_numbers() -> None:
    assert METHODS.keys() == RECIPES.keys() == {path.stem for path in GOLDEN.glob("*.json")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in RECIPES:
        (GOLDEN / f"{each}.json").write_text(json.dumps(_run(each), indent=1) + "\n")
