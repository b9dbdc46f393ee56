"""What a reader found, before anything is inferred or split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..training import Task

Array = NDArray[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """Raw arrays and what is known about them. A memory-mapped `x` is never copied or permuted."""

    name: str
    x: Array
    """(n, ...) features."""
    y: Array
    """(n,) labels or numbers, or (n, k) numbers."""
    x_test: Array | None = None
    """(m, ...) features of the set's own test rows; None asks for a split."""
    y_test: Array | None = None
    task: Task | None = None
    """Known for named sets; None is inferred from `y`."""
    white: float | None = None
    """For pictures: the value of white, by which every pixel is divided."""
    characters: tuple[str, ...] = ()
    """For windows of text: what their codes stand for, in order."""
    feature_names: tuple[str, ...] = ()
    target_name: str | None = None
    test_is: str = "test rows of its own"
    """How the data set's note calls `x_test`."""
    remark: str = ""
    """One clause for the data set's note."""

    @property
    def arrays(self) -> list[tuple[Array, Array]]:
        """(x, y), and (x_test, y_test) behind it if the set has test rows of its own."""
        if self.x_test is None or self.y_test is None:
            return [(self.x, self.y)]
        return [(self.x, self.y), (self.x_test, self.y_test)]

    @property
    def targets(self) -> list[Array]:
        """y, and y_test behind it if the set has test rows of its own."""
        return [y for _, y in self.arrays]

    @property
    def mapped(self) -> bool:
        """Whether the training rows live in a file."""
        return is_mapped(self.x)


def is_mapped(array: Array | None) -> bool:
    """Whether the array's memory is a mapped file (slices of one are, too)."""
    return isinstance(array, np.memmap)
