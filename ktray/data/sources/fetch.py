"""Reading: shards from start to end, or single images by uri.

A file that cannot be read is a record with an error, never an exception: one broken file ends no run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from ktray.data import filesystem
from ktray.data.concurrent import AT_ONCE, in_order
from ktray.data.decode import Enough, decode_rgb
from ktray.data.filesystem import why
from ktray.data.sources.uris import Held, ImageRef, One
from ktray.errors import BadImage, KtrayError
from ktray.recipe.registries import SOURCES


def fetch(uris: Sequence[str]) -> Iterator[tuple[str, bytes | None, str | None]]:
    """Images by uri, as (uri, bytes or None, error or None), in the order asked for.

    A crop's bytes are those of its whole image (`decode_image` cuts it). What comes from tars and Parquet files is held
    until its turn, so ask for as many images as may be in memory together. Plain files are read at their turn. On S3,
    where an answer takes its time however little is asked for, many are asked for at once.
    """
    refs = [ImageRef.parse(uri).whole for uri in uris]
    groups: dict[tuple[str, str], dict[ImageRef, None]] = {}
    for ref in refs:
        if ref.fragment:
            groups.setdefault((ref.kind, ref.path), {})[ref] = None
    calls: list[Callable[[], Held]] = []
    for (kind, path), group in groups.items():
        calls += SOURCES.get(kind).fetch(path, list(group))
    held: Held = {}
    for found in in_order(calls, _at_once(path for _, path in groups)):
        held |= found
    files = read_files([ref.path for ref in refs if not ref.fragment])
    for uri, ref in zip(uris, refs, strict=True):
        data, error = held[ref] if ref.fragment else next(files)
        yield uri, data, error


def _at_once(paths: Iterable[str]) -> int:
    return AT_ONCE if any(map(filesystem.is_remote, paths)) else 1


def read_files(paths: Sequence[str]) -> Iterator[One]:
    """Each file, or what else its name as a uri names, in order."""
    return in_order((partial(read_file, path) for path in paths), _at_once(paths))


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


def read_file(path: str) -> One:
    """As `read_files`, for one."""
    if not path:
        return None, "empty path"
    ref = ImageRef.parse(path)
    if ref.fragment:  # a list may name members and rows
        _, data, error = next(fetch([path]))
        return data, error
    try:
        return filesystem.read_bytes(ref.path), None
    except (OSError, ValueError, KtrayError) as error:  # ValueError: a NUL in the name
        return None, why(error)
