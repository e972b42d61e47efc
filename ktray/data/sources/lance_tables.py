"""Tables of Lance: folders ``X.lance``, with images and optionally their embeddings. The package is pylance
(``ktray[lance]``).

If a table has a column of vectors and ``gallery.column`` is not set, its vectors are used for the index, which compares
some of them with the teacher's. With ``gallery.column=NAME``, the teacher embeds the images. Uris name the version of
the table, because rows have other numbers after rows were deleted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ktray.data import filesystem
from ktray.data.extras import require
from ktray.data.filesystem import FileStat, why
from ktray.data.sources.base import Cut, LabelTable, Shard
from ktray.data.sources.parquet_tables import Footer
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.table_rows import RowRef, RowSource
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES
from ktray.storage import s3

LANCE, VECTORS = "lance", "lance_vectors"
_VERSIONS = "_versions"
_NAMES = ("embedding", "embeddings", "vector", "vectors")
_TOGETHER = 64  # rows that one request takes
_AT = re.compile(r"(?P<folder>.+)@(?P<version>\d+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class LanceRow(RowRef):
    """``X.lance@VERSION#lance=R``."""

    kind: ClassVar[str] = LANCE
    word: ClassVar[str] = "lance"


class LanceSource(RowSource):
    """Tables of Lance without vectors. Their paths are ``FOLDER@VERSION``."""

    order, lists_images = 45, False
    ref, form = LanceRow, "table of Lance"

    def fits_folder(self, folder: str) -> bool:
        return _is_lance(folder) and not _vector_column(_open(folder, None).schema)

    def folder_shards(self, folder: str, images: str | Sequence[str] | None, cut: Cut) -> list[Shard]:
        return self.shards([_newest(folder)], cut)

    def footer(self, path: str) -> Footer:
        table = _at(path)
        return Footer(table.schema, tuple(fragment.count_rows() for fragment in table.get_fragments()))

    def rows(self, path: str, columns: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        table = _at(path)
        total = table.count_rows()
        if len(rows) and rows[-1] >= total:
            raise OSError(f"row {rows[-1]} does not exist, the table has {total} rows")
        for first in range(0, len(rows), _TOGETHER):
            part = list(rows[first : first + _TOGETHER])
            try:
                found = table.take(part, columns=list(columns)).to_pylist()
            except Exception as error:
                raise OSError(_line(error)) from error
            yield from zip(part, found, strict=True)

    def columns(self, path: str, names: Sequence[str]) -> dict[str, list[Any]]:
        try:
            found: dict[str, list[Any]] = _at(path).to_table(columns=list(names)).to_pydict()
        except Exception as error:
            raise OSError(_line(error)) from error
        return found

    def tables(self, path: str, file: FileStat | None) -> list[LabelTable]:
        newest = _newest(path)
        return [self.label_table(newest.path, version=f"list {newest.size}:{newest.mtime_ns}")]


class LanceVectorSource(LanceSource):
    """Tables of Lance with a column of vectors, which are the embeddings of the images."""

    has_embeddings = True

    def fits_folder(self, folder: str) -> bool:
        return _is_lance(folder) and bool(_vector_column(_open(folder, None).schema))

    def folder_shards(self, folder: str, images: str | Sequence[str] | None, cut: Cut) -> list[Shard]:
        shards = super().folder_shards(folder, images, cut)
        if cut.column != "auto":
            return shards
        return [replace(shard, kind=VECTORS, fingerprint=f"{shard.fingerprint}-vectors") for shard in shards]

    def read_embedded(self, shard: Shard) -> Iterator[tuple[ImageRecord, np.ndarray]]:
        table = _at(shard.paths[0])
        column = _vector_column(table.schema)
        for offset, record in enumerate(self.read(shard)):
            if offset % _TOGETHER == 0:
                first = shard.start + offset
                last = min(first + _TOGETHER, shard.start + int(shard.count or 0))
                taken = table.take(list(range(first, last)), columns=[column]).column(column)
                vectors = np.stack([np.asarray(value, np.float32) for value in taken.to_pylist()])
            yield record, vectors[offset % _TOGETHER]


def _is_lance(folder: str) -> bool:
    return _VERSIONS in filesystem.children(folder)[0]


def _vector_column(schema: pa.Schema) -> str:
    """The column of vectors: the only one, or the one with a usual name; empty if there is none."""
    names = [
        field.name
        for field in schema
        if pa.types.is_fixed_size_list(field.type) and pa.types.is_floating(field.type.value_type)
    ]
    usual = [name for name in names if name.lower() in _NAMES]
    if len(names) > 1 and len(usual) != 1:
        raise KtrayError(
            f"The table of Lance has several columns of vectors: {', '.join(names)}",
            f"Name the one of the teacher {_NAMES[0]}, or set gallery.column to the images.",
        )
    return (usual or names or [""])[0]


def _newest(folder: str) -> FileStat:
    table = _open(folder, None)
    written = table.versions()[-1]["timestamp"].timestamp()
    return FileStat(f"{folder}@{table.version}", int(table.count_rows()), int(written * 1e9))


def _at(path: str) -> Any:
    match = _AT.fullmatch(path)
    if match is None:
        raise OSError("the address of a row in a table of Lance has no version (X.lance@VERSION#lance=ROW)")
    return _open_version(match["folder"], int(match["version"]))


@functools.lru_cache(maxsize=8)
def _open_version(folder: str, version: int) -> Any:
    return _open(folder, version)


def _open(folder: str, version: int | None) -> Any:
    filesystem.check_root(folder)
    lance = require("lance", "lance", f"The table of Lance '{folder}'")
    try:
        return lance.dataset(folder, version=version, storage_options=_options(folder))
    except Exception as error:  # lance raises ValueError and OSError, with places in its own code
        raise KtrayError(
            f"'{folder}' cannot be read as a table of Lance: {_line(error)}", "Write the table again."
        ) from error


def _line(error: Exception) -> str:
    """The message of an error of Lance without the place in Lance's code where it was raised."""
    return why(OSError(re.split(r",? ?/\S+\.rs:\d+", str(error))[0]))


def _options(folder: str) -> dict[str, str] | None:
    server = s3.endpoint() or ""
    return {"aws_endpoint": server, "allow_http": "true"} if folder.startswith("s3:") and server else None


SOURCES.register(LANCE)(LanceSource())
SOURCES.register(VECTORS)(LanceVectorSource())
