"""`piecework simulate`: how long a step would take on many ranks, by the virtual clock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import SimulateOptions
from .parse import parse

if TYPE_CHECKING:
    from ..clock.scenario import Scenario

SIMULATE = "piecework simulate [options]"
ABOUT = """Say how long a step takes on many ranks, for a model, links and computations of yours.

Ranks are threads on a virtual clock: messages take the time of the link that is given, and computations the time that
is given. Gossip's waiting is the library's own. Accuracy is no part of it: methods that wait less also mix less.
"""

Cells = dict[tuple[float, str, int], float]
"""Seconds a step by link rate, method and number of ranks."""


def simulate_command(argv: Sequence[str]) -> int:
    """`piecework simulate`."""
    chosen, standing = parse(SimulateOptions, argv, usage=SIMULATE, about=ABOUT)
    from ..training import BadInput

    if standing:
        raise BadInput(f"simulate takes options alone, and was given {standing[0]}")
    cells = _simulated(chosen)
    if chosen.json:
        told = [
            {"mbit": mbit, "method": method, "ranks": ranks, "seconds_a_step": seconds}
            for (mbit, method, ranks), seconds in cells.items()
        ]
        print(json.dumps(told, indent=1))
        return 0
    _print(chosen, cells)
    _draw(chosen, cells)
    return 0


def _simulated(chosen: SimulateOptions) -> Cells:
    from ..clock.scenario import PROGRAMS, seconds_a_step

    # All are made before the first is run: whatever is wrong with the numbers is said at once.
    scenarios = [(mbit, ranks, _scenario(chosen, mbit, ranks)) for mbit in chosen.mbit for ranks in chosen.ranks]
    return {
        (mbit, name, ranks): seconds_a_step(program, scenario)
        for mbit, ranks, scenario in scenarios
        for name, program in PROGRAMS.items()
    }


def _scenario(chosen: SimulateOptions, mbit: float, ranks: int) -> Scenario:
    from ..clock import Noise
    from ..clock.scenario import Scenario
    from ..training import BadInput

    bucket_mb = min(25.0, chosen.model_mb / 4) if chosen.bucket_mb is None else chosen.bucket_mb
    for name, value in (("mbit", mbit), ("bucket-mb", bucket_mb), ("model-mb", chosen.model_mb)):
        if not value > 0:
            raise BadInput(f"--{name} must be above 0, got {value:g}")
    noise = Noise(
        stalls=chosen.stalls,
        slow_rank=0 if chosen.slow != 1 else None,
        slowness=chosen.slow,
        spread=chosen.spread,
        seed=chosen.seed,
    )
    return Scenario(
        ranks=ranks,
        model_bytes=chosen.model_mb * 1e6,
        step_s=chosen.step_ms / 1e3,
        latency_s=chosen.latency_ms / 1e3,
        bytes_per_s=mbit * 1e6 / 8,
        noise=noise,
        num_buckets=max(1, round(chosen.model_mb / bucket_mb)),
        steps=chosen.steps,
    )


def _print(chosen: SimulateOptions, cells: Cells) -> None:
    from ..clock.scenario import BASELINE, PROGRAMS
    from .tables import console, table

    print(
        f"model    {chosen.model_mb:g} MB; a step computes {chosen.step_ms:g} ms; a message takes "
        f"{chosen.latency_ms:g} ms and its bytes{_troubles(chosen)}"
    )
    for mbit in chosen.mbit:
        headings = [f"{mbit:g} Mbit/s", *(f"{ranks} ranks" for ranks in chosen.ranks)]
        rows = []
        for name in PROGRAMS:
            row = [name]
            for ranks in chosen.ranks:
                seconds = cells[mbit, name, ranks]
                row.append(f"{1000 * seconds:,.0f} ms {cells[mbit, BASELINE, ranks] / seconds:5.2f} x")
            rows.append(row)
        console().print(table(headings, rows))
    print("x: steps in the time that averaged gradients with overlap take for one. This is a model, not a measurement:")
    print("no other traffic, no limit in the switch, no time for the processor's part of a message. On 8 real ranks it")
    print("was 5 % off on average, and up to 29 % too fast where gossip's overlapping messages fill the link.")
    if chosen.slow > 1:
        print("A rank that is slow for good sets everybody's pace, with gossip too: only passing stalls are hidden.")


def _troubles(chosen: SimulateOptions) -> str:
    found = [f"a rank stalls with probability {chosen.stalls:g}"] if chosen.stalls else []
    found += [f"one rank takes {chosen.slow:g} times as long"] if chosen.slow != 1 else []
    found += [f"times spread by {chosen.spread:g}"] if chosen.spread else []
    return "".join(f"; {one}" for one in found)


def _draw(chosen: SimulateOptions, cells: Cells) -> None:
    import io

    from .. import storage
    from ..clock.scenario import PROGRAMS
    from ..figures import lines

    panels = {
        f"{mbit:g} Mbit/s": {
            name: ([*chosen.ranks], [1000 * cells[mbit, name, ranks] for ranks in chosen.ranks]) for name in PROGRAMS
        }
        for mbit in chosen.mbit
    }
    picture = io.BytesIO()
    title = f"{chosen.model_mb:g} MB, {chosen.step_ms:g} ms of computation{_troubles(chosen)}"
    lines(panels, picture, x="ranks", y="milliseconds a step (virtual clock)", title=title)
    storage.replace_bytes(Path(chosen.out), picture.getvalue())
    print(f"figure   {chosen.out}")
