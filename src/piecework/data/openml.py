"""Downloads from OpenML, through scikit-learn, kept in the cache with a checksum.

`fetch_openml` holds what it downloads against the MD5 sum that OpenML itself gives; what OpenML serves under a number
could still change. So the SHA-256 of the decoded arrays is recorded here for the sets whose content is known, and for
the others it is written beside the arrays at the first download, and every later reading is held against it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import tempfile
import urllib.parse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..training import BadInput
from . import npz
from .checks import column
from .source import Array

TIMEOUT = 60.0
"""Seconds without an answer after which a download fails."""

Fetch = Callable[..., Any]
"""scikit-learn's fetch_openml, or what stands in for it."""


@dataclass(frozen=True)
class Home:
    """Where OpenML keeps a table, and how to know that it is the right one.

    data_id: its number, or None; name: its name, where the number is not given; target: a column other than the
    table's own target. adapt: (x, y) as served -> (x, y) as the set is defined here. sha256: of the adapted arrays, or
    None where nobody could compute it without the network. shape: of the adapted x, or None; spread: standard
    deviation of the adapted y, to four digits, or None."""

    data_id: int | None = None
    name: str | None = None
    target: str | None = None
    adapt: Callable[[Array, Array], tuple[Array, Array]] = lambda x, y: (x, y)
    sha256: str | None = None
    shape: tuple[int, ...] | None = None
    spread: float | None = None

    def __str__(self) -> str:
        return f"OpenML ({self.name if self.data_id is None else f'data set {self.data_id}'})"


@dataclass(frozen=True, eq=False)
class Fetched:
    """x: (n, d) numbers; y: (n,) numbers or text; the columns' names."""

    x: Array
    y: Array
    feature_names: tuple[str, ...]
    target_name: str


class Unreachable(Exception):
    """The download failed; the text is the reason."""


def obtain(home: Home, cache: Path, *, fetch: Fetch | None = None) -> Fetched:
    """The table, from the cache if it was downloaded before, else from OpenML.

    fetch: stands in for scikit-learn's fetch_openml. Raises Unreachable if it cannot be had, and BadInput if it is not
    the table that was expected."""
    kept = _archive(home, cache)
    if kept.exists():
        return _kept(home, kept)
    got = _download(home, fetch)
    digest = checksum(got.x, got.y)
    _verify(home, got, digest)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next download, not this run
        _keep(kept, got, digest)
    return got


def is_kept(home: Home, cache: Path) -> bool:
    """Whether the table was downloaded before."""
    return _archive(home, cache).exists()


def checksum(*arrays: Array) -> str:
    """SHA-256 over type, shape and bytes of each array, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _archive(home: Home, cache: Path) -> Path:
    who = f"id-{home.data_id}" if home.data_id is not None else f"name-{home.name}"
    name = urllib.parse.quote(who + (f"-target-{home.target}" if home.target else ""), safe=" ")
    return cache / "openml" / (name + ".npz")


def _download(home: Home, fetch: Fetch | None) -> Fetched:
    if fetch is None:
        from sklearn.datasets import fetch_openml

        fetch = fetch_openml
    which: dict[str, Any] = {"name": home.name} if home.data_id is None else {"data_id": home.data_id}
    if home.target is not None:
        which["target_column"] = home.target
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as raw:
            warnings.simplefilter("ignore")  # it warns of the retry, and of names that have several versions
            bunch = fetch(
                **which,
                as_frame=False,
                parser="liac-arff",  # needs no pandas, and treats nominal columns alike everywhere
                n_retries=1,
                data_home=raw,  # without a folder of its own it would download the table twice
            )
    except (OSError, ValueError, TypeError, KeyError, http.client.HTTPException) as error:
        raise Unreachable(
            f"{home} failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return _decoded(home, bunch)


def _decoded(home: Home, bunch: Any) -> Fetched:
    if hasattr(bunch.data, "toarray"):
        raise BadInput(f"{home}: the table is sparse; download it and save the columns you need as .npz or .csv")
    if bunch.target is None:
        raise BadInput(f"{home}: the table has no target of its own; give --target COLUMN")
    x, names = np.asarray(bunch.data, dtype=np.float64), tuple(map(str, bunch.feature_names))
    for name, labels in dict(bunch.categories or {}).items():
        if name in names:
            x[:, names.index(name)] = _as_numbers(x[:, names.index(name)], labels, name, names, home)
    y = np.asarray(bunch.target)
    if y.dtype == object:
        if any(v is None for v in y.reshape(-1)):
            row = next(i for i, v in enumerate(y.reshape(-1)) if v is None)
            raise BadInput(f"{home}: the target holds nothing in row {row}")
        y = np.array(y.tolist(), dtype=np.str_)
    if y.dtype.kind == "U":
        with contextlib.suppress(ValueError):  # labels that are text stay text
            y = y.astype(np.float64)
    try:
        x, y = home.adapt(x, y)
    except ValueError as error:
        raise BadInput(f"{home}: the table has shape {x.shape} and is not the same data ({error})") from error
    return Fetched(x, y, names if x.ndim == 2 else (), ",".join(map(str, bunch.target_names)))


def _as_numbers(places: Array, labels: Any, name: str, names: tuple[str, ...], home: Home) -> Array:
    """A nominal feature comes as places among its labels; it is a feature only if the labels are numbers."""
    try:
        values = np.array([float(label) for label in labels])
    except (TypeError, ValueError):
        raise BadInput(
            f"{home}: {column(names.index(name), names)} holds text ({labels[0]!r}, ...); features are numbers, "
            "so download the table, encode that column and give the file"
        ) from None
    missing = ~np.isfinite(places)
    return np.where(missing, np.nan, values[np.where(missing, 0, places).astype(np.int64)])


def _verify(home: Home, got: Fetched, digest: str) -> None:
    if home.sha256 is not None and digest != home.sha256:
        raise BadInput(
            f"{home}: what was downloaded has SHA-256 {digest}, expected {home.sha256}; it is not the same data"
        )
    if home.shape is not None and got.x.shape != home.shape:
        raise BadInput(f"{home}: the table has shape {got.x.shape}, expected {home.shape}; it is not the same data")
    if home.spread is not None and not abs(float(got.y.std()) / home.spread - 1) < 1e-3:
        raise BadInput(
            f"{home}: the target's standard deviation is {got.y.std():.4g}, expected {home.spread:.4g}; "
            "it is not the same data"
        )


def _keep(path: Path, got: Fetched, digest: str) -> None:
    """Write archive and checksum; the archive is put in its place last and whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = np.array([got.target_name, *got.feature_names], dtype=np.str_)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        archive, note = Path(folder) / "arrays.npz", Path(folder) / "sha256"
        np.savez_compressed(archive, x=got.x, y=got.y, names=names)
        note.write_text(digest + "\n")
        os.replace(note, _sidecar(path))
        os.replace(archive, path)


def _kept(home: Home, path: Path) -> Fetched:
    x, y, names = npz.read(path, ["x", "y", "names"])
    got = Fetched(x, y, tuple(map(str, names[1:])), str(names[0]))
    try:
        recorded = _sidecar(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        recorded = "none"
    digest = checksum(x, y)
    if digest != recorded:
        raise BadInput(
            f"{path} has SHA-256 {digest} and was downloaded with {recorded}; delete it and the .sha256 file beside it "
            "to download it again"
        )
    _verify(home, got, digest)
    return got


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
