"""The record of an image that was read, and the file suffixes of images."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".jp2", ".jpx", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".mpo",
)  # fmt: skip


@dataclass(frozen=True)
class ImageRecord:
    """One image that was read, or the reason why it could not be read.

    Attributes:
        uri: see `ktray.data.sources.uris`; with an error it may be the uri of the containing file.
        data: the encoded bytes; None with an error.
        caption: the caption of the image, if it has one.
        error: why there is no data; None if there is data.
    """

    uri: str
    data: bytes | None
    caption: str | None = None
    error: str | None = None


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)
