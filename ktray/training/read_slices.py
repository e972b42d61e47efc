"""The tasks that read slices of stored shards. They need no torch, which takes a new process seconds to load: the first
batch of a training waits for the slowest of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from ktray.distributed.device_work import Item
from ktray.distributed.packing import pack
from ktray.storage.columns import Rows, read_rows
from ktray.storage.store import Dir
from ktray.targets.jpeg import decode_views


class SliceTask:
    """Prepares the rows of a slice, as one row of a table."""

    def __init__(self, prepare: Callable[[Item], Rows]) -> None:
        self.prepare = prepare

    def __call__(self, batch: pa.Table) -> pa.Table:
        item = json.loads(batch.column("item")[0].as_py())
        return slice_table(item, self.prepare(item))


@dataclass(frozen=True)
class ReadSlice:
    """Reads the columns of a slice; ``version`` as in `ktray.storage.node_cache.read_through`."""

    directory: Dir
    columns: Sequence[str]
    version: str

    def __call__(self, item: Item) -> Rows:
        rows = read_rows(self.directory, item["shard"], self.columns, self.version)
        return decode_views(some_images(rows, item["start"], item["step"], item["views"]))


def slice_table(item: Item, rows: Rows) -> pa.Table:
    """The packed rows, and whether the slice is the last one of its window."""
    return pa.table({"columns": pack(rows), "last": [bool(item["last"])]})


def some_images(rows: Rows, start: int, step: int, views: int) -> Rows:
    """The rows of images ``start::step``; each ``views`` consecutive rows show one image."""
    if (start, step) == (0, 1):
        return rows
    return {k: v.reshape(-1, views, *v.shape[1:])[start::step].reshape(-1, *v.shape[1:]) for k, v in rows.items()}
