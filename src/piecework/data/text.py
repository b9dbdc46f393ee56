"""Text as rows: windows of characters, and for each character the one that follows it."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..training import BadInput, Batch, Task
from .dataset import Dataset
from .source import Array, Source
from .splits import Rows, split, take

CONTEXT = 128
"""Characters of a window."""

HELD_OUT = 10
"""One part in so many, the last, is the test text."""


def read(name: str, paths: Sequence[Path]) -> Source:
    """The windows of a text file, plain or with .gz. Raises BadInput for one that is not text or too short."""
    path = paths[0]
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            text = file.read().decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no whole text in UTF-8 ({str(error)[:80]})") from None
    return windows(name, text, CONTEXT)


def windows(name: str, text: str, context: int) -> Source:
    """Consecutive windows of `context` characters, x (n, context) codes, and y those one further; the last tenth of the
    text is the test part. Raises BadInput for a text that is too short."""
    end = len(text) - len(text) // HELD_OUT
    if len(text) // HELD_OUT <= context:
        raise BadInput(
            f"{name}: a text of {len(text):,} characters is too short; windows of {context}, of which a tenth is held "
            f"out, take more than {HELD_OUT * context:,}"
        )
    characters = tuple(sorted(set(text)))
    codes = np.searchsorted(np.array([ord(one) for one in characters]), np.array([ord(one) for one in text]))
    (x, y), (x_test, y_test) = _cut(codes[:end], context), _cut(codes[end:], context)
    return Source(
        name=name,
        x=x,
        y=y,
        x_test=x_test,
        y_test=y_test,
        task="multiclass",
        characters=characters,
        test_is="the test windows are the last 10 % of the text",
    )


def _cut(codes: Array, context: int) -> tuple[Array, Array]:
    number = (len(codes) - 1) // context
    return codes[: number * context].reshape(number, context), codes[1 : number * context + 1].reshape(number, context)


def assemble(
    source: Source,
    *,
    task: Task | None,
    rows: int | None,
    test_rows: int | None,
    validation: float,
    seed: int,
    dtype: torch.dtype,
) -> Dataset:
    """Split windows; the settings are those of `load`. The characters are the classes of every place of a window."""
    if task not in (None, "multiclass"):
        raise BadInput(
            f"{source.name}: the characters that follow are classes; --task {task} does not fit, leave it out"
        )
    shares = split(source, None, None, rows=rows, test_rows=test_rows, validation=validation, seed=seed)

    def part(which: int, chosen: Rows) -> Batch:
        x, y = source.arrays[which]
        return Batch(*(torch.from_numpy(np.ascontiguousarray(take(one, chosen), dtype=np.int64)) for one in (x, y)))

    places = source.x.shape[1]
    return Dataset(
        name=source.name,
        train=part(0, shares.train),
        validation=None if shares.validation is None else part(0, shares.validation),
        test=part(1, shares.test),
        task="multiclass",
        mean=torch.zeros(places, dtype=dtype),
        scale=torch.ones(places, dtype=dtype),
        classes=source.characters,
        note=f"windows of {places} of {len(source.characters)} characters; {source.test_is}",
    )
