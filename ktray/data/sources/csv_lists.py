"""Lists of images as text tables (CSV, TSV), with a path column and optionally a caption column.

Their shards are shards of ``files``. A list may be as large as the disk: it is read line by line, and only the columns
that are needed are kept.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

CSV_SUFFIXES = (".csv", ".tsv")
_SEPARATORS = (",", ";", "\t", "|")
_TOLD = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # a line with which files name their separator to Excel
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class CsvSource(Source):
    """CSV lists. They must be named themselves, because a folder may contain tables that are not lists."""

    noun, accepts, pattern, order = "CSV lists", "a .csv or .tsv list with a path column", "*.csv", 10
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
    table = CsvTable.open(file.path)
    schema = pa.schema([(name, pa.string()) for name in table.names])
    if cut.column == "auto" and not {n.lower() for n in table.names} & set(PATH_NAMES):
        raise KtrayError(
            f"List '{file.path}' has no path column, only {', '.join(table.names)}",
            "Name the column 'path', or set gallery.column to the column with the paths.",
        )
    paths_in = image_column(schema, cut.column, file.path)
    captions_in = caption_column(schema)
    paths: list[str] = []
    captions: list[str | None] = []
    for path, *caption in table.rows([paths_in, *([captions_in] if captions_in else [])]):
        paths.append(resolve(path, file.path))
        captions += [text or None for text in caption]
    if not paths:
        raise no_rows(file.path)
    return path_shards(paths, captions, cut.rows)


def no_rows(path: str) -> KtrayError:
    """The error for a list without rows."""
    return KtrayError(
        f"List '{path}' has no rows",
        "The first line has the column names, such as path,label[,split]. Add one line per image.",
    )


@dataclass(frozen=True)
class CsvTable:
    """A text table with a header: UTF-8 or UTF-16, separated by commas, semicolons, tabs or bars.

    Attributes:
        path: the file.
        names: names of the columns, in order, stripped.
        separator, encoding: as recognised by the header.
        header: number of the header's line; 2 after Excel's line ``sep=;``.
    """

    path: str
    names: list[str]
    separator: str
    encoding: str
    header: int = 1

    @classmethod
    def open(cls, path: str) -> CsvTable:
        """Read the header.

        Raises:
            KtrayError: the list cannot be read, or is not text in UTF-8 or UTF-16.
        """
        with _errors(path):
            with filesystem.open_stream(path) as stream:
                start = bytes(stream.read(4))
            encoding = "utf-16" if start.startswith(_UTF16) else "utf-8-sig"
            with _text(path, encoding) as lines:
                header = next(lines, "")
                told = _TOLD.fullmatch(header.strip())
                if told:
                    header = next(lines, "")
            # Excel writes the separator of its language, in most of Europe a semicolon.
            separator = max(_SEPARATORS, key=lambda sign: (len(_cells(header, sign)), -_SEPARATORS.index(sign)))
            separator = told[1] if told else separator
            if not header.strip():
                raise no_rows(path)
            names = [cell.strip() for cell in _cells(header, separator)]
            return cls(path, names, separator, encoding, 2 if told else 1)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """The cells of these columns, row by row, stripped; missing cells are empty. Empty lines are left out.

        Raises:
            KtrayError: a row has more cells than the header, or the text cannot be decoded.
        """
        at = [self.names.index(name) for name in columns]
        with _errors(self.path), _text(self.path, self.encoding) as lines:
            reader = csv.reader(lines, delimiter=self.separator, skipinitialspace=True)
            for _ in range(self.header):
                next(reader, None)
            for number, cells in enumerate(reader, self.header + 1):
                if len(cells) > len(self.names) and any(cell.strip() for cell in cells[len(self.names) :]):
                    raise KtrayError(
                        f"List '{self.path}' has more cells than columns in line {number}",
                        f'Put "..." around cells that contain the separator {self.separator!r}.',
                    )
                if cells:
                    yield tuple(cells[i].strip() if i < len(cells) else "" for i in at)


def _cells(header: str, separator: str) -> list[str]:
    return next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])


def _text(path: str, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(filesystem.open_stream(path), encoding=encoding, newline="")


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KtrayError(f"List '{path}' cannot be read: {filesystem.why(error)}", "Check the path.") from error
    except (UnicodeError, csv.Error) as error:
        raise KtrayError(
            f"List '{path}' is not CSV in UTF-8: {error}", "Save it as CSV in UTF-8 (in Excel: CSV UTF-8)."
        ) from error


SOURCES.register("csv")(CsvSource())
