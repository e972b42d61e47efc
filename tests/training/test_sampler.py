import numpy as np
import pytest

from ktray.training.sampler import RowSampler, rank_slices
from ktray.training.virtual_ranks import ranks_of_worker, virtual_ranks

SHARDS = [(f"s{i}", rows) for i, rows in enumerate([7, 5, 9, 4, 6, 8, 3, 10])]
START = dict(zip([n for n, _ in SHARDS], np.cumsum([0] + [r for _, r in SHARDS])[:-1], strict=True))
TOTAL = sum(r for _, r in SHARDS)


def reader(log=None):
    def read(windows):
        for window in windows:
            if log is not None:
                log.extend(s.shard for s in window)
            ids = [START[s.shard] + np.arange(s.rows)[s.start :: s.step] for s in window]
            ids = np.concatenate(ids)
            yield {"id": ids, "x": ids * 2.0}

    return read


@pytest.mark.parametrize("window_rows", [1, 12, 10_000])
@pytest.mark.parametrize(("lane", "of"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_every_row_once_per_epoch_and_full_batches(window_rows, lane, of):
    feed = RowSampler(SHARDS, reader(), batch=4, ranks=[lane], rank_count=of, seed=3, window_rows=window_rows)
    batches = list(feed.batches(0, 50))
    assert len(batches) == 50
    assert {len(b["id"]) for b in batches} == {4}
    stream = np.concatenate([b["id"] for b in batches])
    mine = np.sort(
        np.concatenate([START[s.shard] + np.arange(s.rows)[s.start :: s.step] for s in rank_slices(SHARDS, lane, of)])
    )
    for epoch in range(len(stream) // len(mine)):
        part = stream[epoch * len(mine) : (epoch + 1) * len(mine)]
        np.testing.assert_array_equal(np.sort(part), mine)
    for b in batches:
        np.testing.assert_array_equal(b["x"], b["id"] * 2.0)


def test_lanes_cover_the_set_without_overlap():
    for of in (1, 2, 3, 5):
        ids = []
        for lane in range(of):
            feed = RowSampler(SHARDS, reader(), batch=1, ranks=[lane], rank_count=of)
            rows = sum(s.count for s in rank_slices(SHARDS, lane, of))
            ids += [int(b["id"][0]) for b in feed.batches(0, rows)]
        assert sorted(ids) == list(range(TOTAL))


@pytest.mark.parametrize("window_rows", [1, 12, 10_000])
@pytest.mark.parametrize("shards", [SHARDS, [("s0", 7), ("s1", 5)]])
def test_workers_that_come_and_go_feed_the_same_rows_at_each_step(window_rows, shards):
    """From 1 to 3 workers and back, each from where the others stopped: every row as often as with one worker."""
    batch = 24
    of = virtual_ranks(1, 3, batch)

    def rows(world, start, stop):
        found: list[list[tuple[int, int]]] = [[] for _ in range(start, stop)]
        for rank in range(world):
            mine = ranks_of_worker(rank, world, of)
            sizes = {"batch": batch // of, "rank_count": of, "window_rows": window_rows}
            feed = RowSampler(shards, reader(), ranks=mine, seed=3, **sizes)
            for step, b in enumerate(feed.batches(start, stop)):
                assert len(b["id"]) == batch // of * len(mine)
                found[step] += zip(b["id"].tolist(), b["visit"].tolist(), strict=True)
        return [sorted(step) for step in found]

    alone = rows(1, 0, 20)
    assert {len(step) for step in alone} == {batch}
    assert rows(1, 0, 3) + rows(3, 3, 8) + rows(2, 8, 15) + rows(1, 15, 20) == alone
    # An image comes again once it has been there, and not before.
    seen = [pair for step in alone for pair in step]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("window_rows", [1, 12, 10_000])
def test_restart_goes_on_with_the_same_batches_and_reads_only_what_is_left(window_rows):
    def make(log=None):
        return RowSampler(SHARDS, reader(log), batch=5, seed=7, window_rows=window_rows)

    whole = [b["id"] for b in make().batches(0, 30)]
    log: list[str] = []
    resumed = [b["id"] for b in make(log).batches(17, 30)]
    for a, b in zip(whole[17:], resumed, strict=True):
        np.testing.assert_array_equal(a, b)
    if window_rows < 1000:
        assert len(log) <= 13 * 5 / TOTAL * len(SHARDS) + 2 * len(SHARDS) * 0.5 + 2


def test_resident_feed_reads_once_and_order_differs_by_epoch_and_seed():
    log: list[str] = []
    feed = RowSampler(SHARDS, reader(log), batch=TOTAL, seed=1)
    first, second = [b["id"] for b in feed.batches(0, 2)]
    assert len(log) == len(SHARDS)
    assert not np.array_equal(first, second)
    other = next(iter(RowSampler(SHARDS, reader(), batch=TOTAL, seed=2).batches(0, 1)))["id"]
    assert not np.array_equal(first, other)


def test_batch_larger_than_the_set_spans_epochs():
    feed = RowSampler([("s0", 7)], reader(), batch=16, seed=0)
    batch = next(iter(feed.batches(0, 1)))["id"]
    assert len(batch) == 16
    assert np.bincount(batch, minlength=7).min() >= 2


def test_lane_without_rows_is_refused():
    with pytest.raises(ValueError, match="virtual rank 1 of 2 has no rows"):
        RowSampler([("s0", 1)], reader(), batch=1, ranks=[1], rank_count=2)
