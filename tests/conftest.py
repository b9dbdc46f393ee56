"""What all tests share."""

from __future__ import annotations

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole run of four steps."""
    from piecework.checkpoint import RunFolder
    from runs import MLP, train_scaled

    run = RunFolder.create(tmp_path / "run", {"method": "plain-sgd", "model": MLP})
    train_scaled(run)
    return run.path
