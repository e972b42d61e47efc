import numpy as np
import pytest

from ktray.training import sampler
from ktray.training.sampler import RowSampler, rank_slices, spread_views
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
    visits = np.concatenate([b["visit"] for b in batches])
    assert np.all(np.diff(visits) >= 0)
    seed = None if window_rows == 10_000 else 3  # rows that stay in memory are the same in all epochs
    for epoch in range(visits[-1]):
        mine = rank_slices(SHARDS, lane, of, epoch=epoch, seed=seed)
        ids = np.concatenate([START[s.shard] + np.arange(s.rows)[s.start :: s.step] for s in mine])
        np.testing.assert_array_equal(np.sort(stream[visits == epoch]), np.sort(ids))
    assert visits[-1] > 2
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


@pytest.mark.parametrize("shards", [[(f"s{i}", 3) for i in range(40)], SHARDS[:3]])
def test_ranks_divide_the_set_anew_in_each_epoch(shards):
    """Whole shards where there are many, images of each shard where there are few; all ranks together have every row
    once, and a rank sees nearly the whole set within a few epochs."""
    of, seen = 2, set()
    for epoch in range(8):
        parts = [rank_slices(shards, rank, of, epoch=epoch, seed=9) for rank in range(of)]
        rows = [(s.shard, row) for part in parts for s in part for row in range(s.start, s.rows, s.step)]
        assert sorted(rows) == sorted((name, row) for name, count in shards for row in range(count))
        seen |= {(s.shard, row) for s in parts[0] for row in range(s.start, s.rows, s.step)}
    assert len(seen) >= 0.95 * sum(count for _, count in shards)
    fixed = [rank_slices(shards, 0, of, epoch=epoch) for epoch in range(3)]
    assert fixed[0] == fixed[1] == fixed[2]


@pytest.mark.parametrize(("images", "views"), [(40, 4), (7, 3), (1, 5), (0, 2), (2, 1)])
def test_views_of_an_image_are_apart(images, views):
    order = spread_views(images, views, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(images * views))
    places = np.argsort(order).reshape(images, views)
    if images > 1:
        gaps = np.diff(np.sort(places, axis=1), axis=1)
        assert (gaps > images // 2 - 1).all()
    for batch in range(0, images * views - images // 2, max(1, images // 2)):
        shown = order[batch : batch + images // 2] // views
        assert len(set(shown.tolist())) == len(shown)


def test_the_views_of_an_image_are_read_together_and_used_apart():
    views = 3
    shards = [(f"s{i}", 16 * views) for i in range(24)]
    begin = {name: i * 16 * views for i, (name, _) in enumerate(shards)}

    def read(windows):
        for window in windows:
            rows = [np.arange(s.rows).reshape(-1, views)[s.start :: s.step].ravel() + begin[s.shard] for s in window]
            assert sum(s.count for s in window) == sum(map(len, rows))
            yield {"id": np.concatenate(rows)}

    for count in (1, 2, 8):  # with 8 ranks, each has some images of each shard
        ids = []
        for rank in range(count):
            settings = {"batch": 6, "window_rows": 24 * views, "views": views, "seed": 2}
            feed = RowSampler(shards, read, ranks=[rank], rank_count=count, **settings)
            stream = list(feed.batches(0, 24 * 16 * views // count // 6))
            same = [len(set((b["id"] // views).tolist())) for b in stream]
            # Only where a window ends in the middle of a batch may an image be there twice.
            assert np.mean(same) > 5.7
            ids += [int(i) for b in stream for i in b["id"]]
        assert sorted(ids) == list(range(24 * 16 * views))


def test_the_first_batch_does_not_wait_for_the_schedule(monkeypatch):
    """With ten thousand epochs to come, only the windows that the reader takes are computed, and few epochs."""
    divided, taken = [], []

    def counted(*arguments):
        divided.append(1)
        return rank_slices(*arguments)

    def read(windows):
        for window in windows:
            taken.append(1)
            yield from reader()([window])

    monkeypatch.setattr(sampler, "rank_slices", counted)
    feed = RowSampler(SHARDS, read, batch=4, ranks=[0, 1], rank_count=2, seed=3, window_rows=9)
    divided.clear()
    next(feed.batches(0, 10_000 * TOTAL // 8))
    assert len(taken) == 2, "one window for each rank"
    assert len(divided) <= 12
    feed = RowSampler(SHARDS, read, batch=4, ranks=[0, 1], rank_count=2, seed=3)
    divided.clear()
    taken.clear()
    next(feed.batches(0, 10_000 * TOTAL // 8))
    assert len(taken) == 2
    assert len(divided) <= 12


def test_the_first_windows_of_a_training_are_small():
    """Each is at most twice the one before; every image is there once, and no batch has two views of one."""
    views, images = 2, 64
    shards = [(f"s{i}", views * images) for i in range(400)]
    sizes, shown = [], []

    def read(windows):
        for window in windows:
            sizes.append(sum(s.count for s in window))
            rows = [np.arange(s.rows) + int(s.shard[1:]) * views * images for s in window]
            yield {"id": np.concatenate(rows)}

    feed = RowSampler(shards, read, batch=32, window_rows=16_384, views=views, seed=4)
    for batch in feed.batches(0, 400 * views * images // 32):
        shown.append(batch["id"])
    assert sizes == [512, 1024, 2048, 4096, 8192, 11_776, 11_776, 11_776]
    assert sorted(np.concatenate(shown).tolist()) == list(range(400 * views * images))
    assert all(len(set((ids // views).tolist())) == 32 for ids in shown)
    sizes.clear()
    later = iter(feed.batches(400 * views * images // 32, 401 * views * images // 32))
    next(later)
    assert sizes == [12_800], "in later epochs, a window is read while the one before is used"
    # Never so small that views of an image come close; nothing where a window is small, or the set.
    assert sampler.first_windows(1_000, 10_000, 300) == [300, 600]
    assert sampler.first_windows(1_000, 10_000, 1_000) == []
    assert sampler.first_windows(1_000, 1_001, 600) == []


def test_batch_larger_than_the_set_spans_epochs():
    feed = RowSampler([("s0", 7)], reader(), batch=16, seed=0)
    batch = next(iter(feed.batches(0, 1)))["id"]
    assert len(batch) == 16
    assert np.bincount(batch, minlength=7).min() >= 2


def test_lane_without_rows_is_refused():
    with pytest.raises(ValueError, match="virtual rank 1 of 2 has no rows"):
        RowSampler([("s0", 1)], reader(), batch=1, ranks=[1], rank_count=2)
