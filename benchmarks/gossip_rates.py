"""Learning rates for `gossip.py`: `python benchmarks/gossip_rates.py [METHOD ...]`.

Each method is run with the same rates on the same two seeds, which the timed runs do not have, on real processes with
a short emulated step, so that messages are as old as in those. Chosen is the rate with the fewest steps to the target,
on average; where a rate misses it with a seed, one that reaches it goes before; then the lower last loss. What was
chosen is kept beside the table, for `gossip.py`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import report
from emulated import Pace, network
from emulated_runs import EVALUATED, scaled
from gossip_cells import METHODS, RANKS, RATES_FILE, STEPS, TARGET, TRIED, TUNING_SEEDS
from piecework import Group, data
from piecework.batches import MiniBatches
from piecework.losses import named
from piecework.testing import processes

EVERY = 4
SECONDS = 0.1
"""Of a step."""


def losses(group: Group, *, method: str, steps: int) -> list[list[float]]:
    """Losses of the mean model every EVERY steps, for each rate and seed in turn."""
    return [_curve(group, method, lr, seed, steps) for lr in TRIED for seed in TUNING_SEEDS]


def _curve(group: Group, method: str, lr: float, seed: int, steps: int) -> list[float]:
    set_, loss = data.load("digits"), named("softmax")
    model, looked = network(Pace(SECONDS, rank=group.rank), seed=seed).train(), network(Pace(0.0)).eval()
    training = METHODS[method](lr).bind(model, loss, group=group)
    rows = scaled(set_, set_.train)
    batches = MiniBatches(rows, data="shard", rank=group.rank, size=group.size, batch_size=8, seed=seed)
    found = []
    for step in range(steps + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                vector = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
                group.sum_(vector)
                nn.utils.vector_to_parameters(vector.div_(group.size), looked.parameters())
                found.append(float(loss(looked(rows.x[:EVALUATED]), rows.y[:EVALUATED])))
        training.step(batches.batch(step))
    getattr(training, "close", lambda: None)()
    group.any(False)
    return found


def steps_to(curve: list[float], target: float) -> float:
    """On a line between two looks; infinite where the target is not reached."""
    for number, value in enumerate(curve):
        if value <= target:
            before = curve[number - 1] if number else value
            return EVERY * (number if before == value else number - (target - value) / (before - value))
    return float("inf")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("methods", nargs="*", help="all if none is named")
    words.add_argument("--cache", type=Path, default=Path("gossip-rates.jsonl"))
    words.add_argument("--target", type=float, default=TARGET)
    chosen = words.parse_args()
    kept = {}
    if chosen.cache.exists():
        kept = {line["key"]: line["curves"] for line in map(json.loads, chosen.cache.read_text().splitlines())}
    rows: list[list[object]] = []
    for method in chosen.methods or METHODS:
        key = f"{method}, {METHODS[method](0.0)}, {TRIED}, {TUNING_SEEDS}, {STEPS}"
        if key not in kept:
            job = partial(losses, method=method, steps=STEPS)
            kept[key] = processes(RANKS, job, timeout=600)[0]
            with chosen.cache.open("a") as file:
                file.write(json.dumps({"key": key, "curves": kept[key]}) + "\n")
        rows.append(_row(method, kept[key], chosen.target))
        print(rows[-1], flush=True)
        keep(method, float(str(rows[-1][1])))
    note = (
        f"{RANKS} ranks; mean steps to a loss of {chosen.target:g}, and the mean loss after {STEPS} steps; seeds "
        f"{', '.join(map(str, TUNING_SEEDS))}; steps of {SECONDS:g} s, emulated"
    )
    if not chosen.methods:
        header = ["method", "chosen", *(f"lr {lr:g}" for lr in TRIED)]
        report.write("gossip-rates", "Gossip: learning rates", [(note, header, rows)])


def keep(method: str, lr: float) -> None:
    known = json.loads(RATES_FILE.read_text()) if RATES_FILE.exists() else {}
    RATES_FILE.write_text(json.dumps(known | {method: lr}, indent=1) + "\n")


def _row(method: str, curves: list[list[float]], target: float) -> list[object]:
    num = len(TUNING_SEEDS)
    each = [curves[start : start + num] for start in range(0, len(curves), num)]
    steps = [float(np.mean([steps_to(curve, target) for curve in some])) for some in each]
    last = [float(np.mean([curve[-1] for curve in some])) for some in each]
    best = min(range(len(TRIED)), key=lambda index: (steps[index], last[index]))
    return [method, TRIED[best], *(f"{a:.1f}; {b:.4f}" for a, b in zip(steps, last, strict=True))]


if __name__ == "__main__":
    main()
