"""ADMM tile by tile: size of a tile, order of rows and precision do not matter, and nothing is kept a row."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chains import bind, bundled, chain, deployed_loss, flat, quarters, scaled, sweeps
from piecework import losses
from piecework.training import Batch

close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
LOSSES = ["squared", "softmax", "hinge"]


def _train(batch: Batch, loss: str, number: int = 5, **settings: Any) -> tuple[Tensor, float]:
    model = chain(5, 24, 7, 4)
    rows = sweeps(bind(model, losses.named(loss), **settings), batch, number)
    return flat(model), rows[-1]["loss"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("acceleration", [False, True])
def test_the_size_of_a_tile_does_not_matter(loss: str, acceleration: bool) -> None:
    batch = quarters()
    weights, value = _train(batch, loss, tile=len(batch), acceleration=acceleration)
    for tile in (1, 7, 64, None):
        other, same = _train(batch, loss, tile=tile, acceleration=acceleration)
        close(other, weights)
        assert same == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_the_rows_does_not_matter(loss: str) -> None:
    batch = quarters()
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    weights, value = _train(batch, loss)
    other, same = _train(Batch(batch.x[order], batch.y[order]), loss, tile=64)
    close(other, weights)
    assert same == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_run_is_equal_to_the_bit(loss: str) -> None:
    first, second = (_train(quarters(), loss, tile=64) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize("loss", LOSSES)
def test_single_precision_follows_double_precision(loss: str) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        data = bundled("digits", dtype)
        found.append(sweeps(bind(scaled(data, [100]), losses.named(loss)), data.train, 5)[-1]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reported_loss_is_that_of_the_exported_module(loss: str, dtype: torch.dtype) -> None:
    data, kind = bundled("digits", dtype), losses.named(loss)
    model = scaled(data, [50, 30])
    training = bind(model, kind)
    for _ in range(4):
        (metrics,) = sweeps(training, data.train, 1)
        assert metrics["loss"] == pytest.approx(deployed_loss(model, kind, data.train), rel=1e-6)


class _Counting(nn.Module):
    """Counts the rows that go through it."""

    rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return x


@pytest.mark.parametrize("loss", LOSSES)
def test_the_reported_passes_are_the_times_the_data_were_read(loss: str) -> None:
    counting, batch = _Counting(), quarters()
    training = bind(nn.Sequential(counting, chain(5, 24, 4)), losses.named(loss), tile=64)
    for _ in range(5):
        counting.rows = 0
        (metrics,) = sweeps(training, batch, 1)
        assert counting.rows == metrics["passes"] * len(batch)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sweep_reads_the_data_twelve_times_at_most_on_average(loss: str) -> None:
    data = bundled()
    rows = sweeps(bind(scaled(data, [100, 50]), losses.named(loss)), data.train, 12)
    assert sum(row["passes"] for row in rows) <= 12 * 6  # 12 are allowed; it has been about 3 to 4
    assert all(row["passes"] <= 2 + row["trials"] for row in rows[1:])


def test_sweeps_keep_no_number_a_row() -> None:
    for rows in (211, 2110):
        training = bind(chain(5, 24, 7, 4), tile=64)
        sweeps(training, quarters(rows), 3)
        state = training.state_dict()
        tensors = [state["gram"], state["dual"], *state["momentum"]]
        assert max(t.numel() for t in tensors) <= 25 * 25
        assert training._crew.tiles[0].rows == 64


def test_features_of_any_kind_are_read_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (211, 3, 5), generator=generator, dtype=torch.uint8)
    y = torch.randint(4, (211,), generator=generator)
    model, whole = (nn.Sequential(nn.Flatten(), chain(15, 7, 4)) for _ in range(2))
    sweeps(bind(model, tile=64), Batch(pictures, y), 3)
    sweeps(bind(whole), Batch(pictures.double(), y), 3)
    close(flat(model), flat(whole))


def test_tiles_smaller_than_a_row_of_tiles_and_a_single_row_train() -> None:
    for rows in (1, 3):
        batch = quarters(rows)
        last = sweeps(bind(chain(5, 7, 4), tile=2), batch, 3)[-1]
        assert np.isfinite(last["loss"])


MEMORY = """
import sys, threading, time
import numpy as np
import torch
from piecework import data, losses
from piecework.methods import ADMM
from piecework.models import mlp
from piecework.training import Batch

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

torch.set_num_threads(1)
peaks = []
for path in sys.argv[1:]:
    x = torch.from_numpy(np.load(path + ".x.npy", mmap_mode="c"))
    y = torch.from_numpy(np.load(path + ".y.npy", mmap_mode="c"))
    training = ADMM(tile=512).bind(mlp(28, [100], 1), losses.named("squared"))
    peak, over = [0], threading.Event()
    def watch():
        while not over.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    watching = threading.Thread(target=watch)
    watching.start()
    for _ in range(3):
        training.step(Batch(x, y))
    over.set()
    watching.join()
    peaks.append(peak[0])
print(*peaks)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc, which is Linux's")
def test_ten_times_the_rows_on_disk_take_no_more_memory(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    paths = []
    for rows in (15_000, 150_000):
        paths.append(str(tmp_path / str(rows)))
        x = generator.standard_normal((rows, 28), dtype=np.float32)
        np.save(paths[-1] + ".x.npy", x)
        np.save(paths[-1] + ".y.npy", (x[:, 0] * x[:, 1] > 0).astype(np.int64))
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ},
    )
    small, large = map(int, found.stdout.split())
    tile = 512 * (28 + 3 * 100) * 4 / 1024
    # 150,000 rows are 16 MiB of features, and would be 57 MiB of activations.
    assert large - small < 4 * tile
