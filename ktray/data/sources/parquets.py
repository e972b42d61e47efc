"""Images in Parquet files: as bytes, as ``{bytes, path}`` (Hugging Face), or as paths to files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import pyarrow as pa

from ktray.data.filesystem import MAX_FILE_BYTES, FileStat, why
from ktray.data.sources.base import Cut, Shard, Source, fingerprint
from ktray.data.sources.fetch import read_file
from ktray.data.sources.parquet_tables import caption_column, image_column, iter_rows, read_footer
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.uris import Held, ImageRef, resolve
from ktray.recipe.registries import SOURCES

PARQUET = "parquet"
PARQUET_SUFFIXES = (".parquet", ".pq")


class ParquetSource(Source):
    """Parquet files; a shard is a range of rows of one file."""

    noun, accepts, pattern, order = "Parquet files", ".parquet files", "*.parquet", 30
    lists_images = True

    def fits(self, path: str) -> bool:
        return is_parquet(path)

    def shards(self, files: Sequence[FileStat], cut: Cut) -> list[Shard]:
        with ThreadPoolExecutor(16) as pool:  # on S3, each footer takes a request
            return [shard for part in pool.map(lambda file: _shards(file, cut), files) for shard in part]

    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        return _read(shard)

    def parse(self, uri: str) -> ImageRef | None:
        match = ParquetRow.PATTERN.fullmatch(uri)
        if match is None:
            return None
        column = unquote(match["column"]) if match["column"] else None
        return ParquetRow(match["path"], row=int(match["row"]), column=column)

    def fetch(self, path: str, refs: Sequence[ImageRef]) -> list[Callable[[], Held]]:
        return [partial(_fetch_rows, path, [ref for ref in refs if isinstance(ref, ParquetRow)])]


@dataclass(frozen=True, kw_only=True)
class ParquetRow(ImageRef):
    """``X.parquet#row=R``: a row of a Parquet file; with ``&column=C`` if the user named the image column.

    Attributes:
        row: number of the row, from 0.
        column: the image column; None if it is detected.
    """

    row: int
    column: str | None = None
    kind: ClassVar[str] = PARQUET
    PATTERN: ClassVar[re.Pattern[str]] = re.compile(
        r"(?P<path>.+)#row=(?P<row>\d+)(?:&column=(?P<column>[^&#]+))?", re.DOTALL
    )

    @property
    def fragment(self) -> str:
        column = f"&column={quote(self.column, safe='')}" if self.column else ""
        return f"row={self.row}{column}"


def is_parquet(name: str) -> bool:
    return name.lower().endswith(PARQUET_SUFFIXES)


def _shards(file: FileStat, cut: Cut) -> list[Shard]:
    try:
        footer = read_footer(file.path)
    except (OSError, pa.ArrowException):
        return [Shard(PARQUET, (file.path,), fingerprint([file]), None)]  # reading reports the error
    images, captions = image_column(footer.schema, cut.column, file.path), caption_column(footer.schema)
    return [
        Shard(
            PARQUET,
            (file.path,),
            fingerprint([file], start, count, images),
            count,
            start,
            images,
            named=cut.column != "auto",
            caption=captions if captions != images else None,
        )
        for start, count in _ranges(footer.group_rows, cut.rows)
    ]


def _ranges(group_rows: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """(first, count) of ranges of about ``rows`` rows: several small row groups, or parts of large ones."""
    ranges: list[tuple[int, int]] = []
    first = count = 0
    for group in group_rows:
        if count and count + group > rows:
            ranges.append((first, count))
            first, count = first + count, 0
        count += group
        while count > rows:
            ranges.append((first, rows))
            first, count = first + rows, count - rows
    return [*ranges, (first, count)] if count else ranges


def _read(shard: Shard) -> Iterator[ImageRecord]:
    path = shard.paths[0]
    if shard.column is None or shard.count is None:
        yield ImageRecord(path, None, error=f"broken Parquet file: {_broken(path)}")
        return
    columns = [shard.column, *([shard.caption] if shard.caption else [])]
    named = shard.column if shard.named else None
    next_row = shard.start
    last = shard.start + shard.count
    try:
        for row, values in iter_rows(path, columns, range(shard.start, last)):
            uri, data, error = _cell(values[shard.column], path, ParquetRow(path, row=row, column=named))
            yield ImageRecord(uri, data, values.get(shard.caption) if shard.caption else None, error)
            next_row = row + 1
    except Exception as error:  # pyarrow raises its own types, OSError and ValueError on broken pages
        for row in range(next_row, last):
            uri = str(ParquetRow(path, row=row, column=named))
            yield ImageRecord(uri, None, error=f"broken Parquet file: {why(error)}")


def _broken(path: str) -> str:
    try:
        read_footer(path)
    except Exception as error:
        return why(error)
    return "the file was broken when it was listed, and has changed since"


def _cell(value: Any, path: str, ref: ParquetRow) -> tuple[str, bytes | None, str | None]:
    """The uri, content and error of one cell, which has bytes, ``{bytes, path}`` or a path."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        if len(value) > MAX_FILE_BYTES:
            return str(ref), None, f"the image is larger than {MAX_FILE_BYTES >> 20} MiB"
        return str(ref), value, None
    if not value:
        return str(ref), None, "the cell is empty"
    uri = resolve(str(value), path)
    if isinstance(ImageRef.parse(uri), ParquetRow):  # the uri may refer to this cell, without end
        return uri, None, "the Parquet cell refers to another Parquet cell"
    return uri, *read_file(uri)


def _fetch_rows(path: str, refs: Sequence[ParquetRow]) -> Held:
    contents: Held = {}
    for column in dict.fromkeys(ref.column for ref in refs):
        by_row = {ref.row: ref for ref in refs if ref.column == column}
        try:
            name = image_column(read_footer(path).schema, column or "auto", path)
            for row, values in iter_rows(path, [name], sorted(by_row)):
                contents[by_row[row]] = _cell(values[name], path, by_row[row])[1:]
        except Exception as error:
            for ref in by_row.values():
                contents.setdefault(ref, (None, f"broken Parquet file: {why(error)}"))
    return contents


SOURCES.register(PARQUET)(ParquetSource())
