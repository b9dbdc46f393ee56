"""`piecework methods` and `piecework data`: what there is."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from .options import DataListOptions, MethodListOptions
from .parse import parse
from .tables import PLAIN_WIDTH, console, table
from .train import first_line


def methods_command(argv: Sequence[str]) -> int:
    """`piecework methods`."""
    _nothing_more(MethodListOptions, argv, "piecework methods", "List the methods, what each is, and its settings.")
    from ..methods import METHODS

    rows = [(name, first_line(recipe), _settings(recipe)) for name, recipe in METHODS.items()]
    console().print(table(["method", "what it is", "settings"], rows, left=3, wrap=True))
    print("piecework fit METHOD --help explains the settings.")
    return 0


def _settings(recipe: Any) -> str:
    return ", ".join(one.name.replace("_", "-") for one in dataclasses.fields(recipe) if one.init)


def data_command(argv: Sequence[str]) -> int:
    """`piecework data`."""
    _nothing_more(DataListOptions, argv, "piecework data", "List the named data sets, and where they are found.")
    from ..data import catalogue

    entries = catalogue()
    indent = 2 + max(len(one.name) for one in entries)
    width = min(shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns, PLAIN_WIDTH)
    for one in entries:
        for line, text in enumerate((f"{one.what}; {one.size}", f"{one.origin}; {one.where}")):
            name = one.name if line == 0 else ""
            print(textwrap.fill(text, width, initial_indent=f"{name:{indent}}", subsequent_indent=" " * indent))
    print()
    print(
        "Also openml:NAME, any .csv or .parquet file with --target COLUMN, and any .npz file with arrays x and y\n"
        "(or x_train, y_train, x_test, y_test). Named sets are looked for in $PIECEWORK_DATA, the cache and the\n"
        "system's folders, and then downloaded from OpenML where it has them."
    )
    return 0


def _nothing_more(recipe: Any, argv: Sequence[str], usage: str, about: str) -> None:
    from ..training import BadInput

    _, standing = parse(recipe, argv, usage=usage, about=about)
    if standing:
        raise BadInput(f"{usage} takes nothing more, and was given {standing[0]}")
