"""Time to a loss on many ranks, gossip beside averaged gradients: `python benchmarks/gossip.py slow-links`.

Level: real processes and real messages over shaped links (network namespaces, token buckets); the computation is
emulated, so that many ranks compute at once on few cores: a rank sleeps through most of its step (`emulated.py`), and
trains an MLP of 5 MB on digits meanwhile. Other optimisers, other networks and other data would take other numbers of
steps; seconds a step do not depend on them.

The learning rate of each row is the one with the lowest training loss after as many steps as a run takes, on a seed of
its own (100), without emulated computation, over 127.0.0.1, four trials each. The loss is that of the average of the
ranks' models on the training rows, evaluated from copies after the clock has stopped. Seeds are paired: seed s has one
start and one order of rows for all entries. `ratio` is the seconds of averaged gradients by this row's, seed by seed.
`gap` is the loss after the last step, less that of averaged gradients.

Finished runs are kept in --cache, so that the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import report
from emulated import Cell, Entry, Outcome, run, sgd
from gossip_baselines import ADPSGD, DPSGD, LocalSGD, Overlapped
from links import Links
from piecework import Gossip
from piecework.clock import Noise

RATES = (0.01, 0.03, 0.1, 0.3)
DDP = "averaged gradients (DDP, buckets of 1 MiB)"
SNAPSHOT = 2


def gossip(lr: float, **settings: Any) -> Gossip:
    return Gossip(optimizer=sgd(lr), **settings)


ENTRIES: dict[str, Callable[[float], Entry]] = {
    DDP: lambda lr: Overlapped(optimizer=sgd(lr), bucket_cap_mb=1),
    "gossip, overlap 1": partial(gossip, overlap=1),
    "gossip, overlap 2, every 2": partial(gossip, overlap=2, every=2),
    "gossip, overlap 0": partial(gossip, overlap=0),
    "gossip, overlap 1, bfloat16": partial(gossip, overlap=1, wire="bfloat16"),
    "gossip, overlap 1, slow momentum": partial(gossip, overlap=1, slow_every=24, slow_momentum=0.3),
    "local SGD, every 8 steps": lambda lr: LocalSGD(optimizer=sgd(lr), every=8),
    "D-PSGD, pairs": lambda lr: DPSGD(optimizer=sgd(lr), graph="pairs"),
    "AD-PSGD": lambda lr: ADPSGD(optimizer=sgd(lr)),
    "no messages, averaged": lambda lr: LocalSGD(optimizer=sgd(lr), every=None),
}
MAIN = tuple(ENTRIES)[:3]


@dataclass(frozen=True)
class Scenario:
    about: str
    ranks: int = 8
    rate_mbit: float | None = None
    seconds: float = 0.2
    stalls: bool = False
    slow_rank: int | None = None

    def noise(self, seed: int) -> Noise:
        return Noise(stalls=1 / self.ranks if self.stalls else 0.0, slow_rank=self.slow_rank, seed=seed)


STALLS = "each step of a rank stalls for one step's time with probability 1/n"
SCENARIOS = {
    "slow-links": Scenario("links of 100 Mbit/s", rate_mbit=100),
    "gigabit": Scenario("links of 1 Gbit/s", rate_mbit=1000),
    "unshaped": Scenario("no shaping"),
    "stalls": Scenario(f"no shaping; {STALLS}", stalls=True),
    "slow-rank": Scenario("no shaping; rank 3 takes twice the time, for good", slow_rank=3),
    "slow-links-4": Scenario("links of 100 Mbit/s", ranks=4, rate_mbit=100),
    "stalls-4": Scenario(f"no shaping; {STALLS}", ranks=4, stalls=True),
    "slow-links-16": Scenario("links of 100 Mbit/s", ranks=16, rate_mbit=100, seconds=0.5),
    "stalls-16": Scenario(f"no shaping; {STALLS}", ranks=16, seconds=0.5, stalls=True),
}


class Cache:
    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._known: dict[str, dict[str, Any]] = dict(json.loads(line) for line in lines)

    def run(self, name: str, lr: float, cell: Cell) -> Outcome:
        parts = {**asdict(replace(cell, entry=None)), "name": name, "lr": lr}  # type: ignore[arg-type]
        key = json.dumps(parts, sort_keys=True)
        if key not in self._known:
            self._known[key] = asdict(run(cell))
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps([key, self._known[key]]) + "\n")
        found = Outcome(**self._known[key])
        print(
            f"  {name}, lr {lr:g}, seed {cell.seed}: {found.step_s:.3f} s a step, {found.cpu_s:.3f} s of processor, "
            f"loss {found.curve[-1]['loss']:.4f}",
            flush=True,
        )
        return found


def tuned(name: str, ranks: int, steps: int, cache: Cache) -> float:
    """The rate with the lowest loss at the end."""

    def loss(lr: float) -> float:
        cell = Cell(
            entry=ENTRIES[name](lr), ranks=ranks, rate_mbit=None, seconds=1e-3, steps=steps, seed=100,
            snapshot_every=steps,
        )  # fmt: skip
        found = cache.run(name, lr, cell).curve[-1]["loss"]
        return found if math.isfinite(found) else math.inf

    return min(RATES, key=loss)


def rows_of(scenario: Scenario, names: list[str], seeds: int, steps: int, target: float, cache: Cache) -> list[list]:
    rows: list[list[object]] = []
    base: list[Outcome] = []
    for name in names:
        lr = tuned(name, scenario.ranks, steps, cache)
        runs = []
        for seed in range(seeds):
            cell = Cell(
                entry=ENTRIES[name](lr), ranks=scenario.ranks, rate_mbit=scenario.rate_mbit, seconds=scenario.seconds,
                steps=steps, seed=seed, noise=scenario.noise(seed), snapshot_every=SNAPSHOT,
            )  # fmt: skip
            runs.append(cache.run(name, lr, cell))
        base = base or runs
        rows.append([name, f"{lr:g}", *_figures(runs, base, target)])
    return rows


def _figures(runs: list[Outcome], base: list[Outcome], target: float) -> list[object]:
    seconds = [one.seconds_to(target) for one in runs]
    theirs = [one.seconds_to(target) for one in base]
    ratios = [b / a for a, b in zip(seconds, theirs, strict=True) if a is not None and b is not None]
    steps_to = [next((p["step"] for p in one.curve if p["loss"] <= target), None) for one in runs]
    gaps = [one.curve[-1]["loss"] - other.curve[-1]["loss"] for one, other in zip(runs, base, strict=True)]
    return [
        report.spread([one.step_s for one in runs], 3),
        report.median([float(step) if step is not None else None for step in steps_to]),
        report.spread(seconds, 2),
        report.spread(ratios, 2) if ratios else None,
        report.spread(gaps, 4),
        report.median([one.curve[-1]["distance"] for one in runs]),
        report.median([one.curve[-1]["test_accuracy"] for one in runs]),
        report.median([one.payload_bytes for one in runs]),
        report.median([one.cpu_s for one in runs]),
        float(np.median([one.busy for one in runs])),
    ]


HEADER = [
    "entry", "lr", "s a step", "steps to it", "s to it", "ratio", "gap", "apart", "test accuracy",
    "bytes a rank and step", "processor s a step", "cores busy",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=list(SCENARIOS))
    parser.add_argument("--entries", nargs="+", default=list(ENTRIES), choices=list(ENTRIES), metavar="ENTRY")
    parser.add_argument("--short", action="store_true", help="the first three entries alone")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--target", type=float, default=0.2, help="training loss")
    parser.add_argument("--cache", type=Path)
    chosen = parser.parse_args()
    if reason := Links.available():
        raise SystemExit(f"no shaped links here: {reason}; `piecework simulate` has the same scenarios on its clock")
    torch.set_num_threads(1)
    scenario = SCENARIOS[chosen.scenario]
    names = list(MAIN) if chosen.short else chosen.entries
    rows = rows_of(scenario, names, chosen.seeds, chosen.steps, chosen.target, Cache(chosen.cache))
    text = (
        f"{scenario.ranks} ranks, {scenario.about}; real processes, emulated computation of {scenario.seconds:g} s a "
        f"step; 8 rows a rank and step, {chosen.steps} steps, SGD with momentum 0.9; a training loss of "
        f"{chosen.target:g} by the average model; {chosen.seeds} seeds (median and range)."
    )
    report.write(f"gossip-{chosen.scenario}", f"Gossip: {scenario.about}", [(text, HEADER, rows)])


if __name__ == "__main__":
    main()
