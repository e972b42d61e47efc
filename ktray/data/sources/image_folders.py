"""Folders of images with a table beside them, as the ``imagefolder`` of Hugging Face's ``datasets``.

``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet`` lies in the folder or in its folders of splits. The column
``file_name`` has paths relative to the table; other columns have labels or captions. Without a label column, the images
are in class folders, and the table is used for captions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.labelled.rows import SPLITS
from ktray.data.sources.base import Cut, LabelTable, Shard, Source, fingerprint, spans
from ktray.data.sources.csv_lists import CsvTable
from ktray.data.sources.files import FILES
from ktray.data.sources.json_lines import read_lines
from ktray.data.sources.parquet_tables import LABEL_NAMES, caption_column, read_footer
from ktray.data.sources.records import ImageRecord, is_image
from ktray.data.sources.uris import resolve
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE = ("file_name", "image_file_name")


class ImageFolderSource(Source):
    """Folders of images with ``metadata.*``; their shards are shards of ``files``, with captions."""

    labelled = True

    def fits_folder(self, folder: str) -> bool:
        return any(_belongs(path) for _, path in _found(folder))

    def folder_shards(self, folder: str, images: str | Sequence[str] | None, cut: Cut) -> list[Shard]:
        captions: dict[str, str | None] = {}
        for _, path in _found(folder):
            captions |= _read(path).captions()
        files = sorted((f for f in filesystem.walk(folder) if is_image(f.path)), key=lambda file: file.path)
        if not files:
            raise KtrayError(f"Folder '{folder}' has metadata but no images", "Put the images into this folder.")
        shards: list[Shard] = []
        for first, last in spans([file.path for file in files], cut.rows):
            part = files[first:last]
            texts = tuple(captions.get(file.path) for file in part) if any(captions.values()) else ()
            shards.append(
                Shard(FILES, tuple(f.path for f in part), fingerprint(part, texts), len(part), captions=texts)
            )
        return shards

    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        raise NotImplementedError("the shards of a folder of images are shards of files")

    def tables(self, path: str, file: FileStat | None) -> list[LabelTable]:
        found = [(split, _read(metadata)) for split, metadata in _found(path)]
        labelled = [(split, table) for split, table in found if table.has_labels]
        if labelled and len(labelled) < len(found):
            without = next(table.path for _, table in found if not table.has_labels)
            raise KtrayError(
                f"'{without}' has no column with labels, and '{labelled[0][1].path}' has one",
                "Add the column label, or remove it from all of them for images in class folders.",
            )
        return [table.label_table(split) for split, table in labelled]


def _found(folder: str) -> list[tuple[str, str]]:
    """(split, path) of the tables in a folder, and in its folders of splits; the split is empty for the folder's."""
    folders, files = filesystem.children(folder)
    own = [("", f"{folder}/{name}") for name in METADATA if name in files]
    if len(own) > 1:
        raise KtrayError(f"'{folder}' has several tables: {own[0][1]} and {own[1][1]}", "Keep one of them.")
    parts = [name for name in folders if name.lower() in SPLITS]
    inside = [(name, place) for name in parts for _, place in _found(f"{folder}/{name}")]
    return own or [(SPLITS[name.lower()], place) for name, place in inside]


def _belongs(path: str) -> bool:
    """Whether a table is about the images of its folder. A folder of class folders may have any other metadata.csv."""
    try:
        if path.endswith(".csv"):
            names = CsvTable.open(path).names
        elif path.endswith(".jsonl"):
            names = read_lines(path).column_names
        else:
            names = read_footer(path).schema.names
    except (OSError, KtrayError, pa.ArrowException):
        return True  # reading reports the error
    folders, files = filesystem.children(path.rpartition("/")[0])
    return bool(set(names) & set(_FILE)) or (not folders and any(map(is_image, files)))


@dataclass(frozen=True)
class _Metadata:
    path: str
    table: pa.Table

    @property
    def paths(self) -> list[str]:
        """Where the images are.

        Raises:
            KtrayError: there is no column with file names, or a cell of it is empty.
        """
        name = next((name for name in _FILE if name in self.table.column_names), None)
        if name is None:
            raise KtrayError(
                f"'{self.path}' has no column file_name, only {', '.join(self.table.column_names)}",
                "Name the column with the paths of the images file_name; paths are relative to this table.",
            )
        names = self.table.column(name).to_pylist()
        if empty := [number for number, value in enumerate(names, 1) if not value]:
            raise KtrayError(f"'{self.path}' has no file_name in row {empty[0]}", "Fill it in, or remove the row.")
        return [resolve(str(value), self.path) for value in names]

    @property
    def names_files(self) -> bool:
        return bool(set(self.table.column_names) & set(_FILE))

    @property
    def has_labels(self) -> bool:
        return bool({name.lower() for name in self.table.column_names} & set(LABEL_NAMES))

    def captions(self) -> dict[str, str | None]:
        if not self.names_files:
            return {}
        column = caption_column(self.table.schema)
        texts = self.table.column(column).to_pylist() if column else [None] * self.table.num_rows
        return dict(zip(self.paths, texts, strict=True))

    def label_table(self, split: str) -> LabelTable:
        uris, stat = self.paths, filesystem.stat(self.path)
        folder = self.path.rpartition("/")[0]
        return LabelTable(
            folder,
            self.table.schema,
            len(uris),
            lambda names: self.table.select(list(names)).to_pydict(),
            lambda row: uris[row],
            split=split or None,
            keys=[uri.removeprefix(f"{folder}/") for uri in uris],
            version=f"list {stat.size}:{stat.mtime_ns}" if stat else "",
            named=True,
        )


def _read(path: str) -> _Metadata:
    if path.endswith(".csv"):
        table = CsvTable.open(path)
        cells = list(table.rows(table.names))
        columns = {name: [row[i] for row in cells] for i, name in enumerate(table.names)}
        return _Metadata(path, pa.table(columns, pa.schema([(name, pa.string()) for name in columns])))
    if path.endswith(".jsonl"):
        return _Metadata(path, read_lines(path))
    try:
        with filesystem.open_random(path) as stream:
            return _Metadata(path, pq.read_table(stream, use_threads=False))
    except (OSError, pa.ArrowException) as error:
        raise KtrayError(
            f"'{path}' is not a complete Parquet file: {filesystem.why(error)}", "Write it again."
        ) from error


SOURCES.register("image_folder")(ImageFolderSource())
