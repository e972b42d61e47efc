"""Reading: shards from start to end, or single images by uri.

A file that cannot be read is a record with an error, never an exception: one broken file ends no run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ktray.data import filesystem
from ktray.data.concurrent import AT_ONCE, in_order
from ktray.data.decode import Enough, decode_rgb
from ktray.data.filesystem import MAX_FILE_BYTES, why
from ktray.data.sources.listing import resolve
from ktray.data.sources.parquets import image_column, iter_rows, read_footer
from ktray.data.sources.tars import fetch_members
from ktray.data.sources.uris import ImageRef
from ktray.errors import BadImage, KtrayError

# Bytes, or why there are none.
One = tuple[bytes | None, str | None]
Held = dict[ImageRef, One]
# Images of a tar on S3 that one call reads one after the other.
_A_PART = 8


def fetch(uris: Sequence[str]) -> Iterator[tuple[str, bytes | None, str | None]]:
    """Images by uri, as (uri, bytes or None, error or None), in the order asked for.

    A crop's bytes are those of its whole image (`decode_image` cuts it). What comes from tars and Parquet files is held
    until its turn, so ask for as many images as may be in memory together. Plain files are read at their turn. On S3,
    where an answer takes its time however little is asked for, many are asked for at once.
    """
    refs = [ImageRef.parse(uri).whole for uri in uris]
    groups: dict[tuple[str, str], dict[ImageRef, None]] = {}
    for ref in refs:
        groups.setdefault((ref.kind, ref.path), {})[ref] = None
    calls: list[Callable[[], Held]] = []
    for (kind, path), group in groups.items():
        if kind == "tar":
            calls += [partial(fetch_members, path, part) for part in _parts(path, list(group))]
        elif kind == "parquet":
            calls.append(partial(_fetch_rows, path, list(group)))
    held: Held = {}
    for found in in_order(calls, _at_once(path for _, path in groups)):
        held |= found
    files = _read_files([ref.path for ref in refs if ref.kind == "file"])
    for uri, ref in zip(uris, refs, strict=True):
        data, error = next(files) if ref.kind == "file" else held[ref]
        yield uri, data, error


def _at_once(paths: Iterable[str]) -> int:
    return AT_ONCE if any(map(filesystem.is_remote, paths)) else 1


def _parts(path: str, refs: list[ImageRef]) -> list[list[ImageRef]]:
    """An archive's images for calls that open it each, neighbours together."""
    if not filesystem.is_remote(path) or not path.lower().endswith(".tar"):  # what is packed is read from its start
        return [refs]
    refs = sorted(refs, key=lambda ref: ref.offset)
    return [refs[first : first + _A_PART] for first in range(0, len(refs), _A_PART)]


def _read_files(paths: Sequence[str]) -> Iterator[One]:
    return in_order((partial(_read_file, path) for path in paths), _at_once(paths))


def decode_image(
    uri: str, data: bytes | None, error: str | None = None, *, max_pixels: int, enough: Enough | None = None
) -> np.ndarray:
    """Pixels of what `fetch` or `read_shard` gave for a uri: uint8 (H, W, 3), cut where the uri names a crop.

    Args:
        enough: as for `decode_rgb`; a crop, whose box is in pixels of the full image, keeps its size.

    Raises:
        BadImage: there is no data, it cannot be decoded, or the crop lies outside.
    """
    if data is None:
        raise BadImage(error or "cannot be read")
    box = ImageRef.parse(uri).box
    image = decode_rgb(data, max_pixels=max_pixels, enough=None if box else enough)
    if not box:
        return image
    left, top, width, height = box
    if not width or not height or left + width > image.shape[1] or top + height > image.shape[0]:
        raise BadImage(f"the crop {box} does not lie within its {image.shape[1]} x {image.shape[0]} pixels")
    if enough:
        enough(height, width)
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _read_file(path: str) -> One:
    if not path:
        return None, "empty path"
    ref = ImageRef.parse(path)
    if ref.kind != "file":  # a list may name members and rows
        _, data, error = next(fetch([path]))
        return data, error
    try:
        return filesystem.read_bytes(ref.path), None
    except (OSError, ValueError, KtrayError) as error:  # ValueError: a NUL in the name
        return None, why(error)


def _cell(value: Any, path: str, ref: ImageRef) -> tuple[str, bytes | None, str | None]:
    """Uri and content of one cell: bytes, ``{bytes, path}``, or a path."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        if len(value) > MAX_FILE_BYTES:
            return str(ref), None, f"more than {MAX_FILE_BYTES >> 20} MiB"
        return str(ref), value, None
    if not value:
        return str(ref), None, "empty cell"
    uri = resolve(str(value), path)
    if ImageRef.parse(uri).kind == "parquet":  # it may name itself
        return uri, None, "a Parquet cell that names a Parquet cell"
    return uri, *_read_file(uri)


def _fetch_rows(path: str, refs: Sequence[ImageRef]) -> Held:
    out: Held = {}
    for column in dict.fromkeys(ref.column for ref in refs):
        by_row = {int(ref.row or 0): ref for ref in refs if ref.column == column}
        try:
            name = image_column(read_footer(path).schema, column or "auto", path)
            for row, values in iter_rows(path, [name], sorted(by_row)):
                out[by_row[row]] = _cell(values[name], path, by_row[row])[1:]
        except Exception as error:
            for ref in by_row.values():
                out.setdefault(ref, (None, f"broken Parquet file: {why(error)}"))
    return out
