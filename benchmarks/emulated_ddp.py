"""DistributedDataParallel under emulated compute, against its cost model: `python benchmarks/emulated_ddp.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import report
from calibration import Calibration, calibrate
from emulated import FORWARD
from emulated_runs import Cell, Entry, run, sgd
from gossip_baselines import AllReduce, LocalSGD, Overlapped
from links import Links


def ideal_ddp(seconds: float, buckets: int, all_reduce: Callable[[float], float], num_bytes: float) -> float:
    """A step of DistributedDataParallel by the cost model: buckets of equal size are ready evenly over the backward
    pass, and each is summed at full rate when the one before it is through."""
    free = 0.0
    for number in range(1, buckets + 1):
        ready = seconds * (FORWARD + (1 - FORWARD) * number / buckets)
        free = max(free, ready) + all_reduce(num_bytes / buckets)
    return free


HEADER = (
    "Mbit/s", "seconds", "entry", "step", "by the cost model", "computing", "exposed", "cpu a rank", "cores busy",
    "late", "payload bytes", "wire bytes", "rounds",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 1000, 100], help="Mbit/s; 0 for no shaping")
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--caps", type=float, nargs="+", default=[0.5, 1, 2, 25], help="MiB of a bucket")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if reason := Links.available():
        raise SystemExit(f"no shaped links here: {reason}")
    optimizer = sgd(0.02)
    entries: list[tuple[str, Entry]] = [("no communication", LocalSGD(optimizer=optimizer, every=None))]
    entries += [("all-reduce after backward", AllReduce(optimizer=optimizer))]
    entries += [(f"ddp, {cap:g} MiB", Overlapped(optimizer=optimizer, bucket_cap_mb=cap)) for cap in arguments.caps]
    print(" | ".join(HEADER))
    for rate in arguments.rates:
        with Links(arguments.ranks, rate_mbit=rate or None) as links:
            constants = calibrate(links)
        for seconds in arguments.seconds:
            for name, entry in entries:
                cell = Cell(
                    entry=entry, ranks=arguments.ranks, rate_mbit=rate or None, seconds=seconds, steps=arguments.steps
                )
                print(" | ".join(map(report.show, [rate, seconds, name, *_row(cell, constants)])), flush=True)


def _row(cell: Cell, constants: Calibration) -> list[float | None]:
    found = run(cell)
    buckets = round(found.rounds)
    ideal = ideal_ddp(cell.seconds, buckets, constants.ring_s, found.payload_bytes) if buckets else cell.seconds
    return [
        found.step_s, ideal, found.computing_s, found.step_s - found.computing_s, found.cpu_s, found.busy,
        found.late_s, found.payload_bytes, found.wire_bytes, found.rounds,
    ]  # fmt: skip


if __name__ == "__main__":
    main()
