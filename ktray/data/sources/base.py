"""What a source of unlabelled images is, and the shard: some images that are read together.

A source is registered in `ktray.recipe.registries.SOURCES` under a name that its shards and uris carry (`Shard.kind`,
`ImageRef.kind`). It recognises its files (or a whole folder), cuts them into shards and reads a shard from start to
end. Where an image is a part of a file, it gives the image a uri and fetches it by that uri.
"""

from __future__ import annotations

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ktray.data.filesystem import FileStat
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.uris import Held, ImageRef
from ktray.recipe.registries import SOURCES

ROWS = 1024


@dataclass(frozen=True)
class Shard:
    """Some images that are read together. Picklable.

    Attributes:
        kind: name of the source that reads it.
        paths: what the source reads: the images of ``files``, the file of ``tar`` and ``parquet``, other sources as
            they say.
        fingerprint: hash of paths, sizes and modification times (not of contents). For images from a list it covers
            the list's rows, not the images.
        count: images in it; None where only reading tells (tars, a Parquet file whose footer is broken).
        start: first row of a Parquet file or of embeddings.
        column: the Parquet file's image column.
        named: the user named the column, so that uris must carry it.
        caption: the Parquet file's caption column.
        captions: one for each of ``paths`` (CSV lists), or empty.
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
        """The source that reads it."""
        found: Source = SOURCES.get(self.kind)
        return found


@dataclass(frozen=True)
class Cut:
    """How files are cut into shards.

    Attributes:
        rows: images in a shard, about.
        column: ``gallery.column``, column of tables with image bytes or paths; ``auto`` finds it.
    """

    rows: int = ROWS
    column: str = "auto"


class Source(ABC):
    """One kind of place for unlabelled images. Instances have no state and are registered in ``SOURCES``."""

    noun: str = ""
    """Several of its files, in messages: ``tar shards``; empty where its places are folders."""
    accepts: str = ""
    """What may be named, in messages: ``.tar/.tar.gz/.tgz shards``."""
    pattern: str = "*"
    """A pattern for its files, in messages: ``*.tar``."""
    order: int = 100
    """Where its shards stand in a gallery of several kinds; equal numbers go by name."""
    in_folders: bool = True
    """Whether its files count where a folder above them is named (lists do not, they are named themselves)."""
    lists_images: bool = False
    """Whether one of its files may be ``transfer.list``."""
    loose: bool = False
    """Whether the paths of its shards are single images, which a list may call by their names."""
    has_embeddings: bool = False
    """Whether its shards come with embeddings (see `read_embedded`)."""

    def fits(self, path: str) -> bool:
        """Whether a file is one of this kind, by its name."""
        return False

    def fits_folder(self, folder: str) -> bool:
        """Whether a folder as a whole is one of this kind; ``folder`` is normalised and exists."""
        return False

    def shards(self, files: Sequence[FileStat], cut: Cut) -> list[Shard]:
        """The shards of files that `fits` accepted, sorted by path; the same ones for the same files.

        Raises:
            KtrayError: a file that cannot be cut, such as a table without a column of images.
        """
        return []

    def folder_shards(self, folder: str, images: str | Sequence[str] | None) -> list[Shard]:
        """The shards of a folder that `fits_folder` accepted.

        Args:
            folder: normalised.
            images: ``gallery.images``.
        """
        return []

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        """The shard's images in order, encoded, few in memory at a time. What cannot be read is a record with an
        error, never an exception."""

    def read_embedded(self, shard: Shard) -> Iterator[tuple[ImageRecord, np.ndarray]]:
        """As `read`, with each image's embedding (D,), for sources with ``has_embeddings``."""
        raise NotImplementedError

    def parse(self, uri: str) -> ImageRef | None:
        """The image that a uri names, where it is one of this source's uris (``FILE#...``); None for all others."""
        return None

    def fetch(self, path: str, refs: Sequence[ImageRef]) -> list[Callable[[], Held]]:
        """Calls that together read these images of one file, each (bytes, None) or (None, error); see `parse`."""
        raise NotImplementedError


def in_order() -> list[tuple[str, Source]]:
    """All sources in the order of their shards in a gallery."""
    return sorted(SOURCES, key=lambda item: (item[1].order, item[0]))


def fingerprint(files: Iterable[FileStat], *more: object) -> str:
    """32 hex digits over paths, sizes and modification times, and anything else by its repr."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.path}\0{file.size}\0{file.mtime_ns}\n".encode("utf-8", "surrogateescape"))
    digest.update(repr(more).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def spans(keys: Sequence[str], rows: int) -> list[tuple[int, int]]:
    """(first, last + 1) of groups of half to twice ``rows`` keys, cut where a key's hash says so.

    So a key that comes or goes changes its own group and perhaps a neighbour, and an index of the others still holds;
    groups of equal size would all be others from there on.
    """
    out, first = [], 0
    least = max(1, rows // 2)
    for at, key in enumerate(keys, 1):
        size = at - first
        cut = zlib.crc32(key.encode("utf-8", "surrogateescape")) % least == 0
        if size >= 2 * rows or (size >= least and cut) or at == len(keys):
            out.append((first, at))
            first = at
    return out
