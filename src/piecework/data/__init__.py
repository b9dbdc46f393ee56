"""Data sets by name or from files, read without running code, checked, split and described."""

from .assemble import assemble
from .cartoon import CartoonFaces, cartoon_faces
from .dataset import Dataset
from .load import load
from .named import Entry, catalogue
from .new_rows import for_prediction
from .source import Source

__all__ = [
    "CartoonFaces",
    "Dataset",
    "Entry",
    "Source",
    "assemble",
    "cartoon_faces",
    "catalogue",
    "for_prediction",
    "load",
]
