"""The settings of a recipe as flat names: fields of a frozen dataclass, and of dataclasses in it as `inner__field`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .data.checks import suggestion
from .training import BadInput


def is_recipe(value: Any) -> bool:
    """Whether this is a dataclass instance, and so has settings."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def settings(recipe: Any) -> dict[str, Any]:
    """The value of each setting by its name."""
    found: dict[str, Any] = {}
    for name in _names(recipe):
        value = found[name] = getattr(recipe, name)
        if is_recipe(value):
            found |= {f"{name}__{key}": one for key, one in settings(value).items()}
    return found


def replaced(recipe: Any, changes: Mapping[str, Any]) -> Any:
    """The recipe with other values of some settings. Raises BadInput for a setting that it does not have, and whatever
    the recipe itself refuses."""
    known = _names(recipe)
    plain: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, tied, rest = key.partition("__")
        if name not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            raise BadInput(f"{type(recipe).__name__} has no setting '{name}'{suggestion(name, known)}; {there_are}")
        if tied:
            inner.setdefault(name, {})[rest] = value
        else:
            plain[name] = value
    for name, more in inner.items():
        below = plain.get(name, getattr(recipe, name))
        if not is_recipe(below):
            raise BadInput(f"{name} of {type(recipe).__name__} is {below!r}, which has no settings of its own")
        plain[name] = replaced(below, more)
    return dataclasses.replace(recipe, **plain)


def _names(recipe: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(recipe) if field.init]
