"""Communication of ADMM and of gradient all-reduce Adam on four ranks, HIGGS to a test accuracy of 0.68.

`python benchmarks/rounds.py`. The ranks are threads that exchange real messages in memory, so rounds and bytes are
exact and seconds are those of one machine. Adam's batch size is that of the whole group.
"""

from __future__ import annotations

import argparse

import torch

import piecework
import report
from piecework import ADMM, Adam, Group, data, losses
from piecework.testing import threads
from race import RACES, model

TARGET = 0.68
RANKS = 4


def reach(
    method: piecework.Method, loss: losses.Loss, set_: data.Dataset, seed: int, batch_size: int, limit: int
) -> list[float | None]:
    """Rounds, bytes, training seconds and samples at the first row with the target score."""

    def work(group: Group) -> list[float | None]:
        training = method.bind(model(set_, RACES["higgs"], seed), loss, group=group)
        every = 1 if isinstance(method, ADMM) else max(1, 4096 // batch_size)
        history = piecework.fit(
            training, set_, loss=loss, group=group, epochs=limit, batch_size=batch_size // RANKS, evaluate_every=every,
            seed=seed, on_row=lambda row: row["test"]["score"] >= TARGET,
        )  # fmt: skip
        last = history.rows[-1]
        if last["test"]["score"] < TARGET:
            return [None] * 4
        return [last["rounds"], last["bytes_sent"], last["seconds"], last["samples"]]

    return threads(RANKS, work, timeout=1200)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    set_ = data.load("higgs")
    entries = [("admm", ADMM(), losses.named("squared"), 4, 40)]
    for batch_size in (256, 1024, 4096, 16384):
        for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
            entries.append(
                (f"adam, batch {batch_size}, lr {lr:g}", Adam(lr=lr), losses.named("logistic"), batch_size, 30)
            )
    rows = []
    for name, method, loss, batch_size, limit in entries:
        found = [reach(method, loss, set_, seed, batch_size, limit) for seed in range(arguments.seeds)]
        rows.append([name, *(report.median([f[i] for f in found]) for i in range(4))])
        print(rows[-1], flush=True)
    reached = [row for row in rows[1:] if row[1] is not None]
    fastest, fewest = min(reached, key=lambda row: row[3]), min(reached, key=lambda row: row[1])
    ours = rows[0]
    summary = [
        [f"{kind}: {row[0]}", row[1], row[2], row[1] / ours[1], row[2] / ours[2]]
        for kind, row in (("fastest in seconds", fastest), ("fewest rounds", fewest))
    ]
    report.write(
        "rounds",
        f"Four ranks, HIGGS 28-300-1, to a test accuracy of {TARGET}",
        [
            (f"Seeds 0..{arguments.seeds - 1}, medians. A round is one message a rank takes part in; bytes are those "
             "one rank hands over; ADMM's count the trials of its step. Scored every sweep, and every "
             "batch or 4096 rows; of Adam's settings those are compared that reach the test accuracy first.",
             ["method", "rounds", "bytes", "seconds", "samples"], rows),
            ("Against ADMM", ["Adam", "rounds", "bytes", "rounds over ADMM's", "bytes over ADMM's"], summary),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
