"""A process that is killed at the n-th system call of a save, for every n: run by test_checkpoint.py.

    python killed_while_saving.py FOLDER

In FOLDER it makes one run folder a stage, called 000, 001, ...: a run of four steps, evaluated and saved at each, whose
third save is killed by SIGKILL before its n-th call that changes the disk (where the call writes, in the middle of
it). It prints the number of stages; the last of them is a run that nothing has killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from piecework import checkpoint, losses, storage
from piecework.checkpoint import RunFolder
from piecework.fit import fit
from piecework.models import mlp
from piecework.testing.check import classes
from plain_sgd import PlainSGD


class DeadlySystem:
    """The module `os`, except that the n-th call from now on that changes the disk ends the process."""

    def __init__(self, stage: int) -> None:
        self.left = stage

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        if name not in ("open", "write", "fsync", "replace", "close"):
            return call

        def deadly(*arguments: Any) -> Any:
            if self.left == 0:
                if name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            return call(*arguments)

        return deadly


def train(folder: Path, resume: bool = False, stage: int | None = None) -> None:
    """Four steps, patience and all; the third save is the deadly one."""
    model = mlp(5, [7], 3, activation="tanh", seed=1, dtype=torch.float64)
    loss = losses.named("softmax")
    run = RunFolder(folder, save_every=0.0)
    if not resume:
        run = RunFolder.create(folder, {"method": "plain-sgd"}, save_every=0.0)
    if stage is not None:
        save = run.save

        def deadly(*arguments: Any, **settings: Any) -> None:
            if run._number == 2:
                storage.os = DeadlySystem(stage)  # type: ignore[assignment]
            save(*arguments, **settings)
            if run._number == 3:
                storage.os = os

        run.save = deadly  # type: ignore[method-assign]
    settings: dict[str, Any] = {"steps": 4, "batch_size": 24, "seed": 3, "evaluate_every": 1, "patience": 20}
    fit(PlainSGD(lr=0.3).bind(model, loss), classes(), loss=loss, run=run, resume=resume, **settings)


def main(folder: Path) -> int:
    """The number of stages."""
    torch.set_num_threads(1)
    train(folder / "first")  # what is slow only once is then done for all children
    for stage in range(1000):
        child = os.fork()
        if child == 0:
            train(folder / f"{stage:03}", stage=stage)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return stage + 1
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("a save has no end")


if __name__ == "__main__":
    assert checkpoint.storage is storage
    print(main(Path(sys.argv[1])))
