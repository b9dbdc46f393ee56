"""The named data sets: what they are, where they are looked for, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..training import BadInput
from . import bundled, delimited, idx, npz, openml, text
from .places import VARIABLE, cache_folder, look_in, places
from .source import Array, Source
from .table import to_train

Read = Callable[[str, Sequence[Path]], Source]
Decode = Callable[[str, openml.Fetched], Source]


@dataclass(frozen=True, eq=False)
class Named:
    """One named set. files: relative to each place that is searched; read: makes a Source of the files found;
    home: where it is downloaded from, if anywhere, and decode: makes a Source of that; advice: how else to get it."""

    what: str
    size: str
    origin: str
    files: tuple[str, ...]
    read: Read
    advice: str
    home: openml.Home | None = None
    decode: Decode | None = None


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue. where: "bundled with scikit-learn", a folder, or "not here"."""

    name: str
    what: str
    size: str
    origin: str
    where: str


def _last_fifth(name: str, x: Array, y: Array, remark: str = "") -> Source:
    kept = len(x) - max(1, len(x) // 5)
    return Source(
        name=name,
        x=x[:kept],
        y=y[:kept],
        x_test=x[kept:],
        y_test=y[kept:],
        task="binary",
        test_is="the test rows are the last 20 % of the file",
        remark=remark,
    )


def _read_higgs(name: str, paths: Sequence[Path]) -> Source:
    x, y = npz.read(paths[0], ["x", "y"])
    return _last_fifth(name, x, y)


def _adapt_higgs(x: Array, y: Array) -> tuple[Array, Array]:
    whole = np.isfinite(x).all(axis=1)  # OpenML's file ends in one row without its last values
    return x[whole].astype(np.float32), y[whole].astype(np.uint8)


def _decode_higgs(name: str, got: openml.Fetched) -> Source:
    return _last_fifth(name, got.x, got.y, "OpenML's 98,049 whole rows")


def _read_mnist(name: str, paths: Sequence[Path]) -> Source:
    arrays = [idx.read(path, 3 if "images" in path.name else 1) for path in paths]
    return _pictures(name, *arrays)


def _pictures(name: str, x: Array, y: Array, x_test: Array, y_test: Array) -> Source:
    return Source(name=name, x=x, y=y, x_test=x_test, y_test=y_test, task="multiclass", white=255.0)


def _adapt_mnist(x: Array, y: Array) -> tuple[Array, Array]:
    return x.astype(np.uint8).reshape(-1, 28, 28), y.astype(np.uint8)


def _decode_mnist(name: str, got: openml.Fetched) -> Source:
    return _pictures(name, got.x[:60000], got.y[:60000], got.x[60000:], got.y[60000:])


def _read_olivetti(name: str, paths: Sequence[Path]) -> Source:
    x, y = npz.read(paths[0], ["x", "y"])
    return Source(name=name, x=x, y=y, task="multiclass", white=255.0)


def _adapt_olivetti(x: Array, y: Array) -> tuple[Array, Array]:
    # OpenML serves fractions of white, scaled so that the brightest pixel is 1.
    return np.rint(255 * x.reshape(-1, 64, 64)).astype(np.uint8), y.astype(np.int64)


def _decode_olivetti(name: str, got: openml.Fetched) -> Source:
    return Source(
        name=name,
        x=got.x,
        y=got.y,
        task="multiclass",
        white=255.0,
        remark="OpenML's brightest pixel is 255",
    )


def _read_uci(name: str, paths: Sequence[Path]) -> Source:
    table = delimited.read(paths[0], to_train(-1, str(paths[0])), target=-1)
    assert table.y is not None
    return Source(name=name, x=table.x, y=table.y, task="regression", target_name=table.target_name)


def _decode_uci(name: str, got: openml.Fetched) -> Source:
    remark = "OpenML's table, which is not centred and has its own order of rows"
    width = str(got.x.shape[1])
    return Source(name=name, x=got.x, y=got.y, task="regression", target_name=width, remark=remark)


_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# name -> what it is, shape of the features; the last column of each table is its target.
_UCI = {
    "airfoil": ("sound pressure behind an aerofoil", (1503, 5)),
    "bike": ("bicycles hired, hour by hour", (17379, 17)),
    "concrete": ("compressive strength of concrete", (1030, 8)),
    "elevators": ("control of an aircraft's elevators", (16599, 18)),
    "energy": ("heating load of buildings", (768, 8)),
    "kin40k": ("forward kinematics of a robot arm", (40000, 8)),
    "pendulum": ("motion of a pendulum", (630, 9)),
    "pol": ("a telecommunication problem", (15000, 26)),
    "protein": ("protein tertiary structure", (45730, 9)),
    "pumadyn32nm": ("dynamics of a Puma robot arm", (8192, 32)),
    "stock": ("returns of a stock exchange", (536, 11)),
    "wine": ("quality of red wine", (1599, 11)),
    "yacht": ("resistance of sailing yachts", (308, 6)),
}

# Only these two have a table at OpenML in the same units; in the rest of the collection the target is transformed or
# columns are left out. Offsets and the order of rows differ, and nobody here could download them, so no checksum is
# known: a download is held against shape and spread, and its own checksum is kept for later readings.
_UCI_HOMES = {
    "airfoil": openml.Home(name="airfoil_self_noise", shape=(1503, 5), spread=6.896),
    "concrete": openml.Home(name="concrete_compressive_strength", shape=(1030, 8), spread=16.70),
}


def _uci(table: str, what: str, shape: tuple[int, int]) -> Named:
    return Named(
        what=what,
        size=f"{shape[0]:,} x {shape[1]}, a number",
        origin="UCI, collection github.com/treforevans/uci_datasets, MIT",
        files=(f"uci/{table}.csv",),
        read=_read_uci,
        home=_UCI_HOMES.get(table),
        decode=_decode_uci,
        advice=f"take the table from github.com/treforevans/uci_datasets and save it as uci/{table}.csv "
        "(or .csv.gz; no header, the target last)",
    )


NAMED: dict[str, Named] = {
    "higgs": Named(
        what="HIGGS, particle collisions: signal or background",
        size="47,591 x 28, 2 classes",
        origin="UCI (Baldi, Sadowski, Whiteson 2014), CC BY 4.0",
        files=("higgs/higgs.npz",),
        read=_read_higgs,
        # Other rows of the same 11 million than the 47,591; nobody here could download them, so no checksum is known.
        home=openml.Home(data_id=23512, adapt=_adapt_higgs, shape=(98049, 28)),
        decode=_decode_higgs,
        advice="save distinct, shuffled rows of UCI's HIGGS as higgs/higgs.npz (x float32, y 0 or 1)",
    ),
    "mnist": Named(
        what="handwritten digits, pictures of 28 x 28",
        size="60,000 + 10,000 x 784, 10 classes",
        origin="LeCun, Cortes, Burges, CC BY-SA 3.0",
        files=tuple(f"mnist/{name}" for name in _IDX),
        read=_read_mnist,
        home=openml.Home(
            data_id=554,
            adapt=_adapt_mnist,
            sha256="78cde6028f05e29a7709d2419dd013b7484ab9f294be46f5eda7315eb2f534ee",  # computed from the IDX files
            shape=(70000, 28, 28),
        ),
        decode=_decode_mnist,
        advice="put the four IDX files into a folder mnist",
    ),
    "fashion-mnist": Named(
        what="articles of clothing, pictures of 28 x 28",
        size="60,000 + 10,000 x 784, 10 classes",
        origin="Zalando Research, MIT",
        files=tuple(f"fashion-mnist/{name}" for name in _IDX),
        read=_read_mnist,
        home=openml.Home(
            data_id=40996,
            adapt=_adapt_mnist,
            sha256="55a3a43679d1b1c66d1b4222c595f275ca0c60d645f4d4ec94a435cb79aa95cd",  # computed from the IDX files
            shape=(70000, 28, 28),
        ),
        decode=_decode_mnist,
        advice="apt-get install dataset-fashion-mnist, or put the four IDX files into a folder fashion-mnist",
    ),
    "olivetti": Named(
        what="faces of 40 people, pictures of 64 x 64",
        size="400 x 4,096, 40 classes",
        origin="AT&T Laboratories Cambridge, with acknowledgement",
        files=("olivetti/olivetti.npz",),
        read=_read_olivetti,
        # OpenML serves rescaled fractions, so the bytes that are kept here give no checksum for them.
        home=openml.Home(data_id=41083, adapt=_adapt_olivetti, shape=(400, 64, 64)),
        decode=_decode_olivetti,
        advice="save the pictures as olivetti/olivetti.npz (x 400 x 64 x 64 bytes, y 0 to 39)",
    ),
    "shakespeare": Named(
        what="plays of Shakespeare, windows of 128 characters: the next one",
        size="7,842 + 871 x 128, 65 classes",
        origin="public domain, collected by Andrej Karpathy",
        files=("text/tinyshakespeare.txt",),
        read=text.read,
        advice="save the text as text/tinyshakespeare.txt (or .txt.gz)",
    ),
    **{f"uci/{table}": _uci(table, *about) for table, about in _UCI.items()},
}


def names() -> list[str]:
    """Every name that `load` knows."""
    return [*bundled.DESCRIPTIONS, *NAMED]


def find(name: str, *, fetch: openml.Fetch | None = None) -> Source:
    """A named set from the first place that has it: $PIECEWORK_DATA, the cache, the system, and then its public home.

    fetch: stands in for scikit-learn's fetch_openml. Raises BadInput that lists every place tried, with the way out."""
    if name in bundled.DESCRIPTIONS:
        return bundled.read(name)
    named = NAMED[name]
    tried = [] if any(p.called.startswith("$") for p in places()) else [f"${VARIABLE} is not set"]
    for place in places():
        found = look_in(place, named.files)
        if not isinstance(found, str):
            return named.read(name, found)
        tried.append(found)
    if named.home is None:
        tried.append("OpenML does not have it in this form")
    else:
        assert named.decode is not None
        try:
            return named.decode(name, openml.obtain(named.home, cache_folder(), fetch=fetch))
        except openml.Unreachable as error:
            tried.append(str(error))
    raise BadInput(
        f"{name} is not here: {'; '.join(tried)}. To have it, {named.advice} in one of these folders, "
        f"or in a folder that ${VARIABLE} names"
    )


def from_openml(which: str, target: str | int | None, *, fetch: openml.Fetch | None = None) -> Source:
    """What `openml:NAME` or `openml:NUMBER` means. Raises BadInput if it cannot be had."""
    if not which:
        raise BadInput("openml: needs the name or the number of a data set, for example openml:credit-g or openml:31")
    column = None if target is None else str(target)
    home = (
        openml.Home(data_id=int(which), target=column) if which.isdecimal() else openml.Home(name=which, target=column)
    )
    try:
        got = openml.obtain(home, cache_folder(), fetch=fetch)
    except openml.Unreachable as error:
        raise BadInput(
            f"openml:{which} cannot be had: {error}; look its name up on openml.org, or give it as a file"
        ) from error
    return Source(
        name=f"openml:{which}", x=got.x, y=got.y, feature_names=got.feature_names, target_name=got.target_name
    )


def catalogue() -> list[Entry]:
    """Every named set and where it is on this machine, without reading any."""
    lines = [Entry(name, *about, where="bundled with scikit-learn") for name, about in bundled.DESCRIPTIONS.items()]
    for name, named in NAMED.items():
        where = "not here"
        for place in places():
            if not isinstance(look_in(place, named.files), str):
                where = str(place.folder)
                break
        else:
            if named.home is not None and openml.is_kept(named.home, cache_folder()):
                where = f"{cache_folder()} (downloaded)"
        lines.append(Entry(name, named.what, named.size, named.origin, where))
    return lines
