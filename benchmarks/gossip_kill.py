"""The loss of gossip when one of 8 processes is killed on the way: `python benchmarks/gossip_kill.py digits`.

Each seed is trained thrice, with the same start and the same rows in the same order: undisturbed, undisturbed again
(with overlap messages are used when they come, so no two runs are alike), and with SIGKILL for one rank, at some moment
of a step between a third and a half of the way; rank, step and moment depend on the seed. The processes are plain ones,
and their store is in a process outside. The others go on with 7 batches a step instead of 8, and raise their weights at
the next evaluation; there is one an epoch. Losses are those of the average model on all training and all test rows,
after the last step.

`difference`: to the first undisturbed run of the same seed, as a part of its loss.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import piecework
import report
from piecework import Gossip, Group, data, losses
from piecework.models import mlp
from piecework.nn import Standardise
from piecework.testing import Killed, processes

RANKS = 8
STEPS, BATCH_SIZE, LR = {"digits": 300, "mnist": 600}, {"digits": 16, "mnist": 32}, 0.1


def fitted(group: Group, *, name: str, overlap: int, seed: int, die: bool) -> dict[str, Any]:
    """The last row of one rank's run, as `fit` tells it."""
    torch.set_num_threads(1)
    set_, loss, steps = data.load(name), losses.Softmax(), STEPS[name]
    model = nn.Sequential(
        Standardise(set_.mean, set_.scale), mlp(set_.num_features, (100,), set_.num_outputs, seed=seed)
    )
    recipe = Gossip(overlap=overlap, lr=LR, schedule="cosine", schedule_steps=steps)
    training = recipe.bind(model, loss, group=group)
    draw = random.Random(seed)
    who, when, delay = draw.randrange(RANKS), draw.randint(steps // 3, steps // 2), draw.uniform(0.0, 0.01)
    if die and group.rank == who:
        _kill_in_step(training, when, delay)
    every = len(set_.train) // (RANKS * BATCH_SIZE[name])
    history = piecework.fit(
        training, set_, loss=loss, steps=steps, batch_size=BATCH_SIZE[name], evaluate_every=every, seed=seed
    )
    last = history.rows[-1]
    return {
        "train": last["train"]["loss"],
        "test": last["test"]["loss"],
        "score": last["test"]["score"],
        "weights": last["weight_sum"],
        "alive": training.group.size,
        "step": last["step"],
    }


def _kill_in_step(training: Any, when: int, delay: float) -> None:
    ahead, done = training.step, iter(range(10**9))

    def step(batch: Any) -> Any:
        if next(done) == when:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return ahead(batch)

    training.step = step


def run(name: str, overlap: int, seed: int, die: bool) -> dict[str, Any]:
    work = partial(fitted, name=name, overlap=overlap, seed=seed, die=die)
    found = processes(RANKS, work, timeout=500, wait=60.0, outcomes=True)
    alive = [one for one in found if isinstance(one, dict)]
    dead = [one for one in found if isinstance(one, Killed)]
    if len(dead) != int(die) or len(alive) != RANKS - int(die):
        raise RuntimeError(f"{len(alive)} ranks have finished, {len(dead)} were killed: {found}")
    if any(one["step"] != STEPS[name] for one in alive):
        raise RuntimeError(f"not all steps were done: {alive}")
    return alive[0] | {"weights": max((one["weights"] for one in alive), key=lambda w: abs(w - len(alive)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=sorted(STEPS))
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=Path)
    chosen = parser.parse_args()
    lines = chosen.cache.read_text().splitlines() if chosen.cache is not None and chosen.cache.exists() else []
    known = dict(json.loads(line) for line in lines)

    def get(*what: Any) -> dict[str, Any]:
        key = json.dumps(what)
        if key not in known:
            overlap, seed, kind = what
            known[key] = run(chosen.data, overlap, seed, die=kind == "killed")
            print(key, known[key], flush=True)
            if chosen.cache is not None:
                with chosen.cache.open("a") as file:
                    file.write(json.dumps([key, known[key]]) + "\n")
        return dict(known[key])

    rows: list[list[object]] = []
    for overlap in chosen.overlaps:
        calm = [get(overlap, seed, "undisturbed") for seed in range(chosen.seeds)]
        for kind in ("undisturbed", "undisturbed again", "killed"):
            runs = [get(overlap, seed, kind) for seed in range(chosen.seeds)]
            cells: list[object] = [overlap, kind]
            for part in ("train", "test"):
                cells.append(report.spread([one[part] for one in runs]))
                parts = [100 * (one[part] / other[part] - 1) for one, other in zip(runs, calm, strict=True)]
                cells.append("-" if kind == "undisturbed" else report.spread(parts, 1))
            cells += [report.spread([one["score"] for one in runs]), runs[0]["alive"]]
            cells.append(max(abs(one["weights"] - one["alive"]) for one in runs))
            rows.append(cells)
    text = (
        f"{RANKS} processes, {STEPS[chosen.data]} steps of {BATCH_SIZE[chosen.data]} rows a rank, hidden (100,), SGD "
        f"with momentum 0.9, lr {LR} and a cosine schedule; {chosen.seeds} seeds (median and range)."
    )
    header = [
        "overlap", "run", "training loss", "difference, %", "test loss", "difference, %", "test accuracy",
        "alive at the end", "sum of the weights, off by",
    ]  # fmt: skip
    report.write(f"gossip-kill-{chosen.data}", f"Gossip with a rank killed, {chosen.data}", [(text, header, rows)])


if __name__ == "__main__":
    main()
