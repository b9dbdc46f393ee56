"""The rate of an ADMM sweep against the machine's best square sgemm in the same run: `python benchmarks/rate.py`.

Useful flops are counted as the method needs them, not as they are executed: a multiply-add is two, a Gram matrix only
its lower half, element-wise work nothing, a rejected trial nothing. Per row and pass, with widths d_0 ... d_L:
    directions  forward 2 d_l d_{l-1}, targets 2 d_l d_{l+1} a hidden layer, cross products 2 d_l d_{l-1}, hidden Grams
    line        forward, and a tangent from each layer up for the new move and for the previous one
    trial       forward, and the output layer's Gram d_{L-1}^2 and cross product 2 d_L d_{L-1}
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import torch

import report
from piecework import ADMM, Batch, losses
from piecework.models import mlp
from piecework.training import stream

WIDTHS = [28, 300, 1]


def forward(widths: list[int]) -> int:
    return sum(2 * a * b for a, b in pairwise(widths))


def useful(widths: list[int], acceleration: bool) -> int:
    """Useful flops a row of one accepted sweep of the squared loss, the Gram of the inputs known already."""
    layers = len(widths) - 1
    hidden = range(1, layers)
    directions = forward(widths) + sum(2 * widths[l] * widths[l + 1] + 2 * widths[l] * widths[l - 1] for l in hidden)
    directions += sum(widths[l] ** 2 for l in range(1, layers - 1)) + 2 * widths[-1] * widths[-2]
    tangents = sum(forward(widths[l - 1 :]) + 2 * widths[-1] * widths[-2] for l in hidden)
    line = forward(widths) + tangents * (2 if acceleration else 1)
    trial = forward(widths[:-1]) + widths[-2] ** 2 + 2 * widths[-1] * widths[-2]
    return directions + line + trial


def sgemm() -> float:
    """Flops a second of the best of several square products."""
    best = 0.0
    for n in (1024, 2048, 4096):
        a, b = torch.randn(n, n), torch.randn(n, n)
        for _ in range(4):
            began = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def measure(batch: Batch, acceleration: bool, sweeps: int) -> list[float]:
    """Useful flops a row, then medians over the sweeps and the best sgemm: the row of the table."""
    training = ADMM(acceleration=acceleration).bind(mlp(WIDTHS[0], WIDTHS[1:-1], WIDTHS[-1]), losses.named("squared"))
    training.step(batch)
    training.step(batch)
    flops, seconds, passes, peak = useful(WIDTHS, acceleration), [], [], sgemm()
    for _ in range(sweeps):
        began = time.perf_counter()
        passes.append(float(training.step(batch)["passes"]))
        seconds.append(time.perf_counter() - began)
    peak = max(peak, sgemm())
    rate, best = (flops * len(batch) / s for s in (report.median(seconds), min(seconds)))
    return [flops, report.median(passes), report.median(seconds), rate / 1e9, peak / 1e9, rate / peak, best / peak]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--sweeps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x = torch.randn(arguments.rows, WIDTHS[0], generator=stream(0))
    y = ((x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]) > 0).long()
    rows: list[list[object]] = []
    found: dict[str, list[list[float]]] = {"on": [], "off": []}
    for repeat in range(arguments.repeats):
        for acceleration, measured in found.items():
            measured.append(measure(Batch(x, y), acceleration == "on", arguments.sweeps))
            rows.append([repeat, acceleration, *measured[-1]])
    for acceleration, measured in found.items():
        medians = [report.median(list(column)) for column in zip(*measured, strict=True)]
        rows.append(["median", acceleration, *medians])
    header = [
        "repeat", "acceleration", "useful flops a row", "passes a sweep", "seconds a sweep", "Gflop/s", "sgemm Gflop/s",
        "ratio (median sweep)", "ratio (best sweep)",
    ]  # fmt: skip
    note = (
        f"28-300-1, {arguments.rows} rows in memory, float32, {arguments.sweeps} sweeps after two, on and off by "
        "turns; the best square sgemm is that of 1024, 2048 and 4096, before and after the sweeps."
    )
    report.write("rate", "The rate of one sweep", [(note, header, rows)])


if __name__ == "__main__":
    main()
