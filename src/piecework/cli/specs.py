"""What `compare --methods` and `--tune` say: methods with settings, and settings to try."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..methods import METHODS
from ..training import BadInput, Method
from .parse import Option, Words, near, options, read


@dataclass(frozen=True)
class Entry:
    """A line of a comparison. label: as the user wrote it; given: the settings that he gave, by option."""

    label: str
    name: str
    method: Method
    given: dict[str, list[str]]

    def with_settings(self, more: dict[str, list[str]]) -> Entry:
        """The same method with more settings, given as words."""
        given = {**self.given, **more}
        return Entry(self.label, self.name, _method(self.name, given), given)


def entries(words: Sequence[str]) -> list[Entry]:
    """The methods of `--methods`, for example admm or adam:lr=3e-3,betas=0.9,0.99. Raises BadInput."""
    found = [_entry(word) for word in words]
    labels = [entry.label for entry in found]
    for label in labels:
        if labels.count(label) > 1:
            raise BadInput(f"--methods names {label} twice; give different settings, or name it once")
    return found


def _entry(word: str) -> Entry:
    name, _, said = word.partition(":")
    if name not in METHODS:
        raise BadInput(f"there is no method '{name}'{near(name, METHODS)}; there are {', '.join(METHODS)}")
    known = options(METHODS[name])
    given: dict[str, list[str]] = {}
    option = ""
    for piece in said.split(",") if said else ():
        key, tied, value = piece.partition("=")
        if not tied and option:  # a further value of the last setting
            given[option].append(piece)
            continue
        option = "--" + key.strip().replace("_", "-")
        if option not in known or not tied:
            ways = f"{name} has no setting '{key}'" if tied else f"'{piece}' is no setting: write {name}:setting=value"
            plain = [one.removeprefix("--") for one in known]
            raise BadInput(f"--methods: {ways}{near(key, plain, otherwise=_all(known))}")
        if option in given:
            raise BadInput(f"--methods: {word} gives {key} twice")
        given[option] = [value]
    return Entry(word, name, _method(name, given), given)


def _all(known: dict[str, Option]) -> str:
    names = [option.removeprefix("--") for option, about in known.items() if about.kind != "fixed"]
    return f"; its settings are {', '.join(names)}" if names else "; it has none"


def _method(name: str, given: dict[str, list[str]]) -> Method:
    known = options(METHODS[name])
    words = [_as_words(option, values, known[option]) for option, values in given.items()]
    return read(METHODS[name], Words(given=words), usage="", pairs=True)


def _as_words(option: str, values: list[str], about: Option) -> tuple[str, list[str]]:
    if about.kind != "flag":
        return option, values
    said = values[0].lower() if len(values) == 1 else ""
    if said not in ("true", "false", "1", "0", "yes", "no"):
        raise BadInput(f"{option.removeprefix('--')} is true or false, and was given {','.join(values)}")
    return (option if said in ("true", "1", "yes") else "--no-" + option.removeprefix("--")), []


def trials(tune: Sequence[str]) -> list[dict[str, list[str]]]:
    """All combinations of the values of `--tune`, for example lr=1e-3,1e-2. Raises BadInput."""
    columns: dict[str, list[str]] = {}
    for word in tune:
        key, tied, values = word.partition("=")
        option = "--" + key.strip().replace("_", "-")
        tried = [value for value in values.split(",") if value]
        if not tied or not tried:
            raise BadInput(f"--tune takes setting=value,value,..., and was given {word}")
        if option in columns:
            raise BadInput(f"--tune names {key} twice; give all its values at once")
        columns[option] = tried
    return [
        {option: [value] for option, value in zip(columns, values, strict=True)}
        for values in itertools.product(*columns.values())
    ]


def candidates(entry: Entry, tune: Sequence[str]) -> list[Entry]:
    """The versions of a method that `--tune` asks for: only settings that it has and that were not given count."""
    known = options(METHODS[entry.name])
    free = [word for word in tune if (option := _option(word)) in known and option not in entry.given]
    return [entry.with_settings(more) for more in trials(free)] if free else []


def require_known(found: Sequence[Entry], tune: Sequence[str]) -> list[str]:
    """Notes on methods that ignore a setting of `--tune`. Raises BadInput for one that no method has."""
    notes = []
    for word in tune:
        key = word.partition("=")[0]
        having = [entry for entry in found if _option(word) in options(METHODS[entry.name])]
        if not having:
            everything = {option[2:] for entry in found for option in options(METHODS[entry.name])}
            raise BadInput(f"--tune: no method of this comparison has a setting '{key}'{near(key, everything)}")
        for entry in found:
            if entry not in having:
                notes.append(f"{entry.label} has no {key}, and is not tuned by it")
            elif _option(word) in entry.given:
                notes.append(f"{entry.label} keeps the {key} that it was given")
    return notes


def _option(word: str) -> str:
    return "--" + word.partition("=")[0].strip().replace("_", "-")


def in_words(settings: dict[str, list[str]]) -> str:
    """Settings as the user writes them: lr=0.001,betas=0.9,0.99."""
    return ",".join(f"{option.removeprefix('--')}={','.join(values)}" for option, values in settings.items())
