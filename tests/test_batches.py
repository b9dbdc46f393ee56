from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.batches import FullBatches, MiniBatches, backed_by_file, share
from piecework.training import BadInput, Batch


def _rows(n: int) -> Batch:
    x = torch.arange(n, dtype=torch.float64)[:, None] * torch.tensor([1.0, 10.0])
    return Batch(x, torch.arange(n))


def _mini(n: int, rank: int, size: int, batch_size: int, *, data: Literal["shard", "same"] = "shard", seed: int = 3):
    return MiniBatches(_rows(n), data=data, rank=rank, size=size, batch_size=batch_size, seed=seed)


@given(st.integers(0, 100), st.integers(1, 9))
def test_every_row_is_someones_and_shares_differ_by_at_most_one(n: int, size: int) -> None:
    shares = [range(n)[share(n, rank, size)] for rank in range(size)]
    assert [row for own in shares for row in own] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 13))
def test_every_rank_takes_as_many_steps_of_as_many_rows_and_no_row_twice(n: int, size: int, batch_size: int) -> None:
    if n < size:
        return
    feeds = [_mini(n, rank, size, batch_size) for rank in range(size)]
    assert len({feed.steps_per_epoch for feed in feeds}) == 1
    dealt: list[int] = []
    for step in range(feeds[0].steps_per_epoch):
        batches = [feed.batch(step) for feed in feeds]
        assert len({len(batch) for batch in batches}) == 1
        assert 1 <= len(batches[0]) <= batch_size
        dealt += [int(row) for batch in batches for row in batch.y]
        assert feeds[0].samples(step) == len(dealt) - size * len(batches[0])
    assert len(dealt) == len(set(dealt)) == feeds[0].samples(feeds[0].steps_per_epoch)
    assert n - len(dealt) <= size - 1


def test_a_batch_is_the_rows_of_its_index_in_that_order() -> None:
    feed = _mini(24, 1, 3, 5)
    batch = feed.batch(4)
    assert batch.index is not None
    assert torch.equal(batch.y, batch.index)
    assert torch.equal(batch.x[:, 1], 10.0 * batch.index)


def test_the_order_of_rows_depends_on_seed_and_epoch_and_nothing_else() -> None:
    def order(feed: MiniBatches, epoch: int) -> list[int]:
        steps = range(epoch * feed.steps_per_epoch, (epoch + 1) * feed.steps_per_epoch)
        return [int(row) for step in steps for row in feed.batch(step).y]

    first = order(_mini(24, 0, 1, 5), 0)
    assert first == order(_mini(24, 0, 1, 7), 0)
    jumped = _mini(24, 0, 1, 5)
    jumped.batch(17)
    assert first == order(jumped, 0)
    assert first != order(_mini(24, 0, 1, 5), 1)
    assert first != order(_mini(24, 0, 1, 5, seed=4), 0)
    two = [_mini(24, rank, 2, 6).batch(0).y for rank in range(2)]
    assert torch.cat(two).tolist() == first[:12]


def test_with_the_same_rows_every_rank_takes_the_same_batch() -> None:
    alone = _mini(24, 0, 1, 5, data="same")
    for rank in range(3):
        feed = _mini(24, rank, 3, 5, data="same")
        assert feed.steps_per_epoch == 5
        assert all(torch.equal(feed.batch(step).y, alone.batch(step).y) for step in range(5))


def test_a_full_batch_is_a_view_of_this_ranks_rows() -> None:
    rows = _rows(24)
    for rank in range(5):
        batch = FullBatches(rows, data="shard", rank=rank, size=5).batch(7)
        assert batch.x.untyped_storage().data_ptr() == rows.x.untyped_storage().data_ptr()
        assert batch.index is not None
        assert torch.equal(batch.y, batch.index)
    assert len(FullBatches(rows, data="same", rank=1, size=5).batch(0)) == 24
    assert [len(FullBatches(_rows(2), data="shard", rank=rank, size=3).batch(0)) for rank in range(3)] == [0, 1, 1]


def test_fewer_rows_than_ranks_make_no_mini_batch() -> None:
    with pytest.raises(BadInput, match="3 training rows cannot be shared by 4 ranks"):
        _mini(3, 0, 4, 5)


def test_a_mapped_file_is_read_row_by_row_and_never_copied(tmp_path: Path) -> None:
    # A sparse file of 40 GB: whoever copied it, or only touched every page, would not come back.
    file = tmp_path / "x.bin"
    with file.open("wb") as made:
        made.truncate(40 * 10**9)
    mapped = np.memmap(file, dtype=np.float32, mode="r+", shape=(10**8, 100))
    mapped[12_345_678, 3] = 7
    x = torch.from_numpy(mapped)
    assert backed_by_file(x)
    assert not backed_by_file(torch.zeros(3))
    train = Batch(x, torch.zeros(1).expand(10**8))
    full = FullBatches(Batch(x[:24], train.y[:24]), data="shard", rank=1, size=3).batch(0)
    assert full.x.data_ptr() == x[8:].data_ptr()
    small = Batch(x[12_345_600:12_345_700], train.y[:100])
    feed = MiniBatches(small, data="shard", rank=0, size=1, batch_size=24, seed=3)
    assert sum(float(feed.batch(step).x.sum()) for step in range(feed.steps_per_epoch)) == 7
