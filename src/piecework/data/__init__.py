"""Data sets by name or from files, read without running code, checked, split and described."""

from .assemble import assemble
from .dataset import Dataset
from .load import load
from .named import Entry, catalogue
from .new_rows import for_prediction
from .source import Source

__all__ = ["Dataset", "Entry", "Source", "assemble", "catalogue", "for_prediction", "load"]
