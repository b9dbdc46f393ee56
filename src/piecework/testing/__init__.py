"""For tests of methods: ranks in threads or processes, faults on a schedule, and the laws every method keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .faults import Faults, Killed
from .ranks import processes, threads

if TYPE_CHECKING:
    from .check import Case, check_training

__all__ = ["Case", "Faults", "Killed", "check_training", "processes", "threads"]


def __getattr__(name: str) -> Any:
    # The laws need the loop, the data sets and the checkpoints; ranks and faults do not.
    if name in ("Case", "check_training"):
        from . import check

        return getattr(check, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
