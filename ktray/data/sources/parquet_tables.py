"""Parquet files as tables: detection of the image column, and reading of selected rows."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ktray.data import filesystem
from ktray.errors import KtrayError

BYTES_NAMES = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp", "content", "data")
PATH_NAMES = ("path", "uri", "file", "filename", "file_name", "filepath", "image", "image_path")
CAPTION_NAMES = ("caption", "text", "txt")
# Names of the column with the label, the preferred ones first.
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target", "fine_label", "coarse_label")
# Instead of a whole row group, a batch of rows is in memory at a time; it has fewer rows if they may be large.
_BATCH_ROWS = 64
_BATCH_BYTES = 1 << 32
# Limits as for tar shards, because images hardly compress.
MAX_UNPACKED_RATIO = 100
MAX_UNPACKED_FLOOR = 1 << 28


@dataclass(frozen=True)
class Footer:
    """Schema of a Parquet file, and the number of rows of each row group."""

    schema: pa.Schema
    group_rows: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


def read_footer(path: str) -> Footer:
    """Read the footer. Raises OSError or pyarrow's errors if the file is incomplete."""
    with filesystem.open_random(path) as stream, pq.ParquetFile(stream) as file:
        groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        return Footer(file.schema_arrow, groups)


def holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and holds_bytes(kind.field(at).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


# Columns of bytes with these names are text: Spark writes text without saying that it is text.
_TEXT_NAMES = (
    "path", "uri", "url", "filename", "file_name", "filepath", "image_path", "label", "labels", "class", "category",
    "split", "group", "caption", "text", "txt", "id", "key",
)  # fmt: skip


def holds_image(column: pa.Field) -> bool:
    """Whether a column may hold encoded images."""
    plain = not pa.types.is_struct(column.type)
    return holds_bytes(column.type) and not (plain and column.name.lower() in _TEXT_NAMES)


def holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def image_column(schema: pa.Schema, wanted: str = "auto", where: str = "") -> str:
    """The image column: the named column, or for ``auto`` the column that matches by type and name.

    Columns with bytes have priority over columns with paths.

    Raises:
        KtrayError: there is no such column, it has a wrong type, or no column or several columns match.
    """
    listed = ", ".join(f"{f.name} ({f.type})" for f in schema) or "none"
    if wanted != "auto":
        if wanted not in schema.names:
            near = difflib.get_close_matches(wanted, schema.names, n=1, cutoff=0.0)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise KtrayError(f"'{where}' has no column '{wanted}'", f"{hint}The columns are {listed}.")
        kind = schema.field(wanted).type
        if not holds_bytes(kind) and not holds_text(kind):
            raise KtrayError(
                f"Column '{wanted}' of '{where}' has the type {kind}, which is neither image bytes nor paths",
                f"Its columns are {listed}.",
            )
        return wanted
    with_bytes = [f.name for f in schema if holds_image(f)]
    path_column = _named([f.name for f in schema if _is_text(f)], PATH_NAMES)
    bytes_column = _named(with_bytes, BYTES_NAMES) or (with_bytes[0] if len(with_bytes) == 1 else None)
    if bytes_column is None and len(with_bytes) > 1:
        raise KtrayError(
            f"'{where}' has several columns of bytes: {', '.join(with_bytes)}", "Set gallery.column to one of them."
        )
    if bytes_column is None and path_column is None:
        raise KtrayError(
            f"'{where}' has no column that is recognised as the image column",
            f"Set gallery.column to one of its columns: {listed}.",
        )
    return bytes_column or str(path_column)


def caption_column(schema: pa.Schema) -> str | None:
    return _named([f.name for f in schema if _is_text(f)], CAPTION_NAMES)


def _is_text(column: pa.Field) -> bool:
    return holds_text(column.type) or (holds_bytes(column.type) and not holds_image(column))


def _named(columns: Sequence[str], preferred: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(columns)}
    return next((lower[name] for name in preferred if name in lower), None)


def iter_rows(path: str, columns: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Selected rows (ascending, without repeats) of the columns, as (row, values). The file is opened once.

    Only row groups with a selected row are read, in small batches.

    Raises:
        OSError, pyarrow.ArrowException: the file is broken. The rows before the broken part are returned first.
    """
    with filesystem.open_random(path) as stream, pq.ParquetFile(stream) as file:
        position = first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            last = position
            while last < len(rows) and rows[last] < first + count:
                last += 1
            if last > position:
                yield from _group_rows(file, group, columns, rows[position:last], first)
            position, first = last, first + count
        if position < len(rows):
            raise OSError(
                f"row {rows[position]} does not exist, the file has {first} rows: it has changed since it was listed"
            )


def _group_rows(
    file: pq.ParquetFile, group: int, columns: Sequence[str], rows: Sequence[int], first: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    at = 0
    size = _batch_rows(file, group, columns)
    for batch in file.iter_batches(size, row_groups=[group], columns=list(columns), use_threads=False):
        while at < len(rows) and rows[at] < first + batch.num_rows:
            row = batch.slice(rows[at] - first, 1)
            yield rows[at], {name: row.column(name)[0].as_py() for name in columns}
            at += 1
        first += batch.num_rows
        if at == len(rows):
            return


def _batch_rows(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """The number of rows per batch, calculated from the sizes in the footer.

    Raises:
        OSError: a column unpacks to far more than its compressed size, which images do not.
    """
    chunks = (file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns))
    read = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
    for chunk in read:
        unpacked = chunk.total_uncompressed_size
        if unpacked > max(MAX_UNPACKED_FLOOR, MAX_UNPACKED_RATIO * chunk.total_compressed_size):
            raise OSError(f"it unpacks to more than {MAX_UNPACKED_RATIO} times its size: refused as a bomb")
    # A dictionary stores a value once, and any number of rows may repeat it.
    largest = sum(chunk.total_uncompressed_size for chunk in read)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))
