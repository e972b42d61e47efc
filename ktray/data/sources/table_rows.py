"""Sources whose images are rows of tables: as bytes, as ``{bytes, path}`` (Hugging Face), or as paths to files.

A subclass of `RowSource` describes a table (`RowSource.footer`) and reads rows of it (`RowSource.rows`); uris, shards,
captions and labels are the same for all of them.
"""

from __future__ import annotations

import contextlib
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import pyarrow as pa

from ktray.data.filesystem import MAX_FILE_BYTES, FileStat, why
from ktray.data.sources.base import Cut, LabelTable, Shard, Source, fingerprint
from ktray.data.sources.fetch import fetch, read_file
from ktray.data.sources.parquet_tables import Footer, caption_column, holds_image, image_column
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.uris import Held, ImageRef, One, resolve
from ktray.errors import KtrayError
from ktray.storage.concurrent import AT_ONCE


@dataclass(frozen=True, kw_only=True)
class RowRef(ImageRef):
    """``X#WORD=R``: a row of a table; with ``&column=C`` if the user named the image column.

    Attributes:
        row: number of the row, from 0.
        column: the image column; None if it is detected.
        word: the word before the number, which is different for each source.
    """

    row: int
    column: str | None = None
    word: ClassVar[str]

    @property
    def fragment(self) -> str:
        column = f"&column={quote(self.column, safe='')}" if self.column else ""
        return f"{self.word}={self.row}{column}"

    @classmethod
    def pattern(cls) -> re.Pattern[str]:
        return re.compile(rf"(?P<path>.+)#{cls.word}=(?P<row>\d+)(?:&column=(?P<column>[^&#]+))?", re.DOTALL)


class RowSource(Source):
    """A source of tables; a shard is a range of rows of one table."""

    lists_images = True
    labelled = True
    ref: type[RowRef]
    """The uris of its rows."""
    form: str
    """What a table is in messages, such as ``Parquet file``."""

    @abstractmethod
    def footer(self, path: str) -> Footer:
        """The columns and the numbers of rows of a table.

        Raises:
            OSError, ValueError, pyarrow's errors: the table is damaged.
        """

    @abstractmethod
    def rows(self, path: str, columns: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Selected rows (ascending, without repeats) of the columns, as (row, values), with few in memory at a time.

        Raises:
            OSError, ValueError, pyarrow's errors: the table is damaged. The rows before the damage come first.
        """

    @abstractmethod
    def columns(self, path: str, names: Sequence[str]) -> dict[str, list[Any]]:
        """Whole columns without images, by name.

        Raises:
            OSError, ValueError, pyarrow's errors: the table is damaged.
        """

    def shards(self, files: Sequence[FileStat], cut: Cut) -> list[Shard]:
        with ThreadPoolExecutor(16) as pool:  # on a remote store, each footer takes a request
            return [shard for part in pool.map(lambda file: self._shards(file, cut), files) for shard in part]

    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        path = shard.paths[0]
        if shard.column is None or shard.count is None:
            yield ImageRecord(path, None, error=f"broken {self.form}: {self._why_broken(path)}")
            return
        named: list[ImageRecord] = []  # records whose cells name an image, which is fetched for several at a time
        for record in self._records(shard, shard.column, shard.count):
            if record.data is None and record.error is None:
                named.append(record)
            if len(named) == AT_ONCE or (named and record is not named[-1]):
                yield from _fetched(named)
                named = []
            if record.data is not None or record.error is not None:
                yield record
        yield from _fetched(named)

    def _records(self, shard: Shard, column: str, count: int) -> Iterator[ImageRecord]:
        """The rows of a shard; those whose cells name an image have neither data nor an error."""
        path, caption = shard.paths[0], shard.caption
        named = column if shard.named else None
        next_row, last = shard.start, shard.start + count
        try:
            for row, values in self.rows(path, [column, *([caption] if caption else [])], range(shard.start, last)):
                uri, data, error = _cell(values[column], path, self.ref(path, row=row, column=named))
                next_row = row + 1
                yield ImageRecord(uri, data, values.get(caption) if caption else None, error)
        except Exception as error:  # pyarrow raises its own types, OSError and ValueError on broken pages
            for row in range(next_row, last):
                uri = str(self.ref(path, row=row, column=named))
                yield ImageRecord(uri, None, error=f"broken {self.form}: {why(error)}")

    def parse(self, uri: str) -> ImageRef | None:
        match = self.ref.pattern().fullmatch(uri)
        if match is None:
            return None
        column = unquote(match["column"]) if match["column"] else None
        return self.ref(match["path"], row=int(match["row"]), column=column)

    def fetch(self, path: str, refs: Sequence[ImageRef]) -> list[Callable[[], Held]]:
        return [partial(self._fetch, path, [ref for ref in refs if isinstance(ref, RowRef)])]

    def tables(self, path: str, file: FileStat | None) -> list[LabelTable]:
        return [self.label_table(path)]

    def label_table(self, path: str, split: str | None = None, version: str = "") -> LabelTable:
        """The labels of a table; see `LabelTable` for the arguments.

        Raises:
            KtrayError: the table is damaged.
        """
        with self._whole(path):
            footer = self.footer(path)
        inside = any(holds_image(f) for f in footer.schema)
        images = image_column(footer.schema, "auto", path) if inside else None

        def uri(row: int) -> str:
            return str(self.ref(path, row=row))

        def read(names: Sequence[str]) -> dict[str, list[Any]]:
            try:
                return self.columns(path, names)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise KtrayError(
                    f"List '{path}' is not a complete {self.form}: {why(error)}", "Write it again."
                ) from error

        place = uri if inside else None
        return LabelTable(path, footer.schema, footer.rows, read, place, images, split, version=version)

    def _shards(self, file: FileStat, cut: Cut) -> list[Shard]:
        name = self.ref.kind
        try:
            footer = self.footer(file.path)
        except (OSError, ValueError, pa.ArrowException):
            return [Shard(name, (file.path,), fingerprint([file]), None)]  # reading reports the error
        images, captions = image_column(footer.schema, cut.column, file.path), caption_column(footer.schema)
        return [
            Shard(
                name,
                (file.path,),
                fingerprint([file], start, count, images),
                count,
                start,
                images,
                named=cut.column != "auto",
                caption=captions if captions != images else None,
            )
            for start, count in ranges(footer.group_rows, cut.rows)
        ]

    @contextlib.contextmanager
    def _whole(self, path: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, pa.ArrowException) as error:
            raise KtrayError(f"List '{path}' is not a complete {self.form}: {why(error)}", "Write it again.") from error

    def _why_broken(self, path: str) -> str:
        try:
            self.footer(path)
        except Exception as error:
            return why(error)
        return "the file was broken when it was listed, and has changed since"

    def _fetch(self, path: str, refs: Sequence[RowRef]) -> Held:
        contents: Held = {}
        for column in dict.fromkeys(ref.column for ref in refs):
            by_row = {ref.row: ref for ref in refs if ref.column == column}
            try:
                name = image_column(self.footer(path).schema, column or "auto", path)
                for row, values in self.rows(path, [name], sorted(by_row)):
                    uri, data, error = _cell(values[name], path, by_row[row])
                    contents[by_row[row]] = _file_of(uri) if data is None and error is None else (data, error)
            except Exception as error:
                for ref in by_row.values():
                    contents.setdefault(ref, (None, f"broken {self.form}: {why(error)}"))
        return contents


def ranges(group_rows: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """(first, count) of ranges of about ``rows`` rows: several small row groups, or parts of large ones."""
    found: list[tuple[int, int]] = []
    first = count = 0
    for group in group_rows:
        if count and count + group > rows:
            found.append((first, count))
            first, count = first + count, 0
        count += group
        while count > rows:
            found.append((first, rows))
            first, count = first + rows, count - rows
    return [*found, (first, count)] if count else found


def _fetched(records: Sequence[ImageRecord]) -> Iterator[ImageRecord]:
    """The records with the images that their uris name."""
    for record, (uri, data, error) in zip(records, fetch([record.uri for record in records]), strict=True):
        yield ImageRecord(uri, data, record.caption, error)


def _file_of(uri: str) -> One:
    """The content of the file that a cell names. A cell that another cell names must not name a third: they might name
    each other without end."""
    if isinstance(ImageRef.parse(uri), RowRef):
        return None, "the cell of a table refers to a cell that refers to another cell"
    return read_file(uri)


def _cell(value: Any, path: str, ref: RowRef) -> tuple[str, bytes | None, str | None]:
    """The uri, content and error of one cell, which has bytes, ``{bytes, path}`` or a path. If it names its image,
    there is neither content nor error."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        if len(value) > MAX_FILE_BYTES:
            return str(ref), None, f"the image is larger than {MAX_FILE_BYTES >> 20} MiB"
        return str(ref), value, None
    if not value:
        return str(ref), None, "the cell is empty"
    return resolve(str(value), path), None, None
