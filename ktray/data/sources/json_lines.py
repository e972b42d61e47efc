"""Lists of images as JSON Lines (``.jsonl``): one object per line, with a path and optionally a label or a caption.

Their shards are shards of ``files``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.json as pj

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.sources.base import Cut, LabelTable, Shard, Source
from ktray.data.sources.files import path_shards
from ktray.data.sources.parquet_tables import caption_column, image_column
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.uris import resolve
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES

SUFFIXES = (".jsonl", ".ndjson")
# An object must fit into a block of the parser.
_BLOCK = 1 << 24


class JsonLinesSource(Source):
    """JSON Lines. They must be named themselves, because a folder may contain such files that are not lists."""

    noun, accepts, pattern, order = "JSON Lines", "a .jsonl list with a path column", "*.jsonl", 15
    in_folders, lists_images, labelled = False, True, True

    def fits(self, path: str) -> bool:
        return path.lower().endswith(SUFFIXES)

    def shards(self, files: Sequence[FileStat], cut: Cut) -> list[Shard]:
        return [shard for file in files for shard in _shards(file.path, cut)]

    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        raise NotImplementedError("the shards of a list are shards of files")

    def tables(self, path: str, file: FileStat | None) -> list[LabelTable]:
        table = read_lines(path)
        return [LabelTable(path, table.schema, table.num_rows, lambda names: table.select(list(names)).to_pydict())]


def read_lines(path: str) -> pa.Table:
    """The objects of a file as a table, with a column for each key.

    Raises:
        KtrayError: the file cannot be read, a line is not an object of JSON, or a key has values of several types.
    """
    try:
        with filesystem.open_stream(path) as stream:
            return pj.read_json(stream, pj.ReadOptions(use_threads=False, block_size=_BLOCK))
    except (OSError, pa.ArrowException) as error:
        reason = "it is empty" if "Empty JSON" in str(error) else filesystem.why(error)
        raise KtrayError(
            f"List '{path}' cannot be read as JSON Lines: {reason}",
            'Write one object per line, such as {"file_name": "a.jpg", "label": "cat"}.',
        ) from error


def _shards(path: str, cut: Cut) -> list[Shard]:
    table = read_lines(path)
    paths_in, captions_in = image_column(table.schema, cut.column, path), caption_column(table.schema)
    paths = [resolve(str(name or ""), path) for name in table.column(paths_in).to_pylist()]
    captions = table.column(captions_in).to_pylist() if captions_in else []
    return path_shards(paths, captions, cut.rows)


SOURCES.register("jsonl")(JsonLinesSource())
