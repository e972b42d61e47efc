"""Sequential reading of shards of any source."""

from __future__ import annotations

from collections.abc import Iterator

from ktray.data.sources.base import Shard
from ktray.data.sources.records import ImageRecord


def read_shard(shard: Shard) -> Iterator[ImageRecord]:
    """The encoded images of a shard, in order, one in memory at a time (Parquet: a batch; files on S3: several dozen)."""
    yield from shard.source.read(shard)
