"""Images in Parquet files: as bytes, as ``{bytes, path}`` (Hugging Face), or as paths to files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow.parquet as pq

from ktray.data import filesystem
from ktray.data.sources.parquet_tables import Footer, iter_rows, read_footer
from ktray.data.sources.table_rows import RowRef, RowSource
from ktray.recipe.registries import SOURCES

PARQUET = "parquet"
PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True, kw_only=True)
class ParquetRow(RowRef):
    """``X.parquet#row=R``."""

    kind: ClassVar[str] = PARQUET
    word: ClassVar[str] = "row"


class ParquetSource(RowSource):
    """Parquet files; a shard is a range of rows of one file."""

    noun, accepts, pattern, order = "Parquet files", ".parquet files", "*.parquet", 30
    ref, form = ParquetRow, "Parquet file"

    def fits(self, path: str) -> bool:
        return is_parquet(path)

    def footer(self, path: str) -> Footer:
        return read_footer(path)

    def rows(self, path: str, columns: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        return iter_rows(path, columns, rows)

    def columns(self, path: str, names: Sequence[str]) -> dict[str, list[Any]]:
        with filesystem.open_random(path) as stream, pq.ParquetFile(stream) as file:
            found: dict[str, list[Any]] = file.read(columns=list(names)).to_pydict()
            return found


def is_parquet(name: str) -> bool:
    return name.lower().endswith(PARQUET_SUFFIXES)


SOURCES.register(PARQUET)(ParquetSource())
