"""Shards read from start to end."""

from __future__ import annotations

from collections.abc import Iterator

from ktray.data import filesystem
from ktray.data.filesystem import why
from ktray.data.sources.clip_retrieval import read_records
from ktray.data.sources.fetch import _cell, _read_files
from ktray.data.sources.listing import Shard
from ktray.data.sources.parquets import iter_rows, read_footer
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.tars import read_tar
from ktray.data.sources.uris import ImageRef


def read_shard(shard: Shard) -> Iterator[ImageRecord]:
    """The shard's images in order, encoded, one in memory at a time (Parquet: a batch; files on S3: some dozens)."""
    if shard.kind == "files":
        captions = shard.captions or (None,) * len(shard.paths)
        files = _read_files([path for path in shard.paths if filesystem.printable(path) == path])
        for path, caption in zip(shard.paths, captions, strict=True):
            if filesystem.printable(path) != path:
                yield ImageRecord(filesystem.printable(path), None, error="the file's name is not UTF-8: rename it")
                continue
            data, error = next(files)
            yield ImageRecord(path, data, caption, error)
    elif shard.kind == "tar":
        yield from read_tar(shard.paths[0])
    elif shard.kind == "embedded":
        yield from (record for _, record in read_records(shard))
    else:
        yield from _read_parquet(shard)


def _read_parquet(shard: Shard) -> Iterator[ImageRecord]:
    path = shard.paths[0]
    if shard.column is None or shard.count is None:
        yield ImageRecord(path, None, error=f"broken Parquet file: {_broken(path)}")
        return
    columns = [shard.column, *([shard.caption] if shard.caption else [])]
    named = shard.column if shard.named else None
    done = shard.start
    last = shard.start + shard.count
    try:
        for row, values in iter_rows(path, columns, range(shard.start, last)):
            uri, data, error = _cell(values[shard.column], path, ImageRef(path, row=row, column=named))
            yield ImageRecord(uri, data, values.get(shard.caption) if shard.caption else None, error)
            done = row + 1
    except Exception as error:  # pyarrow raises its own types, OSError and ValueError on broken pages
        for row in range(done, last):
            uri = str(ImageRef(path, row=row, column=named))
            yield ImageRecord(uri, None, error=f"broken Parquet file: {why(error)}")


def _broken(path: str) -> str:
    try:
        read_footer(path)
    except Exception as error:
        return why(error)
    return "it was broken when it was listed and has changed since"
