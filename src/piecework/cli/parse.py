"""Words of a command line -> frozen dataclasses.

tyro reads the values and writes the help. What it cannot do is find METHOD behind an option that takes several values
(`--hidden 300 100 admm`), so the words are shared out here first: each option with its values, the words that stand for
themselves, and, from the first word on that is a method's name, the settings of that method."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

HELP = ("-h", "--help")
_NUMBER = re.compile(r"[-+]?(\d|\.\d|inf|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Option:
    """An option of a dataclass. kind: takes no value, one, so many (`count`), or any number of them; "fixed" cannot be
    given as a word, because it is a function."""

    kind: Literal["flag", "one", "count", "many", "fixed"]
    hint: Any
    count: int = 1


@dataclass
class Words:
    """A command line, shared out. given: the options with their values, in order; standing: the words that are no
    option and no value; name: the method's name, if there was one; rest: the words behind it."""

    given: list[tuple[str, list[str]]] = field(default_factory=list)
    standing: list[str] = field(default_factory=list)
    name: str | None = None
    rest: list[str] = field(default_factory=list)
    help: bool = False

    def flat(self) -> list[str]:
        """The options as words again; values are tied to their option, because some begin with a minus."""
        words: list[str] = []
        for option, values in self.given:
            words += [f"{option}={values[0]}"] if len(values) == 1 else [option, *values]
        return words


def options(recipe: type) -> dict[str, Option]:
    """The options that a dataclass has as a command line, by the word that gives them."""
    found: dict[str, Option] = {}
    hints = typing.get_type_hints(recipe)
    for one in dataclasses.fields(recipe):
        hint = hints[one.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= options(hint)
        elif one.init:
            found["--" + one.name.replace("_", "-")] = _option(hint)
    return found


def _option(hint: Any) -> Option:
    plain = _without_none(hint)
    origin, inside = typing.get_origin(plain), typing.get_args(plain)
    if hint is bool:
        return Option("flag", hint)
    if _has_functions(hint):
        words = _words_beside_functions(hint)
        return Option("one", words) if words is not None else Option("fixed", hint)
    endless = [one for one in (plain, *inside) if typing.get_origin(one) is tuple and Ellipsis in typing.get_args(one)]
    if endless and (origin is tuple or _is_union(origin)):
        return Option("many", hint)
    if origin is tuple:
        return Option("count", hint, len(inside))
    return Option("many" if origin in (list, set, frozenset) else "one", hint)


def _has_functions(hint: Any) -> bool:
    parts = (hint, *typing.get_args(hint)) if _is_union(typing.get_origin(hint)) else (hint,)
    return any(typing.get_origin(part) is typing.get_origin(Callable[[], None]) for part in parts)


def _words_beside_functions(hint: Any) -> Any:
    """The Literal that is accepted as well as a function, if one is."""
    return next((part for part in typing.get_args(hint) if typing.get_origin(part) is Literal), None)


def _constructors() -> Any:
    """What tyro is to do about a setting that is a word or a function: take the word."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: Any) -> Any:
        words = _words_beside_functions(info.type) if _has_functions(info.type) else None
        if words is None:
            return None
        names = typing.get_args(words)
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(names) + "}",
            instance_from_str=lambda given: given[0],
            is_instance=lambda value: value in names,
            str_from_instance=lambda value: [value],
            choices=names,
        )

    return registry


def _is_union(origin: Any) -> bool:
    return origin in (typing.Union, types.UnionType)


def _without_none(hint: Any) -> Any:
    if _is_union(typing.get_origin(hint)):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return parts[0] if len(parts) == 1 else typing.Union[tuple(parts)]  # noqa: UP007
    return hint


def share_out(
    argv: Sequence[str],
    known: dict[str, Option],
    *,
    names: Iterable[str] = (),
    elsewhere: Callable[[str, Sequence[str]], str | None] = lambda option, words: None,
) -> Words:
    """Say what each word is. Raises BadInput for an option that is not known.

    names: words that end the options, unless they are the value of an option that takes one; elsewhere: given an
    unknown option and the words behind it, a clause that says where it belongs, if it belongs somewhere."""
    found, names, position = Words(), set(names), 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word in HELP:
            found.help = True
        elif not _is_option(word):
            if word in names:
                found.name, found.rest = word, list(argv[position:])
                return found
            found.standing.append(word)
        else:
            head, tied, value = word.partition("=")
            option = _known(head, known, argv[position:], elsewhere)
            values = [value] if tied else _values(known[option], argv[position:], names)
            position += 0 if tied else len(values)
            found.given.append((_written(head, option), values))
    return found


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-" and not _NUMBER.match(word)


def _values(option: Option, words: Sequence[str], names: set[str]) -> list[str]:
    most = {"flag": 0, "fixed": 0, "one": 1, "count": option.count, "many": len(words)}[option.kind]
    numbers = option.kind == "many" and typing.get_args(_without_none(option.hint))[:1] in ((int,), (float,))
    taken: list[str] = []
    for word in words[:most]:
        if _is_option(word) or word in HELP:
            break
        if option.kind != "one" and (word in names or (numbers and taken and not _NUMBER.match(word))):
            break
        taken.append(word)
    return taken


def _known(
    head: str,
    known: dict[str, Option],
    behind: Sequence[str],
    elsewhere: Callable[[str, Sequence[str]], str | None],
) -> str:
    """The option that a word means: underscores are as good as hyphens, and a flag can be taken back with --no-."""
    from ..training import BadInput

    option = "--" + head.lstrip("-").replace("_", "-") if head.startswith("--") else head
    negated = "--" + option.removeprefix("--no-")
    if option in known or (option.startswith("--no-") and negated in known and known[negated].kind == "flag"):
        option = option if option in known else negated
        if known[option].kind == "fixed":
            raise BadInput(f"{option} is a function and can only be given from Python")
        return option
    place = elsewhere(option, behind)
    if place:
        raise BadInput(place)
    raise BadInput(f"there is no option {head}{near(option, known, otherwise='; --help lists the options')}")


def _written(head: str, option: str) -> str:
    return "--no-" + option.removeprefix("--") if head.startswith(("--no-", "--no_")) and head != option else option


def near(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """A clause ` (did you mean x?)`, or `otherwise` where no known word is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else otherwise


def read(
    recipe: Callable[..., T], words: Words, *, usage: str, about: str = "", more: str = "", pairs: bool = False
) -> T:
    """An instance of the dataclass with the values that the words give.

    usage: what to type; about, more: text before and behind the options in the help; pairs: whether each flag --x has
    its --no-x. Raises BadInput for a value that does not fit; with `words.help` prints the help and raises
    SystemExit(0)."""
    import tyro

    known = options(typing.cast(type, recipe))
    config = [tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed]
    config += [] if pairs else [tyro.conf.FlagCreatePairsOff]
    said, shown = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            found = tyro.cli(
                recipe,
                args=["--help"] if words.help else words.flat(),
                prog="piecework",
                description="",
                config=config,
                registry=_constructors(),
            )
    except SystemExit as end:
        if words.help:
            print(_help(shown.getvalue(), usage, about, more), end="")
            raise SystemExit(0) from None
        raise _refusal(end, said.getvalue(), known, words) from None
    print(said.getvalue(), end="", file=sys.stderr)  # warnings of the dataclass itself
    return found


def _help(text: str, usage: str, about: str, more: str) -> str:
    """tyro's list of options between words of ours; its own usage line knows nothing of DATA and METHOD."""
    width = min(shutil.get_terminal_size().columns, 100)
    paragraphs = [" ".join(part.split()) for part in about.split("\n\n")]
    head = "\n\n".join(textwrap.fill(part, width) for part in paragraphs if part)
    listed = "\n".join(line.rstrip() for line in text.partition("\n\n")[2].strip("\n").splitlines())
    listed = listed.partition("\n subcommands\n")[0]  # tyro's idea of a setting that is a function or several functions
    return "\n\n".join(part for part in (f"usage: {usage}", head, listed, more.rstrip()) if part) + "\n"


def _refusal(end: SystemExit, said: str, known: dict[str, Option], words: Words) -> Exception:
    """One sentence for what tyro says in a box; what the dataclass itself says is kept as it is."""
    from ..training import BadInput, CannotTrain

    cause = end.__cause__ or end.__context__
    if isinstance(cause, BadInput | CannotTrain):
        return cause
    named = re.search(r"--[a-z][\w-]*", said)
    if named and (option := known.get(named[0])):
        values = " ".join(next((values for given, values in reversed(words.given) if given == named[0]), []))
        return BadInput(f"{named[0]} takes {describe(option.hint)}, and was given {values or 'nothing'}")
    lines = [line.strip("│╭╮╰╯ ") for line in said.splitlines()]
    body = [line for line in lines if line and not line.startswith("─")]
    return BadInput(" ".join(body)[:300] or "these options cannot be read")


def describe(hint: Any) -> str:
    """What an option takes, in words."""
    plain = _without_none(hint)
    origin, inside = typing.get_origin(plain), typing.get_args(plain)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inside))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, inside))
    words = {int: "a whole number", float: "a number", str: "a word", bool: "True or False"}
    if origin is tuple:
        kind = {int: "whole numbers", float: "numbers"}.get(inside[0], "words")
        return kind if inside[1:] == (Ellipsis,) else f"{len(inside)} {kind}"
    return words.get(plain, getattr(plain, "__name__", str(plain)))


def parse(recipe: Callable[..., T], argv: Sequence[str], *, usage: str, about: str = "") -> tuple[T, list[str]]:
    """Read a command line without METHOD: the options, and the words that stand for themselves."""
    words = share_out(argv, options(typing.cast(type, recipe)))
    return read(recipe, words, usage=usage, about=about), words.standing
