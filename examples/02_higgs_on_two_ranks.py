"""Train on particle collisions with two processes, each with its half of the rows:

    torchrun --nproc-per-node 2 examples/02_higgs_on_two_ranks.py

HIGGS is looked for in $PIECEWORK_DATA and downloaded from OpenML otherwise; `--data breast_cancer` needs no file.
Without torchrun the same lines run in one process and find the same weights, but for rounding.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

import piecework
from piecework import data, losses
from piecework.group import launched
from piecework.models import mlp
from piecework.nn import Standardise


def main(words: Sequence[str] | None = None) -> float:
    """Train on all ranks, print on rank 0, and return the test accuracy of the deployed network."""
    options = argparse.ArgumentParser(description="Train on several ranks.")
    options.add_argument("--data", default="higgs")
    options.add_argument("--hidden", type=int, nargs="+", default=[300])
    options.add_argument("--sweeps", type=int, default=20)
    options.add_argument("--rows", type=int, help="use so many of the training rows")
    chosen = options.parse_args(words)

    with launched(timeout=300) as group:  # one rank without torchrun
        torch.set_num_threads(max(1, torch.get_num_threads() // group.size))
        # Every rank reads the set with the same seed, and `fit` gives each its share of the rows.
        rows = data.load(chosen.data, rows=chosen.rows, validation=0.1)
        network = mlp(rows.num_features, chosen.hidden, rows.num_outputs)
        model = nn.Sequential(OrderedDict(scaling=Standardise(rows.mean, rows.scale), network=network))

        loss = losses.Squared()
        training = piecework.ADMM().bind(model, loss, group=group)
        history = piecework.fit(training, rows, loss=loss, group=group, steps=chosen.sweeps, patience=5)

        summary = history.summary()
        if group.rank == 0:
            for row in history.rows:
                print(
                    f"sweep {row['step']:3}  {row['seconds']:6.2f} s  validation {row['validation']['score']:.4f}  "
                    f"test {row['test']['score']:.4f}  sent {row['bytes_sent']:,} bytes in {row['rounds']} rounds"
                )
            print(
                f"{group.size} ranks, {len(rows.train):,} rows: test {summary['score_name']} "
                f"{summary['test']['score']:.4f}; the bytes do not depend on the number of rows"
            )
        return float(summary["test"]["score"])


if __name__ == "__main__":
    main()
