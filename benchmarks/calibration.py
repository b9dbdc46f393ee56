"""What the shaped links do, and the constants of a virtual clock: `python benchmarks/calibration.py`.

Two figures describe a link: a message of s bytes that is expected takes latency + s / bytes_per_s, from the call that
posts it to the return of the call that waits for it on the other side (one machine, so both read the same clock).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

import report
from links import Links
from piecework import Group

MODEL_BYTES = 5_000_000
SIZES = (4, 1_000, 300_000, 1_000_000, MODEL_BYTES)
"""None of a few frames: those pass in the token bucket's burst, faster than the link's rate."""


@dataclass(frozen=True)
class Calibration:
    """The constants of a link, fitted; and times of whole operations, measured, with 5 MB a rank."""

    ranks: int
    rate_mbit: float | None
    latency_s: float
    bytes_per_s: float
    worst_fit: float
    """Largest relative error of the two constants over the sizes."""
    exchange_s: float
    """Two ranks send each other 5 MB at the same time."""
    shift_s: float
    """Each rank sends 5 MB to the next and receives from the one before."""
    all_reduce_s: float
    all_reduce_small_s: float
    """A sum of one number over all ranks."""

    def message_s(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s

    def ring_s(self, num_bytes: float) -> float:
        """A ring all-reduce on this link, by the two constants."""
        rounds = 2 * (self.ranks - 1)
        return rounds * self.message_s(num_bytes / self.ranks)


def calibrate(links: Links, *, repeats: int = 7) -> Calibration:
    """Measure the links as they are shaped now. Needs at least two ranks, and that nothing else uses them."""
    ranks = links.run(partial(_measure, repeats=repeats), timeout=300)
    one_way = {size: float(np.median(ranks[1][f"one way {size}"])) for size in SIZES}
    latency, per_byte = fit(list(one_way), list(one_way.values()))
    errors = [abs(latency + size * per_byte - seconds) / seconds for size, seconds in one_way.items()]
    whole = {name: float(np.median([rank[name] for rank in ranks])) for name in ("exchange", "shift", "sum", "small")}
    return Calibration(
        links.n, links.rate_mbit, latency, 1 / per_byte, max(errors), whole["exchange"], whole["shift"],
        whole["sum"], whole["small"],
    )  # fmt: skip


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and seconds a byte that make the sum of the squared *relative* errors least."""
    t = np.asarray(seconds, float)
    rows = np.stack([1 / t, np.asarray(sizes, float) / t], axis=1)
    latency, per_byte = np.linalg.lstsq(rows, np.ones(len(t)), rcond=None)[0]
    return max(float(latency), 0.0), float(per_byte)


def _measure(group: Group, *, repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for size in SIZES:
        found[f"one way {size}"] = [_one_way(group, size) for _ in range(repeats)]
    for name, operation in (("exchange", _exchange), ("shift", _shift), ("sum", _sum), ("small", _small)):
        operation(group)  # connects
        found[name] = [_timed(group, operation) for _ in range(repeats)]
    return found


def _one_way(group: Group, size: int) -> float:
    """Seconds from rank 0's post to rank 1's receipt; 0 on the others."""
    message = torch.zeros(size, dtype=torch.uint8)
    posted = torch.zeros(1, dtype=torch.float64)
    group.any(False)
    if group.rank == 1:
        arriving = group.exchange({}, {0: message})
        arriving.wait()
        ended = time.monotonic()
        group.exchange({}, {0: posted}).wait()
        return ended - float(posted)
    if group.rank == 0:
        time.sleep(0.02)  # the receiver has posted by now
        posted[0] = time.monotonic()
        group.exchange({1: message}, {}).wait()
        group.exchange({1: posted}, {}).wait()
    return 0.0


def _timed(group: Group, operation) -> float:
    group.any(False)
    time.sleep(0.01)
    began = time.monotonic()
    operation(group)
    return time.monotonic() - began


def _floats() -> torch.Tensor:
    return torch.zeros(MODEL_BYTES // 4)


def _exchange(group: Group) -> None:
    """Of rank 0 and rank 1."""
    if group.rank < 2:
        group.exchange({1 - group.rank: _floats()}, {1 - group.rank: _floats()}).wait()
    group.any(False)


def _shift(group: Group) -> None:
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    group.exchange({after: _floats()}, {before: _floats()}).wait()


def _sum(group: Group) -> None:
    group.sum_(_floats())


def _small(group: Group) -> None:
    group.sum_(torch.zeros(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--congestion", default="reno")
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 1000, 0], help="Mbit/s; 0 for no shaping")
    arguments = parser.parse_args()
    if reason := Links.available():
        raise SystemExit(f"no shaped links here: {reason}")
    for n in arguments.ranks:
        for rate in arguments.rates:
            with Links(n, rate_mbit=rate or None, congestion=arguments.congestion) as links:
                found = calibrate(links)
                sent = links.num_bytes()
            line = {name: value for name, value in asdict(found).items() if name not in ("ranks", "rate_mbit")}
            print(f"{n} ranks, {f'{rate:g} Mbit/s' if rate else 'unshaped'}:", flush=True)
            print("  " + ", ".join(f"{name} {report.show(value)}" for name, value in line.items()))
            print(f"  ring all-reduce by the constants {found.ring_s(MODEL_BYTES):.4g}; bytes of rank 0 {sent[0]}")


if __name__ == "__main__":
    main()
