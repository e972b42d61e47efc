"""Read and decode images by uri.

For a file that cannot be read, an error is returned and no exception is raised, so that one broken file does not stop a
run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from ktray.data import filesystem
from ktray.data.decode import Enough, decode_rgb
from ktray.data.filesystem import why
from ktray.data.sources.uris import Held, ImageRef, One
from ktray.errors import BadImage, KtrayError
from ktray.recipe.registries import SOURCES
from ktray.storage.concurrent import AT_ONCE, in_order


def fetch(uris: Sequence[str]) -> Iterator[tuple[str, bytes | None, str | None]]:
    """Fetch images by uri, as (uri, bytes or None, error or None), in the order of ``uris``.

    The bytes of a crop are those of its whole image (`decode_image` cuts the crop). Images from tars and Parquet files
    stay in memory until they are returned, so ``uris`` should have at most as many images as fit into memory. Image
    files are read when they are returned. On S3, where each request has a latency, many requests run concurrently.
    """
    refs = [ImageRef.parse(uri).whole for uri in uris]
    groups: dict[tuple[str, str], dict[ImageRef, None]] = {}
    for ref in refs:
        if ref.fragment:
            groups.setdefault((ref.kind, ref.path), {})[ref] = None
    calls: list[Callable[[], Held]] = []
    for (kind, path), group in groups.items():
        calls += SOURCES.get(kind).fetch(path, list(group))
    contents: Held = {}
    for result in in_order(calls, at_once(path for _, path in groups)):
        contents |= result
    files = read_files([ref.path for ref in refs if not ref.fragment])
    for uri, ref in zip(uris, refs, strict=True):
        data, error = contents[ref] if ref.fragment else next(files)
        yield uri, data, error


def fetch_images(
    uris: Sequence[str], *, max_pixels: int, enough: Enough | None = None
) -> Iterator[tuple[str, np.ndarray | None, str]]:
    """Fetch and decode images by uri, in the order of ``uris``; see `fetch` and `decode_image`.

    Yields:
        uri; image (H, W, 3) uint8, or None if it cannot be used; why it cannot be used, or empty.
    """
    for uri, data, error in fetch(uris):
        try:
            image = decode_image(uri, data, error, max_pixels=max_pixels, enough=enough)
        except BadImage as bad:
            yield uri, None, bad.reason
        else:
            yield uri, image, ""


def at_once(paths: Iterable[str]) -> int:
    """How many requests are made concurrently to read files (paths, or uris in them): one if all are local."""
    return AT_ONCE if any(map(filesystem.is_remote, paths)) else 1


def read_files(paths: Sequence[str]) -> Iterator[One]:
    """Read files in order. Each path may also be a uri."""
    return in_order((partial(read_file, path) for path in paths), at_once(paths))


def decode_image(
    uri: str, data: bytes | None, error: str | None = None, *, max_pixels: int, enough: Enough | None = None
) -> np.ndarray:
    """Decode the result of `fetch` or `read_shard` for a uri to uint8 (H, W, 3). If the uri is a crop, the crop is cut.

    Args:
        uri: the uri of the image.
        data: the encoded bytes, or None.
        error: why there are no bytes.
        max_pixels: see `decode_rgb`.
        enough: see `decode_rgb`. Crops are not reduced, because their box is in pixels of the full image.

    Raises:
        BadImage: there is no data, the image cannot be decoded, or the crop is not inside the image.
    """
    if data is None:
        raise BadImage(error or "the image cannot be read")
    box = ImageRef.parse(uri).box
    image = decode_rgb(data, max_pixels=max_pixels, enough=None if box else enough)
    if not box:
        return image
    left, top, width, height = box
    if not width or not height or left + width > image.shape[1] or top + height > image.shape[0]:
        raise BadImage(f"the crop {box} is not inside the {image.shape[1]} x {image.shape[0]} pixels of the image")
    if enough:
        enough(height, width)
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def read_file(path: str) -> One:
    """Read one file or uri: (bytes, None) or (None, error)."""
    if not path:
        return None, "the path is empty"
    ref = ImageRef.parse(path)
    if ref.fragment:  # a list may contain uris of members and rows
        _, data, error = next(fetch([path]))
        return data, error
    try:
        return filesystem.read_bytes(ref.path), None
    except (OSError, ValueError, KtrayError) as error:  # ValueError: a NUL in the name
        return None, why(error)
