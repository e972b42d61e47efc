"""CSV lists of images, with a path column and optionally a caption column. Their shards are shards of ``files``."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

import pyarrow as pa

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.sources.base import Cut, Shard, Source
from ktray.data.sources.files import path_shards
from ktray.data.sources.parquet_tables import PATH_NAMES, caption_column, image_column
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.uris import resolve
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES

CSV_SUFFIXES = (".csv",)


class CsvSource(Source):
    """CSV lists. They must be named themselves, because a folder may contain tables that are not lists."""

    noun, accepts, pattern, order = "CSV lists", "a .csv list with a path column", "*.csv", 10
    in_folders, lists_images = False, True

    def fits(self, path: str) -> bool:
        return is_csv(path)

    def shards(self, files: Sequence[FileStat], cut: Cut) -> list[Shard]:
        return [shard for file in files for shard in _shards(file, cut)]

    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        raise NotImplementedError("the shards of a list are shards of files")


def is_csv(name: str) -> bool:
    return name.lower().endswith(CSV_SUFFIXES)


def _shards(file: FileStat, cut: Cut) -> list[Shard]:
    table = read_csv(file.path)
    names = list(table[0]) if table else []
    schema = pa.schema([(name, pa.string()) for name in names])
    if not table:
        raise KtrayError(
            f"List '{file.path}' has no rows",
            "The first line has the column names, including path. Add one line per image.",
        )
    if cut.column == "auto" and not {n.lower() for n in names} & set(PATH_NAMES):
        raise KtrayError(
            f"List '{file.path}' has no path column, only {', '.join(names)}",
            "Name the column 'path', or set gallery.column to the column with the paths.",
        )
    paths_in = image_column(schema, cut.column, file.path)
    captions_in = caption_column(schema)
    paths = [resolve(row[paths_in], file.path) for row in table]
    captions = [row[captions_in] or None for row in table] if captions_in else []
    return path_shards(paths, captions, cut.rows)


def read_csv(path: str) -> list[dict[str, str]]:
    """Rows of a CSV list with a header. Cells are stripped; missing cells are empty.

    Raises:
        KtrayError: the list cannot be read, is not UTF-8, or has a row with more cells than the header.
    """
    try:
        text = filesystem.read_bytes(path).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        rows = list(reader)
    except OSError as error:
        raise KtrayError(f"List '{path}' cannot be read: {filesystem.why(error)}", "Check the path.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise KtrayError(f"List '{path}' is not CSV in UTF-8: {error}", "Save it as comma-separated UTF-8.") from error
    for number, row in enumerate(rows, 2):
        if None in row:
            raise KtrayError(
                f"List '{path}' has more cells than columns in line {number}", 'Put "..." around cells with commas.'
            )
    return [{(k or "").strip(): (v or "").strip() for k, v in row.items()} for row in rows]


SOURCES.register("csv")(CsvSource())
