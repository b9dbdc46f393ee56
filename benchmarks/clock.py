"""The virtual clock against measured seconds a step: `python benchmarks/clock.py --cache runs/clock.jsonl`.

Measured (level B): processes whose computation is emulated, with real messages over shaped links (`emulated.py`).
Predicted (level C): the programs of `piecework simulate`, with the same draws of stalls, and these constants, all of
them measured on something else than the cells:

- latency and bytes a second of a link: fitted to single messages between two ranks (`calibration.py`);
- bytes a second of all links together: the ranks share the cores of one machine, and these carry every message and
  work on it. From steps without shaping and with next to no computation (1 ms): what gossip, where every rank sends
  one message, takes more than ranks that send nothing;
- overhead: what a step of ranks that send nothing takes besides its computation (optimiser, Python, and the cores that
  the ranks share), with a seed that no cell has.

The step without messages is no cell, because the overhead comes from it. The number of DistributedDataParallel's
buckets is the one that it reports. Finished runs are kept in --cache, so that the command can be stopped and given
again; --cells N ends it after N new ones.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import report
from ad_psgd import ADPSGD
from calibration import Calibration, calibrate
from emulated import Pace, network
from emulated_runs import WARM_UP, Cell, Entry, run, sgd
from gossip_baselines import DPSGD, AllReduce, LocalSGD, Overlapped
from links import Links
from piecework import Gossip
from piecework.clock import Noise
from piecework.clock import scenario as clock

RANKS, SECONDS, STEPS = 8, 0.2, 24
NO_TIME = 1e-3
"""Seconds of computation in a step where the processor alone is to be measured."""
NOTHING = "no messages"
_SGD = sgd(0.02)


@dataclass(frozen=True)
class Method:
    """What is run, and what predicts it."""

    entry: Entry
    program: clock.Program


METHODS: dict[str, Method] = {
    NOTHING: Method(LocalSGD(optimizer=_SGD, every=None), clock.alone),
    "averaged gradients, overlapped (DDP, 1 MiB)": Method(
        Overlapped(optimizer=_SGD, bucket_cap_mb=1), clock.averaged_in_buckets
    ),
    "averaged gradients, afterwards": Method(AllReduce(optimizer=_SGD), clock.averaged_afterwards),
    "local SGD, every 8 steps": Method(
        LocalSGD(optimizer=_SGD, every=8), partial(clock.averaged_afterwards, every=8)
    ),
    "D-PSGD, pairs, meanwhile": Method(DPSGD(optimizer=_SGD), partial(clock.pairs, meanwhile=True)),
    "AD-PSGD": Method(ADPSGD(optimizer=_SGD), clock.pairs_when_they_come),
}  # fmt: skip
for _name, _settings in {
    "gossip, overlap 0": {"overlap": 0},
    "gossip, overlap 1": {"overlap": 1},
    "gossip, overlap 2, every 2": {"overlap": 2, "every": 2},
}.items():
    METHODS[_name] = Method(
        Gossip(optimizer=_SGD, **_settings),
        partial(clock.gossip, recipe=Gossip(**_settings)),  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Condition:
    rate_mbit: float | None = None
    noise: Noise = field(default_factory=partial(Noise, seed=1))


CONDITIONS: dict[str, Condition] = {
    "100 Mbit/s": Condition(100),
    "unshaped, stalls 1/8": Condition(noise=Noise(stalls=1 / RANKS, seed=1)),
    "1 Gbit/s": Condition(1000),
    "unshaped": Condition(),
    "unshaped, rank 3 takes twice as long": Condition(noise=Noise(slow_rank=3, seed=1)),
}


class Enough(Exception):
    """As many new cells as were asked for have been measured."""


class Cache:
    """What has been measured, one line each. Raises Enough for one more than is left."""

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._left = path, most
        lines = path.read_text().splitlines() if path.exists() else []
        self._known: dict[str, Any] = dict(json.loads(line) for line in lines)

    def get(self, key: str, measure: Any) -> Any:
        if key not in self._known:
            if self._left == 0:
                raise Enough
            self._left -= 1
            self._known[key] = measure()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps([key, self._known[key]]) + "\n")
            print(f"  {key}: {self._known[key]}", flush=True)
        return self._known[key]


def calibrated(rate_mbit: float | None, cache: Cache) -> Calibration:
    def measure() -> dict[str, Any]:
        with Links(RANKS, rate_mbit=rate_mbit) as links:
            found = calibrate(links)
        return vars(found)

    return Calibration(**cache.get(f"link {rate_mbit}", measure))


def measured(name: str, condition: Condition, cache: Cache, seconds: float = SECONDS) -> dict[str, float]:
    def measure() -> dict[str, float]:
        cell = Cell(
            entry=METHODS[name].entry, ranks=RANKS, rate_mbit=condition.rate_mbit, seconds=seconds, steps=STEPS,
            noise=condition.noise,
        )  # fmt: skip
        found = run(cell)
        return {"step_s": found.wall_s / STEPS, "rounds": found.rounds, "cpu_s": found.cpu_s, "busy": found.busy}

    key = f"{name} | {condition}" + ("" if seconds == SECONDS else f" | {seconds:g} s")
    return dict(cache.get(key, measure))


@dataclass(frozen=True)
class Constants:
    """What the clock is told about this machine; the links' own come with each rate."""

    switch_bytes_per_s: float
    overhead_s: float


def constants(cache: Cache) -> Constants:
    apart = Condition(noise=Noise(seed=77))
    nothing = measured(NOTHING, apart, cache)["step_s"]
    idle, sending = (measured(name, apart, cache, NO_TIME)["step_s"] for name in (NOTHING, "gossip, overlap 0"))
    return Constants(RANKS * model_bytes() / (sending - idle), max(0.0, nothing - SECONDS))


def model_bytes() -> int:
    return 4 * sum(parameter.numel() for parameter in network(Pace(0.0)).parameters())


def scenario_of(condition: Condition, found: dict[str, float], known: Constants, cache: Cache) -> clock.Scenario:
    link = calibrated(condition.rate_mbit, cache)
    return clock.Scenario(
        ranks=RANKS,
        model_bytes=model_bytes(),
        step_s=SECONDS,
        latency_s=link.latency_s,
        bytes_per_s=link.bytes_per_s,
        switch_bytes_per_s=known.switch_bytes_per_s,
        overhead_s=known.overhead_s,
        noise=condition.noise,
        num_buckets=max(1, round(found["rounds"])),
        steps=STEPS,
        warm_up=WARM_UP,
    )


def compared(known: Constants, cache: Cache, rows: list[list[object]], errors: list[float]) -> None:
    """Add a row a cell, and the errors; what was there when Enough is raised is right."""
    for where, condition in CONDITIONS.items():
        for name, method in METHODS.items():
            if name == NOTHING:
                continue
            found = measured(name, condition, cache)
            predicted = clock.seconds_a_step(method.program, scenario_of(condition, found, known, cache))
            errors.append(predicted / found["step_s"] - 1)
            rows.append([where, name, 1000 * found["step_s"], 1000 * predicted, f"{100 * errors[-1]:+.1f} %"])
    return rows, errors


def to_many(known: Constants, cache: Cache) -> list[list[object]]:
    """Predictions for machines of their own: no switch that they share, and the overhead of one."""
    link = calibrated(100, cache)
    rows: list[list[object]] = []
    for name, method in METHODS.items():
        row: list[object] = [name]
        for ranks in (8, 16, 32, 64, 128, 256):
            scenario = clock.Scenario(
                ranks=ranks, model_bytes=model_bytes(), step_s=SECONDS, latency_s=link.latency_s,
                bytes_per_s=link.bytes_per_s, steps=STEPS, warm_up=WARM_UP, num_buckets=4,
            )  # fmt: skip
            row.append(f"{1000 * clock.seconds_a_step(method.program, scenario):.0f}")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("runs/clock.jsonl"))
    parser.add_argument("--cells", type=int, default=-1, help="new ones at most; then give the command again")
    parser.add_argument("--dry", action="store_true", help="write no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if reason := Links.available():
        raise SystemExit(f"no shaped links here: {reason}")
    cache = Cache(arguments.cache, arguments.cells)
    known = constants(cache)
    rows: list[list[object]] = []
    errors: list[float] = []
    whole = True
    try:
        compared(known, cache, rows, errors)
    except Enough:
        whole = False
        print("these are the cells so far; give the command again for the rest")
    sizes = np.abs(errors)
    if arguments.dry or not whole:
        for row in rows:
            print(" | ".join(map(report.show, row)))
        if errors:
            print(f"mean error {100 * sizes.mean():.1f} %, largest {100 * sizes.max():.1f} %; {known}")
        return
    told = "; ".join(
        f"{name} latency {1000 * link.latency_s:.2f} ms and {link.bytes_per_s / 1e6:.1f} MB/s"
        for name, rate in (("unshaped", None), ("1 Gbit/s", 1000), ("100 Mbit/s", 100))
        for link in [calibrated(rate, cache)]
    )
    text = (
        f"Levels B (measured) and C (predicted). {RANKS} ranks, {model_bytes() / 1e6:.1f} MB, "
        f"{1000 * SECONDS:.0f} ms of emulated computation, {STEPS} steps a cell after {WARM_UP}; one seed, the same "
        f"draws in both. Links: {told}. All links together {known.switch_bytes_per_s / 1e9:.2f} GB/s; overhead "
        f"{1000 * known.overhead_s:.1f} ms a step."
    )
    summary = f"Mean error {100 * sizes.mean():.1f} %, largest {100 * sizes.max():.1f} %, of {len(errors)} cells."
    report.write(
        "clock",
        "The virtual clock against measured seconds a step",
        [
            (text, (), ()),
            (summary, ("condition", "method", "measured, ms", "predicted, ms", "error"), rows),
            (
                "Level C alone, milliseconds a step at 100 Mbit/s, each rank a machine of its own, without noise and "
                "overhead. Nothing here is measured.",
                ("method", "8 ranks", "16", "32", "64", "128", "256"),
                to_many(known, cache),
            ),
        ],
    )


if __name__ == "__main__":
    main()
