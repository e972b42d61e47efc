"""Tables that are many Parquet files with a record of those that belong to the newest version.

A subclass of `LakeSource` says which files these are. Their images are rows of the Parquet files, so that their uris
are those of Parquet, and stay valid as long as the file exists.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.sources.base import Cut, LabelTable, Shard, Source
from ktray.data.sources.parquets import PARQUET
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.table_rows import RowSource
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES


@dataclass(frozen=True)
class LakeFile:
    """A Parquet file of a table.

    Attributes:
        path: where it is.
        partition: values of columns that are in the record of the table and not in the file.
    """

    path: str
    partition: dict[str, str] = field(default_factory=dict)


class LakeSource(Source):
    """A table in a folder. Its shards are shards of Parquet files."""

    labelled = True

    @abstractmethod
    def files(self, folder: str) -> list[LakeFile]:
        """The files of the newest version of the table.

        Raises:
            KtrayError: the record is damaged, or the files alone are not the table.
        """

    def folder_shards(self, folder: str, images: str | Sequence[str] | None, cut: Cut) -> list[Shard]:
        return _parquet().shards([stat for _, stat in self._stats(folder)], cut)

    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        raise NotImplementedError("the shards of a table are shards of Parquet files")

    def tables(self, path: str, file: FileStat | None) -> list[LabelTable]:
        return [
            replace(
                _parquet().label_table(part.path, version=f"list {stat.size}:{stat.mtime_ns}"), fixed=part.partition
            )
            for part, stat in self._stats(path)
        ]

    def _stats(self, folder: str) -> list[tuple[LakeFile, FileStat]]:
        filesystem.check_root(folder)
        files = sorted(self.files(folder), key=lambda file: file.path)
        if not files:
            raise KtrayError(f"The table '{folder}' has no rows", "Write rows, or name another table.")
        stats = [(file, filesystem.stat(file.path)) for file in files]
        if gone := [file.path for file, stat in stats if stat is None]:
            raise KtrayError(
                f"{len(gone)} of the {len(files)} files of the table '{folder}' do not exist, for example '{gone[0]}'",
                "Copy the whole table; a table with absolute paths must stay where it was written.",
            )
        return [(file, stat) for file, stat in stats if stat is not None]


def _parquet() -> RowSource:
    source: RowSource = SOURCES.get(PARQUET)
    return source
