"""What all tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    # The problems are tiny and ranks are threads: more threads inside torch would only wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _heed_ctrl_c() -> None:
    # A shell lets what it starts in the background ignore Ctrl-C, and children inherit that; some tests are about it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole run of four steps."""
    from piecework.checkpoint import RunFolder
    from runs import MLP, train_scaled

    run = RunFolder.create(tmp_path / "run", {"method": "plain-sgd", "model": MLP})
    train_scaled(run)
    return run.path
