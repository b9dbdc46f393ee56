"""ADMM on two processes of one thread against one process of one thread: `python benchmarks/ranks.py`."""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch

import report
from piecework import ADMM, Batch, Group, Solo, losses
from piecework.models import mlp
from piecework.testing import processes
from piecework.training import stream

ROWS, SWEEPS, REPEATS = 500_000, 5, 5


def sweeps(group: Group, *, apart: bool = False) -> dict[str, object]:
    """Seconds of each sweep on this rank's contiguous share of the rows, after two that warm up.

    apart: each rank trains a network of its own on its share and nothing is sent: what the machine's cores give."""
    torch.set_num_threads(1)
    x = torch.randn(ROWS, 28, generator=stream(0))
    y = ((x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]) > 0).long()
    share = slice(ROWS * group.rank // group.size, ROWS * (group.rank + 1) // group.size)
    batch = Batch(x[share].clone(), y[share].clone())
    training = ADMM().bind(mlp(28, [300], 1), losses.named("squared"), group=Solo() if apart else group)
    for _ in range(2):
        training.step(batch)
    seconds, passes = [], []
    for _ in range(SWEEPS):
        group.any(False)
        began = time.perf_counter()
        figures = training.step(batch)
        seconds.append(time.perf_counter() - began)
        passes.append(float(figures["passes"]))
    return {"seconds": sum(seconds), "passes": sum(passes), "loss": float(figures["loss"])}


def seconds_a_pass(ranks: list[dict[str, float]]) -> float:
    """Of the slower rank."""
    return max(rank["seconds"] / rank["passes"] for rank in ranks)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for repeat in range(REPEATS):
        one = processes(1, sweeps, timeout=600)
        two = processes(2, sweeps, timeout=600)
        apart = processes(2, partial(sweeps, apart=True), timeout=600)
        alone, together, limit = map(seconds_a_pass, (one, two, apart))
        difference = abs(one[0]["loss"] - two[0]["loss"])
        rows.append([repeat, alone, together, alone / together, limit, alone / limit, difference])
    ratios, limits = ([row[i] for row in rows] for i in (3, 5))
    rows.append(["median", None, None, report.median(ratios), None, report.median(limits), None])
    note = (
        f"28-300-1, {ROWS} rows, {SWEEPS} sweeps after two; real processes joined by gloo on one machine, a thread "
        "each; the slower rank counts. Two apart: each process trains a network of its own on half of the rows and "
        "sends nothing, which is what the two cores can give."
    )
    header = [
        "repeat", "seconds a pass, 1 process", "2 processes", "ratio", "2 apart", "ratio apart",
        "difference of the loss",
    ]  # fmt: skip
    report.write("ranks", "Two processes against one", [(note, header, rows)])


if __name__ == "__main__":
    main()
