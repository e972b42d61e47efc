"""Images in Arrow files, and the folders of ``Dataset.save_to_disk`` (Hugging Face), which ``load_from_disk`` reads.

A folder of a ``DatasetDict`` has ``dataset_dict.json`` and a folder for each split; a folder of a ``Dataset`` has
``state.json``, which lists its Arrow files in order. Both formats of Arrow are read: streams, as ``datasets`` writes
them, and files with a footer (Feather).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.sources.base import Cut, LabelTable, Shard
from ktray.data.sources.parquet_tables import Footer
from ktray.data.sources.table_rows import RowRef, RowSource
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES

ARROW = "arrow"
ARROW_SUFFIXES = (".arrow", ".feather")
_MAGIC = b"ARROW1"
_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_AGAIN = "Save it again with save_to_disk of a current version of datasets."


@dataclass(frozen=True, kw_only=True)
class ArrowRow(RowRef):
    """``X.arrow#record=R``."""

    kind: ClassVar[str] = ARROW
    word: ClassVar[str] = "record"


class ArrowSource(RowSource):
    """Arrow files; a shard is a range of rows of one file. Local files are mapped into memory, and only the rows that
    are needed are copied; of a file on a remote store, everything before these rows is read as well."""

    noun, accepts, pattern, order = "Arrow files", ".arrow files", "*.arrow", 35
    ref, form = ArrowRow, "Arrow file"

    def fits(self, path: str) -> bool:
        return path.lower().endswith(ARROW_SUFFIXES)

    def fits_folder(self, folder: str) -> bool:
        names = set(filesystem.children(folder)[1])
        return _DICT in names or {_STATE, _INFO} <= names

    def folder_shards(self, folder: str, images: str | Sequence[str] | None, cut: Cut) -> list[Shard]:
        return self.shards([file for _, file in _files(folder)], cut)

    def footer(self, path: str) -> Footer:
        with _batches(path) as (schema, batches):
            return Footer(schema, tuple(batch.num_rows for batch in batches))

    def rows(self, path: str, columns: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        at = first = 0
        with _batches(path) as (_, batches):
            for batch in batches:
                while at < len(rows) and rows[at] < first + batch.num_rows:
                    row = rows[at] - first
                    yield rows[at], {name: batch.column(name)[row].as_py() for name in columns}
                    at += 1
                first += batch.num_rows
                if at == len(rows):
                    return
        raise OSError(f"row {rows[at]} does not exist, the file has {first} rows: it has changed since it was listed")

    def columns(self, path: str, names: Sequence[str]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in names}
        with _batches(path) as (_, batches):
            for batch in batches:
                for name, values in found.items():
                    values += batch.column(name).to_pylist()
        return found

    def tables(self, path: str, file: FileStat | None) -> list[LabelTable]:
        if file is not None:
            return [self.label_table(path)]
        return [
            self.label_table(file.path, split or None, f"{file.size}:{file.mtime_ns}") for split, file in _files(path)
        ]


@contextlib.contextmanager
def _batches(path: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    with contextlib.ExitStack() as stack:
        if filesystem.is_remote(path):
            stream = stack.enter_context(filesystem.open_random(path))
        else:
            filesystem.open_random(path).close()  # refuses pipes, and paths outside of KTRAY_DATA_ROOTS
            stream = stack.enter_context(pa.memory_map(path))
        with_footer = stream.read(len(_MAGIC)) == _MAGIC
        stream.seek(0)
        if with_footer:
            file = stack.enter_context(pa.ipc.open_file(stream))
            yield file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            reader = stack.enter_context(pa.ipc.open_stream(stream))
            yield reader.schema, iter(reader)


def _files(folder: str) -> list[tuple[str, FileStat]]:
    """(split, file) of all Arrow files of a saved data set, in their order; the split is empty without splits."""
    if _DICT not in filesystem.children(folder)[1]:
        return [("", file) for file in _listed(folder)]
    splits = _json(f"{folder}/{_DICT}").get("splits")
    if not isinstance(splits, list) or not splits:
        raise KtrayError(f"'{folder}/{_DICT}' lists no splits", _AGAIN)
    return [(str(split), file) for split in splits for file in _listed(f"{folder}/{split}")]


def _listed(folder: str) -> list[FileStat]:
    state = _json(f"{folder}/{_STATE}")
    if state.get("_indices_data_files"):
        raise KtrayError(
            f"'{folder}' was saved as a selection of rows beside all its rows, which only old versions of datasets do",
            _AGAIN,
        )
    try:
        paths = [f"{folder}/{entry['filename']}" for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise KtrayError(f"'{folder}/{_STATE}' has no list of files (_data_files)", _AGAIN) from error
    stats = [(path, filesystem.stat(path)) for path in paths]
    if missing := [path for path, stat in stats if stat is None]:
        raise KtrayError(f"'{folder}/{_STATE}' lists '{missing[0]}', which does not exist", "Copy all its files.")
    return [stat for _, stat in stats if stat is not None]


def _json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(filesystem.read_bytes(path))
    except (OSError, ValueError) as error:
        raise KtrayError(f"'{path}' cannot be read: {filesystem.why(error)}", _AGAIN) from error
    if not isinstance(found, dict):
        raise KtrayError(f"'{path}' is not an object of JSON", _AGAIN)
    return found


SOURCES.register(ARROW)(ArrowSource())
