"""Train a network of thresholds, +1 or -1, by block-ADMM: `python examples/06_binary_activations.py`.

A sign has no derivative to speak of, so Adam refuses the network. Block-ADMM cuts it before and behind each sign: the
layers between the cuts learn by their own gradients, and the sign says by its proximal step which of its inputs should
move, and where to. The sign also runs at its full sharpness in training: there is no surrogate network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import piecework
from piecework import Adam, BlockADMM, CannotTrain, data, losses
from piecework.nn import Sign, Standardise


def network(set_: data.Dataset, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [Standardise(set_.mean, set_.scale)]
    for fan_in in [set_.num_features, *[width] * (depth - 1)]:
        layers += [nn.Linear(fan_in, width), nn.BatchNorm1d(width), Sign()]
    return nn.Sequential(*layers, nn.Linear(width, set_.num_outputs))


def main(words: Sequence[str] | None = None) -> float:
    """Train, and return the test accuracy."""
    parser = argparse.ArgumentParser(description="Train sign units on digits.")
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(words)
    digits = data.load("digits", validation=0.1)
    loss, batch_size = losses.Softmax(), 64
    steps = chosen.epochs * (len(digits.train) // batch_size)
    torch.manual_seed(chosen.seed)
    model = network(digits, chosen.width, chosen.depth)

    try:
        Adam().bind(model, loss)
    except CannotTrain as refusal:
        print(f"Adam: {refusal}")

    scores = {}
    for name, below in (("random hidden units, last layer trained", False), ("all layers trained", True)):
        torch.manual_seed(chosen.seed)
        model = network(digits, chosen.width, chosen.depth)
        model.requires_grad_(below)
        model[-1].requires_grad_(True)
        training = BlockADMM(lr=1e-2, schedule="cosine", schedule_steps=steps).bind(model, loss)
        history = piecework.fit(training, digits, loss=loss, steps=steps, batch_size=batch_size, seed=chosen.seed)
        scores[name] = history.rows[-1]["test"]["score"]
        print(f"{name}: test accuracy {scores[name]:.4f} after {history.rows[-1]['seconds']:.1f} s")

    with torch.no_grad():
        bits = nn.Sequential(*list(model.eval())[:-1])(digits.test.x[:1])
    print("what the last layer sees of the first test row:", "".join("-+"[int(bit > 0)] for bit in bits[0]))
    return float(scores["all layers trained"])


if __name__ == "__main__":
    main()
