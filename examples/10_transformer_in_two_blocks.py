"""A character transformer trained by two blocks that never wait for each other, alone or on two processes:

    python examples/10_transformer_in_two_blocks.py
    torchrun --standalone --nproc-per-node 2 examples/10_transformer_in_two_blocks.py

Each block has its own loss: the lower one guesses the next character from what it knows, by a small head of its own.
It sends its activations up at once and learns meanwhile; no derivative comes down. The trained network is the plain
one, and its first block with the head is a smaller model for free. Two processes give the bits of one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import piecework
from piecework import data, losses
from piecework.data import text
from piecework.evaluation import merged, sums
from piecework.group import launched
from piecework.models import transformer


def main(argv: Sequence[str] | None = None) -> float:
    """Train, say what was reached, and return the test loss in nats a character."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--text", help="a file to learn, in place of the data set shakespeare")
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--depth", type=int, default=4)
    options.add_argument("--context", type=int, default=128, help="characters of a window, with --text")
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--coupling", default="greedy", choices=["greedy", "overlap", "chunk", "interlock"])
    chosen = options.parse_args(argv)

    loss = losses.Softmax()
    rows = _rows(chosen.text, chosen.context)
    width, context = chosen.width, rows.num_features
    model = transformer(rows.num_outputs, width=width, depth=chosen.depth, heads=max(1, width // 32), context=context)
    with launched() as group:
        method = piecework.Local(blocks=2, coupling=chosen.coupling, lr=3e-3, weight_decay=0.01, every_head=True)
        training = method.bind(model, loss, group=group)
        piecework.fit(training, rows, loss=loss, group=group, steps=chosen.steps, batch_size=16)
        reached = [_test_loss(network, rows, loss) for network in training.exits()]
        if group.rank == 0:
            for number, one in enumerate(reached):
                print(f"{group.size} ranks, test loss behind block {number}: {one:.6f} nats a character")
    return reached[-1]


def _rows(path: str | None, context: int) -> data.Dataset:
    if path is None:
        return data.load("shakespeare")
    with open(path, encoding="utf-8") as file:
        source = text.windows(path, file.read(), context)
    return text.assemble(
        source, task=None, rows=None, test_rows=None, validation=0.0, seed=0, dtype=torch.get_default_dtype()
    )


def _test_loss(network: torch.nn.Module, rows: data.Dataset, loss: losses.Softmax) -> float:
    part = rows.test
    assert part is not None
    found = merged([sums(network, part, slice(0, len(part)), loss, rows.task)], rows.task)["loss"]
    assert found is not None
    return found


if __name__ == "__main__":
    main()
