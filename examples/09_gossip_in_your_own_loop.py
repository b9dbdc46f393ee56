"""Four ranks that push parts of their models to each other, around an optimiser and a loop of your own:

    torchrun --standalone --nproc-per-node 4 examples/09_gossip_in_your_own_loop.py

Each rank trains on its own rows and never waits for all others: after each `optimizer.step()` it sends half of what
it has to one peer, and adds what has come. Without torchrun it is the optimiser alone. A rank that is told to end
(SIGTERM) hands over what it has, and the others go on."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence

import torch
from torch import nn

import piecework
from piecework import data
from piecework.group import launched
from piecework.models import mlp


def main(argv: Sequence[str] | None = None) -> float:
    """Train, say what was reached, and return the test accuracy of the average of all ranks."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--overlap", type=int, default=1, help="steps that a message may be late")
    chosen = options.parse_args(argv)

    asked_to_leave = False

    def note(*_: object) -> None:
        nonlocal asked_to_leave
        asked_to_leave = True

    rows = data.load("digits")
    with launched(timeout=60) as group:
        torch.set_num_threads(1)
        if group.size > 1:
            signal.signal(signal.SIGTERM, note)
        x, y = (part[group.rank :: group.size] for part in (rows.train.x / 16, rows.train.y))  # this rank's rows
        model = mlp(64, [50], 10, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        gossip = piecework.Gossip(overlap=chosen.overlap).attach(model, optimizer, group=group)

        steps = len(rows.train.x) // group.size // 16  # equally many on every rank
        for epoch in range(chosen.epochs):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
            for step in range(steps):
                some = order[16 * step : 16 * (step + 1)]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[some]), y[some]).backward()
                optimizer.step()
            if asked_to_leave:
                gossip.leave()
                return 0.0

        with gossip.average():  # of all ranks, messages that are still under way included
            test = rows.test
            assert test is not None
            accuracy = float((model(test.x / 16).argmax(1) == test.y).float().mean())
        if group.rank == 0:
            print(f"{group.size} ranks, {chosen.epochs * steps} steps: test accuracy of the average {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
