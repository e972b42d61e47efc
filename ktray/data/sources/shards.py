"""Shards read from start to end, whatever source they are of."""

from __future__ import annotations

from collections.abc import Iterator

from ktray.data.sources.base import Shard
from ktray.data.sources.records import ImageRecord


def read_shard(shard: Shard) -> Iterator[ImageRecord]:
    """The shard's images in order, encoded, one in memory at a time (Parquet: a batch; files on S3: some dozens)."""
    yield from shard.source.read(shard)
