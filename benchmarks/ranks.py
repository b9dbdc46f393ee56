"""ADMM on two processes of one thread against one process of one thread: `python benchmarks/ranks.py`."""

from __future__ import annotations

import argparse
import time

import torch

import report
from piecework import ADMM, Batch, Group, losses
from piecework.models import mlp
from piecework.testing import processes
from piecework.training import stream

ROWS, SWEEPS, REPEATS = 500_000, 5, 3


def sweeps(group: Group) -> dict[str, object]:
    """Seconds of each sweep on this rank's contiguous share of the rows, after two that warm up."""
    torch.set_num_threads(1)
    x = torch.randn(ROWS, 28, generator=stream(0))
    y = ((x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]) > 0).long()
    share = slice(ROWS * group.rank // group.size, ROWS * (group.rank + 1) // group.size)
    batch = Batch(x[share].clone(), y[share].clone())
    training = ADMM().bind(mlp(28, [300], 1), losses.named("squared"), group=group)
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for repeat in range(REPEATS):
        one = processes(1, sweeps, timeout=600)[0]
        two = processes(2, sweeps, timeout=600)
        slowest = max(r["seconds"] for r in two)
        alone, together = one["seconds"] / one["passes"], slowest / two[0]["passes"]
        rows.append([repeat, alone, together, alone / together, abs(one["loss"] - two[0]["loss"])])
    ratio = report.median([row[3] for row in rows])
    rows.append(["median", None, None, ratio, None])
    note = (
        f"28-300-1, {ROWS} rows, {SWEEPS} sweeps after two; real processes joined by gloo on one machine; the slower "
        "rank counts."
    )
    header = ["repeat", "seconds a pass, 1 process", "seconds a pass, 2 processes", "ratio", "difference of the loss"]
    report.write("ranks", "Two processes against one", [(note, header, rows)])


if __name__ == "__main__":
    main()
