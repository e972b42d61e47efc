"""What reading gives, and which files are images."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".jp2", ".jpx", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".mpo",
)  # fmt: skip


@dataclass(frozen=True)
class ImageRecord:
    """One image as it was read, or why it was not.

    Attributes:
        uri: see `ktray.data.sources.uris`; with an error it may name the container.
        data: the encoded bytes (not yet decoded), None with an error.
        caption: the text that came with the image, if any.
        error: why there is no data; None when there is.
    """

    uri: str
    data: bytes | None
    caption: str | None = None
    error: str | None = None


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)
