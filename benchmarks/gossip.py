"""Seconds to a loss with gossip and what it is compared with: `python benchmarks/gossip.py --scenario 100mbit`.

Level B: real processes, real sockets on links shaped by the kernel, a 5 MB network that is really trained; the heavy
kernels of its layers are sleeps (see `emulated.py`). Every method has SGD with momentum 0.9, the same start, shards and
order of rows for a seed; its learning rate comes from `gossip_rates.py`: the same rates tried for each, on seeds of
their own. Seconds are those of the last rank to have done the step at which the loss of the mean model was first low
enough; computing this loss is not in them. Runs alternate: all methods with a seed, then the next seed.

`--caps` tries DistributedDataParallel's bucket sizes. Finished runs are kept in --cache, so a
command can be stopped (or stop itself, after --minutes) and given again. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

import report
from emulated_runs import Cell, Outcome, run, sgd
from gossip_baselines import Overlapped
from gossip_cells import DDP, RATES, SCENARIOS, SEEDS, TARGET, Scenario
from links import Links

CAPS = (0.5, 1, 2, 25)


class Cache:
    """Outcomes of finished runs in a file of lines, one JSON object a run; a run that is there is not done again."""

    def __init__(self, path: Path, minutes: float | None) -> None:
        self._path = path
        self._until = None if minutes is None else time.monotonic() + 60 * minutes
        lines = path.read_text().splitlines() if path.exists() else []
        self._found: dict[str, Outcome] = {}
        for line in map(json.loads, lines):
            self._found[line["key"]] = Outcome(**line["outcome"])

    def outcome(self, key: str, cell: Cell) -> Outcome:
        """Raises SystemExit when the time is up."""
        key = f"{key}, {cell}"
        if key not in self._found:
            if self._until is not None and time.monotonic() > self._until:
                raise SystemExit("the minutes are over; what is finished is kept: give the command again")
            began = time.monotonic()
            self._found[key] = run(cell)
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "outcome": asdict(self._found[key])}) + "\n")
            print(f"{key}: {time.monotonic() - began:.0f} s", flush=True)
        return self._found[key]


def quartiles(values: Sequence[float | None], digits: int = 3) -> str:
    """Median and quartiles as text; a missing value (a target that was not reached) counts as infinite."""
    low, middle, high = np.percentile(
        [np.inf if one is None else one for one in values], (25, 50, 75), method="nearest"
    )
    missing = sum(one is None for one in values)
    told = "not reached" if np.isinf(middle) else f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return told + (f" ({missing} of {len(values)} not)" if missing else "")


def paired(own: Sequence[float | None], other: Sequence[float | None]) -> list[float | None]:
    """other / own, seed by seed: how many times as fast. 0 where own never came, None where other did not."""
    return [None if b is None else 0.0 if a is None else b / a for a, b in zip(own, other, strict=True)]


def header_of(scenario: Scenario) -> list[str]:
    after = f"loss after {scenario.steps} steps, above ddp's"
    return [
        "method", "level", "lr", f"seconds to a loss of {TARGET:g}", "times as fast as ddp", "steps to it",
        "milliseconds a step", "of these outside computing", "of these waiting", after,
        *([f"{after}, of the average that `sync` gives"] if scenario.slow_rank is not None else []),
        "distance of a rank from the mean", "push weights", "MB sent, a rank and step", "with headers, on the wire",
        "behind the emulated clock, ms at most", "cores busy",
    ]  # fmt: skip


def rows_of(scenario: Scenario, found: dict[str, list[Outcome]]) -> list[list[object]]:
    reached = {name: [one.reached(TARGET) for one in runs] for name, runs in found.items()}

    def of(name: str, what: str) -> list[float | None]:
        return [None if one is None else one[what] for one in reached[name]]

    rows: list[list[object]] = []
    for name, runs in found.items():
        gaps = {
            what: [own.curve[-1][what] - ddp.curve[-1][what] for own, ddp in zip(runs, found[DDP], strict=True)]
            for what in ("loss", "synced_loss")
            if what in runs[0].curve[-1]
        }
        weights = [one.weights for one in runs if one.weights]
        waiting = [one.blocked_s for one in runs if one.blocked_s is not None]
        wire = [one.wire_bytes for one in runs if one.wire_bytes is not None]
        rows.append([
            name, runs[0].level, RATES[name], quartiles(of(name, "seconds"), 2),
            quartiles(paired(of(name, "seconds"), of(DDP, "seconds")), 2), quartiles(of(name, "steps"), 1),
            quartiles([1e3 * one.step_s for one in runs], 0),
            float(np.median([1e3 * (one.step_s - one.computing_s) for one in runs])),
            float(np.median(waiting)) * 1e3 if waiting else None, *(quartiles(each, 4) for each in gaps.values()),
            float(np.median([one.curve[-1]["distance"] for one in runs])),
            f"{min(low for low, _ in weights):.3f} to {max(high for _, high in weights):.3f}" if weights else None,
            float(np.median([one.payload_bytes for one in runs])) / 1e6,
            float(np.median(wire)) / 1e6 if wire else None, 1e3 * max(one.late_s for one in runs),
            float(np.median([one.busy for one in runs])),
        ])  # fmt: skip
    return rows


def measure(name: str, cache: Cache, seeds: Sequence[int], methods: Sequence[str]) -> None:
    scenario = SCENARIOS[name]
    found: dict[str, list[Outcome]] = {method: [] for method in scenario.methods if method in methods or not methods}
    for seed in seeds:
        for method in found:
            found[method].append(cache.outcome(name, scenario.cell(method, seed)))
    note = (
        f"{scenario.about}; {scenario.seconds} s of computing a step, emulated; 1 252 170 parameters (5 MB); 8 rows a "
        f"rank and step, digits; seeds {', '.join(map(str, seeds))}, paired; medians, with quartiles in brackets. "
        "Level B: emulated compute, real processes and sockets, on links as at level A (network namespaces, token "
        "buckets). Waiting: as the method itself tells, where it does."
    )
    if scenario.slow_rank is not None:
        note += (
            " The slow rank still steps when the others are done: nothing comes to it any more, its push weight falls, "
            "and its own model moves far with each step. The mean of the ranks counts that in full; `sync` weighs."
        )
    if scenario.ranks > 8:
        note += f" With {scenario.ranks} ranks a step takes longer, so that 2 cores suffice for what is not emulated."
    report.write(
        f"gossip-{name}",
        f"Gossip, seconds to a loss: {scenario.about}",
        [(note, header_of(scenario), rows_of(scenario, found))],
    )


def caps(cache: Cache) -> None:
    """Milliseconds a step of DistributedDataParallel by link and bucket size."""
    rows: list[list[object]] = []
    for rate in (None, 1000.0, 100.0):
        found = []
        for cap in CAPS:
            entry = Overlapped(optimizer=sgd(0.01), bucket_cap_mb=cap)
            cell = Cell(entry=entry, ranks=8, rate_mbit=rate, seconds=0.2, steps=16)
            found.append(1e3 * cache.outcome(f"caps, {rate}", cell).step_s)
        rows.append([f"{rate:g} Mbit/s" if rate else "unshaped", *found])
    note = "8 ranks, 0.2 s of computing a step, emulated (level B); milliseconds a step, 16 steps, one seed"
    report.write(
        "gossip-caps", "DistributedDataParallel's buckets", [(note, ["link", *(f"{cap} MiB" for cap in CAPS)], rows)]
    )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--scenario", choices=SCENARIOS, action="append", default=[])
    words.add_argument("--methods", nargs="+", default=[], help=f"some of them, {DDP!r} among them; all if left out")
    words.add_argument("--caps", action="store_true")
    words.add_argument("--cache", type=Path, default=Path("gossip-runs.jsonl"))
    words.add_argument("--minutes", type=float, help="begin no further run after so long")
    words.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    chosen = words.parse_args()
    if (reason := Links.available()) and any(SCENARIOS[name].rate_mbit for name in chosen.scenario):
        raise SystemExit(
            f"no shaped links here: {reason}; `piecework simulate` gives such rows by the virtual clock, at level C"
        )
    cache = Cache(chosen.cache, chosen.minutes)
    if chosen.caps:
        caps(cache)
    for name in chosen.scenario:
        measure(name, cache, chosen.seeds, chosen.methods)


if __name__ == "__main__":
    main()
