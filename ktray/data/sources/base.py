"""Sources of unlabelled images, and shards: groups of images that are read together.

A source is registered in `ktray.recipe.registries.SOURCES` under the name that its shards and uris contain
(`Shard.kind`, `ImageRef.kind`). It recognises its files (or a whole folder), divides them into shards and reads a shard
sequentially. If an image is a part of a file, the source gives it a uri and can fetch it by this uri.
"""

from __future__ import annotations

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ktray.data.filesystem import FileStat
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.uris import Held, ImageRef
from ktray.recipe.registries import SOURCES

ROWS = 1024


@dataclass(frozen=True)
class Shard:
    """A group of images that are read together. It is picklable.

    Attributes:
        kind: name of the source that reads it.
        paths: the files that the source reads: all images for ``files``, the one file for ``tar`` and ``parquet``; see
            the other sources.
        fingerprint: hash of paths, sizes and modification times (not of contents). For images of a list, it is a hash
            of the list's rows, not of the images.
        count: number of images; None if it is unknown before reading (tars, a Parquet file with a broken footer).
        start: first row of a Parquet file or of embeddings.
        column: the image column of the Parquet file.
        named: the user named the column, so that uris must contain it.
        caption: the caption column of the Parquet file.
        captions: one caption for each of ``paths`` (CSV lists), or empty.
    """

    kind: str
    paths: tuple[str, ...]
    fingerprint: str
    count: int | None
    start: int = 0
    column: str | None = None
    named: bool = False
    caption: str | None = None
    captions: tuple[str | None, ...] = ()

    @property
    def source(self) -> Source:
        """The source that reads the shard."""
        source: Source = SOURCES.get(self.kind)
        return source


@dataclass(frozen=True)
class Cut:
    """How files are divided into shards.

    Attributes:
        rows: approximate number of images per shard.
        column: ``gallery.column``: the column with image bytes or paths; ``auto`` detects it.
    """

    rows: int = ROWS
    column: str = "auto"


@dataclass(frozen=True)
class LabelTable:
    """The columns that describe the images of a file or a folder, for labelled sets.

    Attributes:
        path: the file or folder, for messages.
        schema: its columns; metadata of Hugging Face's ``datasets`` may have the names of class numbers.
        count: number of rows.
        read: takes names of columns and returns their values.
        uri: takes the number of a row and returns the uri of its image; None if a column has the paths of the images.
        images: the column with the images, if ``uri`` is set and there is one.
        split: the split of all its rows; None if a column or the name of the file tells.
        fixed: columns that have the same value in all rows, and are not in ``schema``.
        keys: names of the rows that are the same on every machine; empty: their numbers.
        version: version of its content; empty: that of the file.
        named: the uris come from names in the table, so that their files may be missing.
    """

    path: str
    schema: pa.Schema
    count: int
    read: Callable[[Sequence[str]], dict[str, list[Any]]]
    uri: Callable[[int], str] | None = None
    images: str | None = None
    split: str | None = None
    fixed: dict[str, str] = field(default_factory=dict)
    keys: Sequence[str] = ()
    version: str = ""
    named: bool = False


class Source(ABC):
    """A source of images. Instances have no state and are registered in ``SOURCES``."""

    noun: str = ""
    """Plural name of its files in messages, such as ``tar shards``; empty if the source reads whole folders."""
    accepts: str = ""
    """Description of accepted files in messages, such as ``.tar/.tar.gz/.tgz shards``."""
    pattern: str = "*"
    """A pattern for its files in messages, such as ``*.tar``."""
    order: int = 100
    """Position of its shards in a gallery with several sources; sources with equal numbers are sorted by name."""
    in_folders: bool = True
    """Whether its files are included if a folder above them is named. Lists are not: they must be named themselves."""
    lists_images: bool = False
    """Whether ``transfer.list`` may be one of its files."""
    loose: bool = False
    """Whether the paths of its shards are single images, which a list may refer to by file name."""
    labelled: bool = False
    """Whether its files or folders may have labels (see `tables`)."""
    has_embeddings: bool = False
    """Whether its shards contain embeddings (see `read_embedded`)."""

    def fits(self, path: str) -> bool:
        """Whether the source reads a file with this name."""
        return False

    def fits_folder(self, folder: str) -> bool:
        """Whether the source reads this folder as a whole. ``folder`` is normalised and exists."""
        return False

    def shards(self, files: Sequence[FileStat], cut: Cut) -> list[Shard]:
        """The shards of files that `fits` accepted. The files are sorted by path; equal files give equal shards.

        Raises:
            KtrayError: a file cannot be divided into shards, such as a table without an image column.
        """
        return []

    def folder_shards(self, folder: str, images: str | Sequence[str] | None, cut: Cut) -> list[Shard]:
        """The shards of a folder that `fits_folder` accepted.

        Args:
            folder: normalised.
            images: ``gallery.images``.
        """
        return []

    def tables(self, path: str, file: FileStat | None) -> list[LabelTable]:
        """The labels of a file that `fits` accepted, or of a folder (``file`` is None) that `fits_folder` accepted; for
        sources with ``labelled``. None of a folder whose labels are not in tables.

        Raises:
            KtrayError: it is damaged, or cannot be read.
        """
        return []

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        """The encoded images of the shard, in order, with few of them in memory at a time. An image that cannot be read
        is a record with an error; no exception is raised."""

    def read_embedded(self, shard: Shard) -> Iterator[tuple[ImageRecord, np.ndarray]]:
        """Like `read`, together with the embedding (D,) of each image; for sources with ``has_embeddings``."""
        raise NotImplementedError

    def parse(self, uri: str) -> ImageRef | None:
        """Parse a uri of this source (``FILE#...``); None for all other uris."""
        return None

    def fetch(self, path: str, refs: Sequence[ImageRef]) -> list[Callable[[], Held]]:
        """Calls that together read these images of one file. Each image gives (bytes, None) or (None, error)."""
        raise NotImplementedError


def in_order() -> list[tuple[str, Source]]:
    """All sources with their names, in the order of their shards in a gallery."""
    return sorted(SOURCES, key=lambda item: (item[1].order, item[0]))


def fingerprint(files: Iterable[FileStat], *more: object) -> str:
    """Hash of paths, sizes and modification times, and of the repr of ``more``; 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.path}\0{file.size}\0{file.mtime_ns}\n".encode("utf-8", "surrogateescape"))
    digest.update(repr(more).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def spans(keys: Sequence[str], rows: int) -> list[tuple[int, int]]:
    """(first, last + 1) of groups of half to twice ``rows`` keys. The hashes of the keys determine the boundaries.

    Therefore a key that is added or removed changes only its own group and perhaps a neighbouring group, and the index
    of the other groups stays valid. With groups of equal size, all later groups would change.
    """
    groups, first = [], 0
    minimum = max(1, rows // 2)
    for end, key in enumerate(keys, 1):
        size = end - first
        cut = zlib.crc32(key.encode("utf-8", "surrogateescape")) % minimum == 0
        if size >= 2 * rows or (size >= minimum and cut) or end == len(keys):
            groups.append((first, end))
            first = end
    return groups
