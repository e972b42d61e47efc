"""The feed: a replayable, endless order of training rows over shards.

Which rows stand in batch ``k`` of a lane (see `virtual_ranks`) is a function of the seed, the shards and the
number of lanes alone. So a run that restarts at step ``k``, with as many workers or with others, goes on with exactly
the batches it would have had, without reading what it has already used, and a whole schedule (all epochs) is one stream
without a pause between epochs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ktray.storage.columns import Rows


@dataclass(frozen=True)
class Slice:
    """Rows ``start::step`` of one shard."""

    shard: str
    rows: int
    start: int = 0
    step: int = 1

    @property
    def count(self) -> int:
        return len(range(self.start, self.rows, self.step))


Window = Sequence[Slice]
# Reads windows in order, one dict of columns per window; it may read ahead.
Reader = Callable[[Sequence[Window]], Iterator[Rows]]


def lane_slices(shards: Sequence[tuple[str, int]], lane: int, of: int) -> list[Slice]:
    """The part of the shards (name, rows) that is a lane's: whole shards, or rows of each when few."""
    if len(shards) >= 4 * of:
        return [Slice(name, rows) for name, rows in shards[lane::of] if rows]
    slices = [Slice(name, rows, lane, of) for name, rows in shards]
    return [s for s in slices if s.count]


@dataclass(frozen=True)
class _Part:
    """Rows ``first``..``last - 1`` (shuffled) of a window of an epoch; ``step`` is the first that needs them."""

    epoch: int
    number: int
    window: Window
    first: int
    last: int
    step: int


class RowSampler:
    """The batches of a worker: one after the other, those of its lanes.

    Args:
        shards: (name, rows) of every shard, the same list in the same order on every worker.
        read: reads windows; see `Reader`.
        batch: rows per batch of each lane.
        lanes, of: which lanes, of how many.
        window_rows: rows of a lane that are read and shuffled together; at least all rows makes the lane resident:
            it reads once and keeps the rows.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, int]],
        read: Reader,
        *,
        batch: int,
        lanes: Sequence[int] = (0,),
        of: int = 1,
        seed: int = 0,
        window_rows: int = 1 << 62,
    ) -> None:
        self.read = read
        self.lanes = [_Lane(lane_slices(shards, n, of), batch, n, seed, window_rows) for n in lanes]
        for lane in self.lanes:
            if not lane.rows:
                raise ValueError(f"lane {lane.number} of {of} has no rows in {len(shards)} shards")
        self._kept: dict[int, Rows] = {}

    def batches(self, start: int, stop: int) -> Iterator[Rows]:
        """Batches ``start``..``stop - 1``. Every batch is full; epochs follow each other without a gap.

        Beside the reader's columns a batch has ``visit`` (N,) int64: how often each row was there before.
        """
        plans = [lane.schedule(start, stop) for lane in self.lanes]
        # One reader for all lanes, whose windows come in the order in which the steps need them.
        wanted = sorted(
            (part.step, number, at)
            for number, (lane, parts) in enumerate(zip(self.lanes, plans, strict=True))
            for at, part in enumerate(parts)
            if not lane.resident or (at == 0 and number not in self._kept)
        )
        windows = iter(self.read([plans[number][at].window for _, number, at in wanted]) if wanted else ())
        owners = iter(number for _, number, _ in wanted)
        waiting: list[deque[Rows]] = [deque() for _ in self.lanes]

        def rows_of(number: int) -> Iterator[Rows]:
            for _ in plans[number]:
                if number in self._kept:
                    yield self._kept[number]
                    continue
                while not waiting[number]:
                    waiting[next(owners)].append(next(windows))
                rows = waiting[number].popleft()
                if self.lanes[number].resident:
                    self._kept[number] = rows
                yield rows

        streams = [
            lane.batches(parts, rows_of(number))
            for number, (lane, parts) in enumerate(zip(self.lanes, plans, strict=True))
        ]
        for found in zip(*streams, strict=True):
            yield found[0] if len(found) == 1 else {k: np.concatenate([b[k] for b in found]) for k in found[0]}


class _Lane:
    def __init__(self, slices: list[Slice], batch: int, number: int, seed: int, window_rows: int) -> None:
        self.slices, self.batch, self.number, self.seed = slices, batch, number, seed
        self.rows = sum(s.count for s in slices)
        self.window_rows, self.resident = window_rows, self.rows <= window_rows

    def _rng(self, epoch: int, window: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.number, epoch, window])

    def windows(self, epoch: int) -> list[list[Slice]]:
        """The epoch's windows in the order they are read."""
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
        out = []
        epoch = first_row // self.rows
        position = epoch * self.rows
        while position < last_row:
            for number, window in enumerate(self.windows(epoch)):
                count = sum(s.count for s in window)
                if position + count > first_row and position < last_row:
                    used = max(0, first_row - position), min(count, last_row - position)
                    out.append(_Part(epoch, number, window, *used, max(position, first_row) // self.batch))
                position += count
            epoch += 1
        return out

    def batches(self, parts: list[_Part], windows: Iterator[Rows]) -> Iterator[Rows]:
        """The batches that the rows of ``windows``, one of each part, make."""
        carried: Rows | None = None
        for part, rows in zip(parts, windows, strict=True):
            count = _len(rows)
            rows = {**rows, "visit": np.full(count, part.epoch, dtype=np.int64)}
            order = self._rng(part.epoch, part.number).permutation(count)[part.first : part.last]
            at = 0
            if carried is not None:
                need = self.batch - _len(carried)
                carried = {k: np.concatenate([v, rows[k][order[:need]]]) for k, v in carried.items()}
                at = min(need, len(order))
                if _len(carried) < self.batch:
                    continue
                yield carried
                carried = None
            while at + self.batch <= len(order):
                take = order[at : at + self.batch]
                yield {k: v[take] for k, v in rows.items()}
                at += self.batch
            if at < len(order):
                carried = {k: v[order[at:]] for k, v in rows.items()}


def _len(rows: Rows) -> int:
    return len(next(iter(rows.values())))
