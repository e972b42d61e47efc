"""The feed: a replayable, endless order of training rows over shards.

Which rows stand in batch ``k`` of a rank is a function of the seed, the shards and the number of ranks alone.
So a run that restarts at step ``k`` goes on with exactly the batches it would have had, without reading what
it has already used, and a whole schedule (all epochs) is one stream without a pause between epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ktray.rows import Rows


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


def rank_slices(shards: Sequence[tuple[str, int]], rank: int, world: int) -> list[Slice]:
    """The part of the shards (name, rows) that a rank trains on: whole shards, or rows of each when few."""
    if len(shards) >= 4 * world:
        return [Slice(name, rows) for name, rows in shards[rank::world] if rows]
    slices = [Slice(name, rows, rank, world) for name, rows in shards]
    return [s for s in slices if s.count]


class Feed:
    """This rank's batches.

    Args:
        shards: (name, rows) of every shard, the same list in the same order on every rank.
        read: reads windows; see `Reader`.
        batch: rows per batch on this rank.
        window_rows: rows that are read and shuffled together; at least all rows makes the feed resident:
            it reads once and keeps the rows.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, int]],
        read: Reader,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        window_rows: int = 1 << 62,
    ) -> None:
        self.slices = rank_slices(shards, rank, world)
        self.rows = sum(s.count for s in self.slices)
        if not self.rows:
            raise ValueError(f"rank {rank} of {world} has no rows in {len(shards)} shards")
        self.read, self.batch, self.seed, self.rank, self.window_rows = read, batch, seed, rank, window_rows
        self.resident = self.rows <= window_rows
        self._kept: Rows | None = None

    def _rng(self, epoch: int, window: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.rank, epoch, window])

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

    def _schedule(self, first_row: int, last_row: int) -> list[tuple[int, int, list[Slice], int, int]]:
        """(epoch, window, slices, first, last): the windows that hold rows first_row..last_row of the stream."""
        out = []
        epoch = first_row // self.rows
        position = epoch * self.rows
        while position < last_row:
            for number, window in enumerate(self.windows(epoch)):
                count = sum(s.count for s in window)
                if position + count > first_row and position < last_row:
                    out.append((epoch, number, window, max(0, first_row - position), min(count, last_row - position)))
                position += count
            epoch += 1
        return out

    def batches(self, start: int, stop: int) -> Iterator[Rows]:
        """Batches ``start``..``stop - 1``. Every batch is full; epochs follow each other without a gap.

        Beside the reader's columns a batch has ``visit`` (N,) int64: how often each row was there before.
        """
        schedule = self._schedule(start * self.batch, stop * self.batch)
        carried: Rows | None = None
        for (epoch, number, _, first, last), rows in zip(schedule, self._rows(schedule), strict=True):
            count = len(next(iter(rows.values())))
            rows = {**rows, "visit": np.full(count, epoch, dtype=np.int64)}
            order = self._rng(epoch, number).permutation(count)[first:last]
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

    def _rows(self, schedule: list[tuple[int, int, list[Slice], int, int]]) -> Iterator[Rows]:
        if not self.resident:
            yield from self.read([window for _, _, window, _, _ in schedule])
            return
        for _ in schedule:
            if self._kept is None:
                self._kept = next(iter(self.read([self.slices])))
            yield self._kept


def _len(rows: Rows) -> int:
    return len(next(iter(rows.values())))
