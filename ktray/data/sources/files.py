"""Folders of images, and single image files. On local disks, ``NAME.txt`` beside ``NAME.jpg`` is its caption, as
img2dataset writes them; a text of numbers alone is none, because tools for object detection write boxes there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.sources.base import ROWS, Cut, Shard, Source, fingerprint, spans
from ktray.data.sources.fetch import read_files
from ktray.data.sources.records import ImageRecord, is_image
from ktray.data.sources.uris import ImageRef
from ktray.recipe.registries import SOURCES

FILES = ImageRef.kind
_TEXT_BYTES = 1 << 13
_WORDS = re.compile(r"[^\W\d_]{2}")  # two letters of any alphabet in a row


class FilesSource(Source):
    """Image files. Their shards contain the paths, in order. For lists, a path may be any uri."""

    noun, accepts, pattern, order, loose = "image files", "images", "*.jpg", 0, True

    def fits(self, path: str) -> bool:
        return is_image(path)

    def shards(self, files: Sequence[FileStat], cut: Cut) -> list[Shard]:
        parts = (files[first:last] for first, last in spans([f.path for f in files], cut.rows))
        return [Shard(FILES, tuple(f.path for f in part), fingerprint(part), len(part)) for part in parts]

    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        captions = shard.captions or tuple(_text_beside(path) for path in shard.paths)
        files = read_files([path for path in shard.paths if filesystem.printable(path) == path])
        for path, caption in zip(shard.paths, captions, strict=True):
            if filesystem.printable(path) != path:
                yield ImageRecord(filesystem.printable(path), None, error="the file name is not UTF-8: rename the file")
                continue
            data, error = next(files)
            yield ImageRecord(path, data, caption, error)


def _text_beside(path: str) -> str | None:
    if filesystem.is_remote(path):  # each look would be a request
        return None
    text_file = f"{path.rpartition('.')[0]}.txt"
    if not os.path.isfile(text_file):
        return None
    try:
        text = filesystem.read_head(text_file, _TEXT_BYTES).decode("utf-8", "replace").strip()
    except OSError:
        return None
    return text if _WORDS.search(text) else None


def path_shards(paths: Sequence[str], captions: Sequence[str | None] = (), rows: int = ROWS) -> list[Shard]:
    """Shards of single images by path or uri, in this order. Their fingerprints are hashes of paths and captions."""
    return [
        Shard(
            FILES,
            part := tuple(paths[first:last]),
            fingerprint([], part, captions_of_part := tuple(captions[first:last])),
            len(part),
            captions=captions_of_part,
        )
        for first, last in spans(paths, rows)
    ]


SOURCES.register(FILES)(FilesSource())
