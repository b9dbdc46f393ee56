"""Faults on a schedule: what goes wrong at which rank and step is an argument of the test."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


class Killed(BaseException):
    """The end of a rank that was killed; not an `Exception`, so that no code under test can go on after it."""


_thread = threading.local()


@contextmanager
def thread_rank() -> Iterator[None]:
    """Marks this thread as a rank: there `Faults.kill` ends the thread, and not the process."""
    _thread.is_rank = True
    try:
        yield
    finally:
        _thread.is_rank = False


@dataclass(frozen=True)
class _Fault:
    rank: int
    step: int
    what: str
    seconds: float = 0.0
    error: BaseException | None = None


@dataclass(frozen=True)
class Faults:
    """A schedule of faults; each verb gives a longer schedule, and `check` lets happen what is due.

        faults = Faults().kill(rank=1, step=2).delay(rank=0, step=1, seconds=0.2)

        def fn(group):
            for step in range(5):
                faults.check(group.rank, step)
                ...

    It holds no state: a fault happens whenever its rank checks its step, so a second run may meet it again.
    For `processes` it must be importable or bound to the function (`functools.partial(fn, faults=faults)`)."""

    schedule: tuple[_Fault, ...] = ()

    def kill(self, *, rank: int, step: int) -> Faults:
        """The rank dies without a word: a process by SIGKILL of itself, a thread by an exception that marks it dead."""
        return self._and(_Fault(rank, step, "kill"))

    def raise_at(self, *, rank: int, step: int, error: BaseException | None = None) -> Faults:
        """The rank raises the error, by default a `RuntimeError`."""
        return self._and(_Fault(rank, step, "raise", error=error or RuntimeError("a fault on schedule")))

    def delay(self, *, rank: int, step: int, seconds: float) -> Faults:
        """The rank sleeps."""
        return self._and(_Fault(rank, step, "delay", seconds=seconds))

    def check(self, rank: int, step: int) -> None:
        """To be called by every rank at every step; returns where nothing is due."""
        for fault in self.schedule:
            if (fault.rank, fault.step) != (rank, step):
                continue
            if fault.what == "delay":
                time.sleep(fault.seconds)
            elif fault.error is not None:
                raise fault.error
            else:
                _die(rank, step)

    def _and(self, fault: _Fault) -> Faults:
        return replace(self, schedule=(*self.schedule, fault))


def _die(rank: int, step: int) -> None:
    if getattr(_thread, "is_rank", False):
        raise Killed(f"rank {rank} was killed at step {step}")
    if multiprocessing.parent_process() is None:
        raise RuntimeError("Faults.kill would end the process of the tests; call check inside threads() or processes()")
    os.kill(os.getpid(), signal.SIGKILL)
