"""The documentation is true where a test can tell: its code runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import piecework
from piecework import losses
from piecework.cli import specs
from piecework.cli.options import CompareOptions
from piecework.cli.parse import options, read, share_out
from piecework.cli.train import plan_of
from piecework.models import mlp
from piecework.testing import threads
from piecework.testing.check import classes

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def run(*code: str) -> dict[str, Any]:
    """The names that a page's code leaves, run in a module of its own."""
    module = ModuleType("page")
    sys.modules["page"] = module  # dataclasses look their module up
    try:
        for one in code:
            exec(compile(one, "page", "exec"), module.__dict__)
    finally:
        del sys.modules["page"]
    return module.__dict__


def commands() -> Iterator[list[str]]:
    for page in PAGES:
        for block in [*blocks(page, "bash"), *blocks(page, "")]:
            for line in block.splitlines():
                words = shlex.split(line, comments=True) if "piecework " in line and "||" not in line else []
                if "-m" in words and words[0] == "torchrun":
                    words = words[words.index("-m") + 1 :]
                if words[:1] == ["piecework"]:
                    yield words[1:]


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(*blocks(page, "python"))


def test_the_method_of_the_docs_keeps_every_law() -> None:
    code = blocks(ROOT / "docs/write-your-own.md", "python")
    assert len(code[0].splitlines()) <= 60
    run(code[0], code[-1])["test_my_method_keeps_every_law"]()


def test_the_commands_of_the_docs_are_understood() -> None:
    found = list(commands())
    assert {words[0] for words in found} >= {"fit", "compare", "resume", "show", "predict"}
    for words in found:
        if words[0] == "fit" and "--help" not in words:
            plan_of(words[1:])
        if words[0] == "compare":
            chosen = read(CompareOptions, share_out(words[1:], options(CompareOptions)), usage="")
            entries = specs.entries(chosen.comparison.methods)
            specs.require_known(entries, chosen.comparison.tune)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, part = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if part:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
            assert part in map(anchor, headings), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_style_of_the_docs(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    assert "TODO" not in text
    assert not re.search(r"\w!(\s|$)", text)


def test_every_method_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for name in piecework.methods.METHODS:
        assert re.search(rf"^\| \[?`{name}`", text, re.MULTILINE), name


@pytest.mark.parametrize("hidden", [[7], [7, 6], [9, 4, 6]], ids=str)
def test_the_bytes_of_a_sweep_are_those_of_the_formula(hidden: list[int]) -> None:
    formula = run(blocks(ROOT / "docs/methods/admm.md", "python")[0])["bytes_of_a_sweep"]
    data = classes()

    def work(group: piecework.Group) -> list[dict[str, Any]]:
        model = mlp(5, hidden, 3, seed=1, dtype=torch.float64)
        training = piecework.ADMM().bind(model, losses.Squared(), group=group)
        history = piecework.fit(training, data, loss=losses.Squared(), group=group, steps=12, evaluate_every=1)
        return history.rows

    before, accepted = 0, True
    for row in threads(2, work)[0]:
        expected = formula([5, *hidden, 3], sweep=row["step"], trials=int(row["trials"]), after_accepted=accepted)
        assert row["bytes_sent"] - before == expected
        before, accepted = row["bytes_sent"], bool(row["accepted"])
