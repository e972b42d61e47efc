"""Existing embeddings: the output folders of clip-retrieval, as shards of a gallery.

``FOLDER/img_emb/img_emb_N.npy`` contains (rows, D) embeddings; ``FOLDER/metadata/metadata_N.parquet`` contains, in the
same order, ``image_path`` and optionally ``caption``. An ``image_path`` is a path or, if the images are in tar shards,
the key of a sample. ``gallery.images`` is the folder at which relative paths start, or the tars.

The images themselves are also read once, because their fingerprints are needed to detect near-duplicates of test
images.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ktray.data import filesystem
from ktray.data.sources.base import Cut, Shard, Source, fingerprint
from ktray.data.sources.fetch import at_once, fetch
from ktray.data.sources.parquet_tables import read_footer
from ktray.data.sources.records import ImageRecord, is_image
from ktray.data.sources.tars import TarMember, is_tar, read_tar, sample_key
from ktray.data.sources.uris import ImageRef
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES
from ktray.storage.concurrent import in_order

EMBEDDED = "embedded"
_EMBEDDINGS, _METADATA = "img_emb", "metadata"
_NAME, _CAPTION = "image_path", "caption"
# Number of images that are fetched, and in memory, at a time.
_TOGETHER = 64
ROWS = 16_384


class ClipRetrievalSource(Source):
    """Output folders of clip-retrieval; their embeddings are used for the index."""

    order, has_embeddings = 40, True

    def fits_folder(self, folder: str) -> bool:
        return is_embedded(folder)

    def folder_shards(self, folder: str, images: str | Sequence[str] | None, cut: Cut) -> list[Shard]:
        return embedded_shards(folder, images)

    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        return (record for _, record in read_records(shard))

    def read_embedded(self, shard: Shard) -> Iterator[tuple[ImageRecord, np.ndarray]]:
        vectors = read_vectors(shard)
        return ((record, vectors[row]) for row, record in read_records(shard))


def is_embedded(folder: str) -> bool:
    """Whether a folder is an output folder of clip-retrieval."""
    folder = filesystem.normalise(folder)
    if not filesystem.is_folder(folder):
        return False
    return {_EMBEDDINGS, _METADATA} <= set(filesystem.children(folder)[0])


def embedded_shards(folder: str, images: str | Sequence[str] | None, rows_per_shard: int = ROWS) -> list[Shard]:
    """The shards of an output folder. Their ``paths`` are the embeddings, the metadata, and the places of the images.

    Raises:
        KtrayError: a partition lacks one of its files, its files have different numbers of rows, or it has no column
            ``image_path``.
    """
    folder = filesystem.normalise(folder)
    places = tuple(filesystem.normalise(p) for p in ([images] if isinstance(images, str) else images or []))
    partitions: dict[str, dict[str, str]] = {}
    for part, suffix in ((_EMBEDDINGS, ".npy"), (_METADATA, ".parquet")):
        for name in filesystem.children(f"{folder}/{part}")[1]:
            if name.endswith(suffix):
                number = name[: -len(suffix)].rpartition("_")[2]
                partitions.setdefault(number, {})[part] = f"{folder}/{part}/{name}"
    if not partitions:
        raise KtrayError(
            f"Folder '{folder}' has no embeddings in {_EMBEDDINGS}/",
            "Check whether clip-retrieval was interrupted, and run it again.",
        )
    calls = []
    for number, pair in sorted(partitions.items()):
        if len(pair) < 2:
            (present,) = pair.values()
            raise KtrayError(
                f"Partition {number} has only '{present}'; it needs one file in {_EMBEDDINGS}/ and one in {_METADATA}/",
                "Run clip-retrieval again until it is complete, with metadata (--enable_metadata).",
            )
        calls.append(partial(_partition, pair[_EMBEDDINGS], pair[_METADATA], places, rows_per_shard))
    return [shard for partition in in_order(calls, at_once([folder])) for shard in partition]


def _partition(vectors: str, metadata: str, places: tuple[str, ...], rows_per_shard: int) -> list[Shard]:
    try:
        footer, (rows, _) = read_footer(metadata), _shape(vectors)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise KtrayError(
            f"'{vectors}' or '{metadata}' cannot be read: {error}", "Write the file again with clip-retrieval."
        ) from error
    if _NAME not in footer.schema.names:
        raise KtrayError(
            f"'{metadata}' has no column {_NAME}, only {', '.join(footer.schema.names)}",
            "Run clip-retrieval with metadata (--enable_metadata).",
        )
    if footer.rows != rows:
        raise KtrayError(
            f"'{vectors}' has {rows:,} rows, but '{metadata}' has {footer.rows:,}",
            "They are from different runs of clip-retrieval. Write both again.",
        )
    files = [file for path in (vectors, metadata) if (file := filesystem.stat(path))]
    paths = (vectors, metadata, *places)
    shards = []
    for first in range(0, rows, rows_per_shard):
        count = min(rows_per_shard, rows - first)
        shards.append(Shard(EMBEDDED, paths, fingerprint(files, first, count, places), count, first))
    return shards


def read_vectors(shard: Shard) -> np.ndarray:
    """(count, D) stored embeddings of a shard, in the stored dtype."""
    path = shard.paths[0]
    assert shard.count is not None
    if not filesystem.is_remote(path):
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array[shard.start : shard.start + shard.count]
    with filesystem.open_random(path) as stream:
        _, width, dtype, offset = _header(stream)
        stream.seek(offset + shard.start * width * dtype.itemsize)
        data = stream.read(shard.count * width * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(-1, width)


def read_records(shard: Shard) -> Iterator[tuple[int, ImageRecord]]:
    """Each row of a shard, counted from its start, with its image. Images of tars are in the order of the tars."""
    assert shard.count is not None
    _, metadata, *places = shard.paths
    columns = [name for name in (_NAME, _CAPTION) if name in read_footer(metadata).schema.names]
    with filesystem.open_random(metadata) as stream:
        table = pq.read_table(stream, columns=columns, use_threads=False).slice(shard.start, shard.count)
    names = [str(name) for name in table.column(_NAME).to_pylist()]
    captions = table.column(_CAPTION).to_pylist() if _CAPTION in columns else [None] * len(names)
    keys: dict[str, int] = {}
    others: list[tuple[int, str]] = []
    for row, name in enumerate(names):
        if not is_image(name) and not ImageRef.parse(name).fragment:
            keys[name] = row
        else:
            others.append((row, _placed(name, metadata, places)))
    for first in range(0, len(others), _TOGETHER):
        part = others[first : first + _TOGETHER]
        for (row, _), (uri, data, error) in zip(part, fetch([path for _, path in part]), strict=True):
            yield row, ImageRecord(uri, data, captions[row], error)
    if keys:
        yield from _from_tars(keys, captions, places)


def _placed(name: str, metadata: str, places: Sequence[str]) -> str:
    if filesystem.is_remote(name) or (name.startswith("/") and not filesystem.is_remote(metadata)):
        return name
    folders = [place for place in places if not is_tar(place)]
    # Without gallery.images, a relative path starts at the folder that contains img_emb/ and metadata/.
    start = folders[0] if folders else posixpath.dirname(posixpath.dirname(metadata))
    return f"{start}/{name}"


def _from_tars(
    keys: dict[str, int], captions: Sequence[str | None], places: Sequence[str]
) -> Iterator[tuple[int, ImageRecord]]:
    missing = dict(keys)
    tars = _tars(places)
    # The keys of img2dataset start with the name of their tar. Other tars are opened only for the remaining keys.
    lengths = {len(_stem(tar)) for tar in tars}
    prefixes = {key[:length] for key in keys for length in lengths}
    for tar in sorted(tars, key=lambda tar: _stem(tar) not in prefixes):
        if not missing:
            return
        for record in read_tar(tar):
            ref = ImageRef.parse(record.uri)
            row = missing.pop(sample_key(ref.member), None) if isinstance(ref, TarMember) else None
            if row is not None:
                yield row, replace(record, caption=captions[row] or record.caption)
    for key, row in missing.items():
        yield row, ImageRecord(key, None, error="no tar of gallery.images has a sample with this key")


def _stem(tar: str) -> str:
    return posixpath.basename(tar).partition(".")[0]


def _tars(places: Sequence[str]) -> list[str]:
    tars = []
    for place in places:
        if is_tar(place):
            tars.append(place)
        elif filesystem.has_glob(place):
            tars += [path for path in filesystem.expand(place) if is_tar(path)]
        elif filesystem.is_folder(place):
            tars += sorted(file.path for file in filesystem.walk(place) if is_tar(file.path))
    return tars


def _shape(path: str) -> tuple[int, int]:
    with filesystem.open_random(path) as stream:
        rows, width, _, _ = _header(stream)
    return rows, width


def _header(stream: object) -> tuple[int, int, np.dtype, int]:
    """Number of rows, width, dtype, and offset of the data in a .npy file."""
    version = np.lib.format.read_magic(stream)  # type: ignore[arg-type]
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)  # type: ignore[arg-type]
    if len(shape) != 2 or fortran or dtype.kind != "f":
        raise ValueError(
            f"the array has shape {shape} and dtype {dtype}, but embeddings are 2-dimensional and floating point"
        )
    return int(shape[0]), int(shape[1]), dtype, int(stream.tell())  # type: ignore[attr-defined]


SOURCES.register(EMBEDDED)(ClipRetrievalSource())
