"""The sampler: a reproducible, endless order of training rows over shards.

The rows in batch ``k`` of a virtual rank (see `ktray.training.virtual_ranks`) only depend on the seed, the shards, the
size of a window and the number of virtual ranks. A run that restarts at step ``k``, with the same or another number of
workers, therefore continues with exactly the batches that it would have had, and does not read the rows again that it
has already used. All epochs are one stream without a pause between them.

Rows that stay in memory are shuffled together. Larger sets are read in windows of many shards in random order, of which
the first ones are small (`first_windows`), and each epoch divides the shards anew among the virtual ranks. Shards
contain images in random order (`ktray.stages.teach.items`), so that a window is a random sample of the set. In a
window, the views of an image are kept apart (`spread_views`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import merge
from itertools import islice

import numpy as np

from ktray.storage.columns import Rows
from ktray.training.weights import COPIES, WEIGHT, draw


@dataclass(frozen=True)
class Slice:
    """The rows of the images ``start::step`` of one shard. The shard has ``rows`` rows, and each ``views`` consecutive
    rows show one image."""

    shard: str
    rows: int
    start: int = 0
    step: int = 1
    views: int = 1

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(range(self.start, self.rows // self.views, self.step)) * self.views


Window = Sequence[Slice]
# Reads windows in order and yields one dict of columns per window; it may read ahead. The windows are computed when the
# reader takes them, because a long training has hundreds of thousands of slices.
Reader = Callable[[Iterable[Window]], Iterator[Rows]]


def rank_slices(
    shards: Sequence[tuple[str, int]], rank: int, count: int, views: int = 1, epoch: int = 0, seed: int | None = None
) -> list[Slice]:
    """The part of the shards (name, rows) that belongs to virtual rank ``rank`` of ``count`` in an epoch.

    It consists of whole shards, or, if there are few shards, of some images of each shard. The virtual ranks have all
    rows of the set together.

    Args:
        views: number of consecutive rows that show one image.
        seed: divides the shards in another way in each epoch; None: in the same way in all epochs.
    """
    start = rank if seed is None else (rank + epoch) % count  # the largest part has another rank in each epoch
    if len(shards) >= 4 * count:
        order = np.arange(len(shards)) if seed is None else _divide(seed, epoch).permutation(len(shards))
        own = [shards[i] for i in order[start::count]]
        return [Slice(name, rows, views=views) for name, rows in own if rows]
    # Every ``count``-th image of the set, so that the parts differ by at most one image.
    before = np.cumsum([0, *(rows // views for _, rows in shards)]).tolist()
    slices = [
        Slice(name, rows, (start - first) % count, count, views)
        for (name, rows), first in zip(shards, before, strict=False)
    ]
    return [s for s in slices if s.count]


def _divide(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, 1 << 31])


def spread_views(images: int, views: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of ``images * views`` rows, of which each ``views`` consecutive ones show one image.

    It has ``views`` rounds, each with one view of each image. The images of the first half of a round are also those of
    the first half of all others, so that at least half of the images come between two views of an image.

    Returns:
        (images * views,) int64 row numbers.
    """
    halves = np.array_split(rng.permutation(images), 2)
    view = rng.permuted(np.tile(np.arange(views), (images, 1)), axis=1)
    rounds = [np.concatenate([rng.permutation(half) for half in halves]) for _ in range(views)]
    return np.concatenate([order * views + view[order, number] for number, order in enumerate(rounds)])


def first_windows(window_rows: int, rows: int, least: int) -> list[int]:
    """Sizes of the first windows of a training, each twice that of the one before, up to ``window_rows``: the first
    batch waits until its whole window is read.

    Args:
        rows: of the epoch; at least as many as in the last small window remain.
        least: size of the smallest window whose batches have no two views of an image (`spread_views`).
    """
    sizes: list[int] = []
    size = max(least, window_rows // 32)
    while size < window_rows and sum(sizes) + 2 * size <= rows:
        sizes.append(size)
        size *= 2
    return sizes


@dataclass(frozen=True)
class _Part:
    """Rows ``first``..``last - 1`` (shuffled) of a window of an epoch; ``step`` is the first step that needs them."""

    epoch: int
    number: int
    window: Window
    first: int
    last: int
    step: int


class RowSampler:
    """The batches of a worker. Each batch consists of the batches of the worker's virtual ranks, one after the other.

    Args:
        shards: (name, rows) of every shard, the same list in the same order on every worker.
        read: reads windows; see `Reader`.
        batch: number of rows per batch of each virtual rank.
        ranks: the virtual ranks of the worker.
        rank_count: number of virtual ranks of all workers.
        seed: seed of all shuffles.
        window_rows: number of rows of a virtual rank that are read and shuffled together, up to one slice more; fewer
            at the beginning. If no
            virtual rank has more rows, all are resident: they keep the same rows in all epochs, read them once and
            hold them in memory.
        views: number of consecutive rows of a shard that show one image.
        weigh: a function from the rows of a window to their weights (N,), at least 0: how often each row of the window
            is drawn, relative to the mean of the window. None: each row is drawn once per epoch.

    Raises:
        ValueError: a virtual rank has no rows.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, int]],
        read: Reader,
        *,
        batch: int,
        ranks: Sequence[int] = (0,),
        rank_count: int = 1,
        seed: int = 0,
        window_rows: int = 1 << 62,
        views: int = 1,
        weigh: Callable[[Rows], np.ndarray] | None = None,
    ) -> None:
        self.read, self.weigh = read, weigh
        sizes = [sum(s.count for s in rank_slices(shards, n, rank_count, views)) for n in range(rank_count)]
        if not all(sizes):
            raise ValueError(f"virtual rank {sizes.index(0)} of {rank_count} has no rows in {len(shards)} shards")
        resident = max(sizes) <= window_rows

        def slices(rank: int) -> Callable[[int], list[Slice]]:
            if resident:
                same = rank_slices(shards, rank, rank_count, views)
                return lambda epoch: same
            return lambda epoch: rank_slices(shards, rank, rank_count, views, epoch, seed)

        self.streams = [_Stream(slices(n), batch, n, seed, window_rows, resident, views) for n in ranks]
        self._kept: dict[int, Rows] = {}

    def batches(self, start: int, stop: int) -> Iterator[Rows]:
        """Batches ``start``..``stop - 1``. Every batch is full, also at the end of an epoch.

        In addition to the reader's columns, a batch has the column ``visit`` (N,) int64: how often each row was used
        before; with weights, a number that is different for each use of a row.
        """
        owners: deque[int] = deque()  # the streams of the windows that the reader has taken
        windows: Iterator[Rows] | None = None
        waiting: list[deque[Rows]] = [deque() for _ in self.streams]

        def rows_of(number: int) -> Rows:
            nonlocal windows
            if number in self._kept:
                return self._kept[number]
            if windows is None:
                windows = iter(self.read(self._needed(start, stop, owners)))
            while not waiting[number]:
                rows = self._weighed(next(windows))
                waiting[owners.popleft()].append(rows)
            rows = waiting[number].popleft()
            if self.streams[number].resident:
                self._kept[number] = rows
            return rows

        batches = [
            stream.batches(stream.schedule(start, stop), partial(rows_of, number))
            for number, stream in enumerate(self.streams)
        ]
        for parts_of_batch in zip(*batches, strict=True):
            first = parts_of_batch[0]
            yield (
                first
                if len(parts_of_batch) == 1
                else {k: np.concatenate([part[k] for part in parts_of_batch]) for k in first}
            )

    def _needed(self, start: int, stop: int, owners: deque[int]) -> Iterator[Window]:
        """The windows that have to be read for batches ``start``..``stop - 1``, in the order in which the steps need
        them: all streams share one reader. The number of the stream of each is appended to ``owners``."""

        def parts_of(number: int) -> Iterator[tuple[int, int, Window]]:
            stream = self.streams[number]
            parts = stream.schedule(start, stop)
            if stream.resident:
                parts = islice(parts, number not in self._kept)
            for part in parts:
                yield part.step, number, part.window

        for _, number, window in merge(*map(parts_of, range(len(self.streams))), key=lambda entry: entry[:2]):
            owners.append(number)
            yield window

    def _weighed(self, rows: Rows) -> Rows:
        return {**rows, WEIGHT: self.weigh(rows)} if self.weigh else rows


class _Stream:
    """The rows of one virtual rank; ``slices`` gives those of each epoch."""

    def __init__(
        self,
        slices: Callable[[int], list[Slice]],
        batch: int,
        rank: int,
        seed: int,
        window_rows: int,
        resident: bool,
        views: int,
    ) -> None:
        self.slices, self.batch, self.rank, self.seed = slices, batch, rank, seed
        self.window_rows, self.resident, self.views = window_rows, resident, views

    def _rng(self, epoch: int, window: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.rank, epoch, window])

    def windows(self, epoch: int) -> list[list[Slice]]:
        """The windows of the epoch, in the order in which they are read."""
        slices = self.slices(epoch)
        if self.resident:
            return [slices]
        order = self._rng(epoch, 1 << 30).permutation(len(slices))
        rows = np.array([slices[i].count for i in order])
        ends = np.cumsum(rows)
        middle = ends - rows / 2
        sizes = first_windows(self.window_rows, ends[-1], 2 * self.views * self.batch) if epoch == 0 else []
        small = np.cumsum(np.array(sizes, dtype=np.int64))
        begun = small[-1] if len(small) else 0
        # The others have nearly equal size. The images of a very small one at the end would repeat within a batch.
        rest = ends[-1] - begun
        equal = ((middle - begun) / rest * -(-rest // self.window_rows)).astype(np.int64)
        number = np.where(middle < begun, np.searchsorted(small, middle), len(small) + equal)
        return [[slices[i] for i in order[number == window]] for window in np.unique(number)]

    def _begin(self, row: int) -> tuple[int, int]:
        """The epoch of a row of the stream, and the number of rows before this epoch."""
        epoch = position = 0
        while True:
            rows = sum(s.count for s in self.slices(epoch))
            if self.resident:  # all epochs have equally many rows
                return row // rows, row // rows * rows
            if position + rows > row:
                return epoch, position
            epoch, position = epoch + 1, position + rows

    def schedule(self, start: int, stop: int) -> Iterator[_Part]:
        """The windows that hold the rows of batches ``start``..``stop - 1``, computed one epoch at a time."""
        first_row, last_row = start * self.batch, stop * self.batch
        epoch, position = self._begin(first_row)
        while position < last_row:
            for number, window in enumerate(self.windows(epoch)):
                count = sum(s.count for s in window)
                if position + count > first_row and position < last_row:
                    used = max(0, first_row - position), min(count, last_row - position)
                    yield _Part(epoch, number, window, *used, max(position, first_row) // self.batch)
                position += count
            epoch += 1

    def batches(self, parts: Iterable[_Part], next_rows: Callable[[], Rows]) -> Iterator[Rows]:
        """The batches of ``parts``; ``next_rows`` returns the rows of the window of each part, in order."""
        carried: Rows | None = None
        for part in parts:
            rows: Rows = {}  # the next window can take over the memory of this one
            rows = next_rows()
            order, visit = self._drawn(part, rows)
            at = 0
            if carried is not None:
                at = min(self.batch - _len(carried), len(order))
                begun = _rows_at(rows, order[:at], visit[:at])
                carried = {k: np.concatenate([v, begun[k]]) for k, v in carried.items()}
                if _len(carried) < self.batch:
                    continue
                yield carried
                carried = None
            while at + self.batch <= len(order):
                end = at + self.batch
                yield _rows_at(rows, order[at:end], visit[at:end])
                at = end
            if at < len(order):
                carried = _rows_at(rows, order[at:], visit[at:])

    def _drawn(self, part: _Part, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the window of the rows of ``part``, in the order of use, and their ``visit``."""
        rng, count = self._rng(part.epoch, part.number), _len(rows)
        if WEIGHT in rows:
            order, copy = draw(rows[WEIGHT], rng)
            visit = part.epoch * COPIES + copy
        else:
            mixed = self.resident or self.views == 1
            order = rng.permutation(count) if mixed else spread_views(count // self.views, self.views, rng)
            visit = np.full(count, part.epoch, dtype=np.int64)
        return order[part.first : part.last], visit[part.first : part.last]


def _rows_at(rows: Rows, positions: np.ndarray, visit: np.ndarray) -> Rows:
    return {**{name: column[positions] for name, column in rows.items() if name != WEIGHT}, "visit": visit}


def _len(rows: Rows) -> int:
    return len(next(iter(rows.values())))
