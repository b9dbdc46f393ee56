"""A virtual clock: ranks that are threads, run one at a time in the order of a time that only their work and their
messages move. The update rules are the real ones; seconds are those of a link and of computations that are given."""

from .group import ClockGroup, on_a_clock
from .link import Link
from .noise import Noise

__all__ = ["ClockGroup", "Link", "Noise", "on_a_clock"]
