"""What `gossip.py` runs: methods with their tuned rates, and scenarios."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ad_psgd import ADPSGD
from emulated_runs import Cell, Entry, sgd
from gossip_baselines import DPSGD, LocalSGD, Overlapped
from piecework import Gossip
from piecework.clock import Noise

TARGET = 0.02
"""Loss on the fixed rows at which the clock is read; fixed before any timed run."""

STEPS = 80
"""Of every run with 8 ranks and more, so that all can be compared at equal steps."""

EVERY = 2
"""Steps between two looks at the loss."""

RANKS = 8
"""Of most scenarios, and of the tuning."""

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
TRIED = (0.005, 0.01, 0.02, 0.04)
"""Rates that each method was tuned over."""

DDP = "ddp"


def baseline(kind: Callable[..., Entry], **settings: Any) -> Callable[[float], Entry]:
    return lambda lr: kind(optimizer=sgd(lr), **settings)


METHODS: dict[str, Callable[[float], Entry]] = {
    DDP: baseline(Overlapped, bucket_cap_mb=1),
    "ddp, bfloat16 hook": baseline(Overlapped, bucket_cap_mb=1, wire="bfloat16"),
    "local sgd, 2 steps": baseline(LocalSGD, every=2),
    "local sgd, 8 steps": baseline(LocalSGD, every=8),
    "d-psgd": baseline(DPSGD),
    "ad-psgd, bound 1": baseline(ADPSGD),
    "sgp": baseline(Gossip, overlap=0),
    "sgp + slowmo": baseline(Gossip, overlap=0, slow_every=12, slow_momentum=0.4),
    "osgp 1": baseline(Gossip, overlap=1),
    "osgp 2, bfloat16 wire": baseline(Gossip, overlap=2, wire="bfloat16"),
    "osgp 1 + slowmo": baseline(Gossip, overlap=1, slow_every=12, slow_momentum=0.4),
    "osgp 2, a send every 2": baseline(Gossip, overlap=2, every=2),
    "osgp 4, a send every 2": baseline(Gossip, overlap=4, every=2),
    "osgp 2, a send every step": baseline(Gossip, overlap=2),
    "osgp 4, a send every step": baseline(Gossip, overlap=4),
    "biased osgp 1": baseline(Gossip, overlap=1, push_weight=False),
    "no communication": baseline(LocalSGD, every=None),
}
"""Each from a learning rate of SGD with momentum 0.9, local to the rank."""

RATES_FILE = Path(__file__).parent / "results" / "gossip-rates.json"
RATES: dict[str, float] = json.loads(RATES_FILE.read_text()) if RATES_FILE.exists() else {}
"""As `gossip_rates.py` has found them, on seeds of their own."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A table: the methods under one condition."""

    about: str
    methods: Sequence[str]
    ranks: int = 8
    rate_mbit: float | None = None
    seconds: float = 0.2
    stalls: float = 0.0
    slow_rank: int | None = None
    steps: int = STEPS

    def cell(self, method: str, seed: int) -> Cell:
        if method not in RATES:
            raise SystemExit(f"no learning rate for {method}; run: python benchmarks/gossip_rates.py '{method}'")
        return Cell(
            entry=METHODS[method](RATES[method]),
            ranks=self.ranks,
            rate_mbit=self.rate_mbit,
            seconds=self.seconds,
            steps=self.steps,
            noise=Noise(stalls=self.stalls, slow_rank=self.slow_rank, seed=seed),
            snapshot_every=EVERY,
            seed=seed,
        )


FEW = (DDP, "d-psgd", "sgp", "osgp 1", "osgp 2, a send every 2")
SLOW_LINKS = (DDP, "d-psgd", "osgp 1", "osgp 2, bfloat16 wire", "osgp 2, a send every 2", "osgp 4, a send every 2")
NOISY = (
    DDP, "local sgd, 8 steps", "d-psgd", "ad-psgd, bound 1", "sgp", "osgp 1", "osgp 2, a send every step",
    "osgp 4, a send every step", "no communication",
)  # fmt: skip
FOUR = partial(Scenario, ranks=4, steps=2 * STEPS)  # which see half the rows a step
SIXTEEN = partial(Scenario, ranks=16, seconds=0.4)
SCENARIOS: dict[str, Scenario] = {
    "100mbit": Scenario(
        about="8 ranks, 100 Mbit/s links",
        rate_mbit=100,
        methods=[name for name in METHODS if name not in ("osgp 2, a send every step", "osgp 4, a send every step")],
    ),
    "1gbit": Scenario(about="8 ranks, 1 Gbit/s links", rate_mbit=1000, methods=(*FEW, "osgp 2, a send every step")),
    "unshaped": Scenario(
        about="8 ranks, links as fast as the machine",
        methods=(
            *FEW,
            "osgp 2, a send every step",
            "local sgd, 8 steps",
            "ad-psgd, bound 1",
            "osgp 1 + slowmo",
            "no communication",
        ),
    ),
    "stalls": Scenario(
        about="8 ranks, unshaped links; each step of a rank stalls for a step's time with probability 1/8",
        methods=NOISY,
        stalls=1 / 8,
    ),
    "stalls-1gbit": Scenario(
        about="8 ranks, 1 Gbit/s links; each step of a rank stalls for a step's time with probability 1/8",
        methods=(DDP, "osgp 1", "osgp 2, a send every step", "osgp 4, a send every step"),
        rate_mbit=1000,
        stalls=1 / 8,
    ),
    "stalls-100mbit": Scenario(
        about="8 ranks, 100 Mbit/s links; each step of a rank stalls for a step's time with probability 1/8",
        methods=SLOW_LINKS,
        rate_mbit=100,
        stalls=1 / 8,
    ),
    "slow-rank": Scenario(
        about="8 ranks, unshaped links; rank 3 takes twice the time for each step",
        methods=(DDP, "ad-psgd, bound 1", "osgp 1", "osgp 4, a send every step", "no communication"),
        slow_rank=3,
    ),
    "4-ranks-100mbit": FOUR(about="4 ranks, 100 Mbit/s links", methods=SLOW_LINKS, rate_mbit=100),
    "4-ranks-stalls": FOUR(
        about="4 ranks, unshaped links; stalls with probability 1/4",
        methods=(DDP, "osgp 1", "osgp 4, a send every step"),
        stalls=1 / 4,
    ),
    "16-ranks-100mbit": SIXTEEN(about="16 ranks, 100 Mbit/s links", methods=SLOW_LINKS, rate_mbit=100),
    "16-ranks-stalls": SIXTEEN(
        about="16 ranks, unshaped links; stalls with probability 1/16",
        methods=(DDP, "osgp 1", "osgp 4, a send every step"),
        stalls=1 / 16,
    ),
}
