"""A link that is cut during a run of gossip, on real sockets in network namespaces; needs root and iproute2."""

import sys
import time
from pathlib import Path

import pytest
import torch

import piecework
from piecework import Gossip, losses
from piecework.models import mlp
from piecework.training import PeerLost

pytestmark = pytest.mark.timeout(120)

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def trains_until_it_fails(group):
    training = Gossip(overlap=1).bind(mlp(64, [8], 10, seed=0), losses.Softmax(), group=group)
    batch = piecework.Batch(torch.randn(8, 64), torch.arange(8))
    try:
        for _ in range(100_000):
            training.step(batch)
            time.sleep(0.01)
    except PeerLost as lost:
        return {"peer": lost.peer, "said": str(lost)}


def test_a_cut_link_is_one_clear_error_on_every_rank_within_the_timeout(monkeypatch):
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])
    from links import Links

    if reason := Links.available():
        pytest.skip(f"no shaped links here: {reason}")
    with Links(3) as links, links.start(trains_until_it_fails, timeout=100, wait=3.0) as run:
        time.sleep(10.0)  # the ranks start, and train
        links.cut(1)
        cut = time.monotonic()
        found = run.results()
        assert time.monotonic() - cut < 20.0
    for rank in (0, 2):
        assert found[rank]["peer"] == 1
        assert "no sign of life" in found[rank]["said"]
    assert found[1]["peer"] in (0, 2)
