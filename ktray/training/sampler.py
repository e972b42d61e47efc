"""The sampler: a reproducible, endless order of training rows over shards.

The rows in batch ``k`` of a virtual rank (see `ktray.training.virtual_ranks`) only depend on the seed, the shards and
the number of virtual ranks. A run that restarts at step ``k``, with the same or another number of workers, therefore
continues with exactly the batches that it would have had, and does not read the rows again that it has already used.
All epochs are one stream without a pause between them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ktray.storage.columns import Rows
from ktray.training.weights import COPIES, WEIGHT, draw


@dataclass(frozen=True)
class Slice:
    """The rows ``start::step`` of one shard, which has ``rows`` rows."""

    shard: str
    rows: int
    start: int = 0
    step: int = 1

    @property
    def count(self) -> int:
        return len(range(self.start, self.rows, self.step))


Window = Sequence[Slice]
# Reads windows in order and yields one dict of columns per window; it may read ahead.
Reader = Callable[[Sequence[Window]], Iterator[Rows]]


def rank_slices(shards: Sequence[tuple[str, int]], rank: int, count: int) -> list[Slice]:
    """The part of the shards (name, rows) that belongs to virtual rank ``rank`` of ``count``.

    It consists of whole shards, or, if there are few shards, of some rows of each shard.
    """
    if len(shards) >= 4 * count:
        return [Slice(name, rows) for name, rows in shards[rank::count] if rows]
    slices = [Slice(name, rows, rank, count) for name, rows in shards]
    return [s for s in slices if s.count]


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
        window_rows: number of rows of a virtual rank that are read and shuffled together. If it is at least the number
            of all rows of the virtual rank, the virtual rank is resident: its rows are read once and kept in memory.
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
        weigh: Callable[[Rows], np.ndarray] | None = None,
    ) -> None:
        self.read, self.weigh = read, weigh
        self.streams = [_Stream(rank_slices(shards, n, rank_count), batch, n, seed, window_rows) for n in ranks]
        for stream in self.streams:
            if not stream.rows:
                raise ValueError(f"virtual rank {stream.rank} of {rank_count} has no rows in {len(shards)} shards")
        self._kept: dict[int, Rows] = {}

    def batches(self, start: int, stop: int) -> Iterator[Rows]:
        """Batches ``start``..``stop - 1``. Every batch is full, also at the end of an epoch.

        In addition to the reader's columns, a batch has the column ``visit`` (N,) int64: how often each row was used
        before; with weights, a number that is different for each use of a row.
        """
        plans = [stream.schedule(start, stop) for stream in self.streams]
        # All streams share one reader, which reads the windows in the order in which the steps need them.
        needed = sorted(
            (part.step, number, at)
            for number, (stream, parts) in enumerate(zip(self.streams, plans, strict=True))
            for at, part in enumerate(parts)
            if not stream.resident or (at == 0 and number not in self._kept)
        )
        windows = iter(self.read([plans[number][at].window for _, number, at in needed]) if needed else ())
        owners = iter(number for _, number, _ in needed)
        waiting: list[deque[Rows]] = [deque() for _ in self.streams]

        def rows_of(number: int) -> Iterator[Rows]:
            for _ in plans[number]:
                if number in self._kept:
                    yield self._kept[number]
                    continue
                while not waiting[number]:
                    waiting[next(owners)].append(self._weighed(next(windows)))
                rows = waiting[number].popleft()
                if self.streams[number].resident:
                    self._kept[number] = rows
                yield rows

        batches = [
            stream.batches(parts, rows_of(number))
            for number, (stream, parts) in enumerate(zip(self.streams, plans, strict=True))
        ]
        for parts_of_batch in zip(*batches, strict=True):
            first = parts_of_batch[0]
            yield (
                first
                if len(parts_of_batch) == 1
                else {k: np.concatenate([part[k] for part in parts_of_batch]) for k in first}
            )

    def _weighed(self, rows: Rows) -> Rows:
        return {**rows, WEIGHT: self.weigh(rows)} if self.weigh else rows


class _Stream:
    """The rows of one virtual rank."""

    def __init__(self, slices: list[Slice], batch: int, rank: int, seed: int, window_rows: int) -> None:
        self.slices, self.batch, self.rank, self.seed = slices, batch, rank, seed
        self.rows = sum(s.count for s in slices)
        self.window_rows, self.resident = window_rows, self.rows <= window_rows

    def _rng(self, epoch: int, window: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.rank, epoch, window])

    def windows(self, epoch: int) -> list[list[Slice]]:
        """The windows of the epoch, in the order in which they are read."""
        if self.resident:
            return [self.slices]
        order = self._rng(epoch, 1 << 30).permutation(len(self.slices))
        windows: list[list[Slice]] = [[]]
        filled = 0
        for i in order:
            if filled and filled + self.slices[i].count > self.window_rows:
                windows.append([])
                filled = 0
            windows[-1].append(self.slices[i])
            filled += self.slices[i].count
        return windows

    def schedule(self, start: int, stop: int) -> list[_Part]:
        """The windows that hold the rows of batches ``start``..``stop - 1``."""
        first_row, last_row = start * self.batch, stop * self.batch
        parts = []
        epoch = first_row // self.rows
        position = epoch * self.rows
        while position < last_row:
            for number, window in enumerate(self.windows(epoch)):
                count = sum(s.count for s in window)
                if position + count > first_row and position < last_row:
                    used = max(0, first_row - position), min(count, last_row - position)
                    parts.append(_Part(epoch, number, window, *used, max(position, first_row) // self.batch))
                position += count
            epoch += 1
        return parts

    def batches(self, parts: list[_Part], windows: Iterator[Rows]) -> Iterator[Rows]:
        """The batches of ``parts``; ``windows`` yields the rows of each part's window."""
        carried: Rows | None = None
        for part, rows in zip(parts, windows, strict=True):
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
            order, visit = rng.permutation(count), np.full(count, part.epoch, dtype=np.int64)
        return order[part.first : part.last], visit[part.first : part.last]


def _rows_at(rows: Rows, positions: np.ndarray, visit: np.ndarray) -> Rows:
    return {**{name: column[positions] for name, column in rows.items() if name != WEIGHT}, "visit": visit}


def _len(rows: Rows) -> int:
    return len(next(iter(rows.values())))
