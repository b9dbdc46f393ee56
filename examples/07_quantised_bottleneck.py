"""Digits recognised through a bottleneck of few bits: `python examples/07_quantised_bottleneck.py`.

An encoder gives a few numbers, each is rounded to one of some levels, and what follows sees only those codes. Rounding
has no derivative: block-ADMM asks the quantiser which input would have served better, and trains the encoder towards
that. Beside it, as the floor, an encoder that stays random behind the same bottleneck.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import nn

import piecework
from piecework import BlockADMM, data, losses
from piecework.nn import Quantiser, Standardise


def network(set_: data.Dataset, codes: int, levels: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(encoder with its quantiser at the end, the whole network)."""
    scaling = Standardise(set_.mean, set_.scale)
    numbers = [nn.Linear(set_.num_features, 100), nn.ReLU(), nn.Linear(100, codes), nn.BatchNorm1d(codes)]
    encoder = nn.Sequential(scaling, *numbers, Quantiser(levels))
    return encoder, nn.Sequential(encoder, nn.Linear(codes, 100), nn.ReLU(), nn.Linear(100, set_.num_outputs))


def main(words: Sequence[str] | None = None) -> list[float]:
    """Train, and return the test accuracy through each bottleneck, with the trained encoder and the random one by
    turns."""
    parser = argparse.ArgumentParser(description="Quantised bottlenecks on digits.")
    parser.add_argument("--codes", type=int, default=6)
    parser.add_argument("--levels", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--epochs", type=int, default=30)
    chosen = parser.parse_args(words)
    digits, loss, batch_size = data.load("digits", validation=0.1), losses.Softmax(), 64
    assert digits.test is not None
    steps = chosen.epochs * (len(digits.train) // batch_size)
    scores = []
    print(f"{digits.num_features} pixels of 17 levels, {digits.num_features * math.log2(17):.0f} bits a picture")
    for levels in chosen.levels:
        for learns in (True, False):
            torch.manual_seed(0)
            encoder, model = network(digits, chosen.codes, levels)
            encoder.requires_grad_(learns)
            training = BlockADMM(lr=3e-3, schedule="cosine", schedule_steps=steps).bind(model, loss)
            history = piecework.fit(training, digits, loss=loss, steps=steps, batch_size=batch_size)
            scores.append(float(history.rows[-1]["test"]["score"]))
            bits, which = chosen.codes * math.log2(levels), "trained" if learns else "random"
            with torch.no_grad():
                used = len(encoder.eval()(digits.test.x).unique(dim=0))
            print(
                f"{chosen.codes} codes of {levels} levels, {bits:2.0f} bits, {which:7} encoder: "
                f"test accuracy {scores[-1]:.4f}, {used} different codes for {len(digits.test)} pictures"
            )
    return scores


if __name__ == "__main__":
    main()
