"""Train a network on pictures of digits without a gradient: `python examples/01_digits_without_gradients.py`.

With `--activation sign` the hidden units are thresholds: their derivative is zero wherever there is one, so no method
that goes by gradients can move the layers below them. The closed-form sub-problems of ADMM need no derivative.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import piecework
from piecework import data, losses
from piecework.models import ACTIVATIONS, mlp
from piecework.nn import Standardise


def show(row: dict[str, Any]) -> None:
    scores = "  ".join(f"{part} {row[part]['score']:.4f}" for part in ("train", "validation", "test"))
    print(f"sweep {row['step']:3}  {row['seconds']:6.2f} s  loss {row['train']['loss']:.4f}  {scores}")


def main(words: Sequence[str] | None = None) -> float:
    """Train, print a line a sweep, and return the test accuracy of the deployed network."""
    options = argparse.ArgumentParser(description="Train on digits without a gradient.")
    options.add_argument("--activation", choices=list(ACTIVATIONS), default="relu")
    options.add_argument("--hidden", type=int, nargs="+", default=[100, 50])
    options.add_argument("--sweeps", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args(words)

    digits = data.load("digits", validation=0.1, seed=chosen.seed)
    print(digits.note)
    network = mlp(
        digits.num_features, chosen.hidden, digits.num_outputs, activation=chosen.activation, seed=chosen.seed
    )
    model = nn.Sequential(OrderedDict(scaling=Standardise(digits.mean, digits.scale), network=network))

    loss = losses.Squared()
    training = piecework.ADMM().bind(model, loss)
    with torch.no_grad():  # backpropagation would fail in here
        history = piecework.fit(training, digits, loss=loss, steps=chosen.sweeps, patience=10, on_row=show)

    # The first sweep only fits the output layer on random hidden units: what came after it is what they have learnt.
    floor, best = history.rows[0], history.rows[history["step"].index(history.summary()["deployed_step"])]
    print(f"random hidden units {floor['test']['score']:.4f}, trained ones {best['test']['score']:.4f} (test accuracy)")
    return float(best["test"]["score"])


if __name__ == "__main__":
    main()
