"""The kind of a file by its first bytes, for files whose names say nothing or something else."""

from __future__ import annotations

from ktray.data import heic

HEAD_BYTES = 64

_IMAGES = (
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
)  # fmt: skip
_OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS: run `git lfs pull`"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript file"),
    (b"8BPS", "a Photoshop document"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PAR1", "a Parquet file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"FUJIFILM", "a raw photo: export it as JPEG"),
    (b"\x1aE\xdf\xa3", "a video (Matroska)"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def image_kind(head: bytes) -> str | None:
    """The format of an image (``JPEG``, ``PNG``, ``HEIC``, ...), or None for all other files.

    Args:
        head: the first `HEAD_BYTES` bytes of the file.
    """
    for start, name in _IMAGES:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        # The brand mif1 says that it is an image of this family; which one, the compatible brands say.
        if head[8:12] in (b"avif", b"avis") or (head[8:12] in (b"mif1", b"msf1") and b"avif" in head):
            return "AVIF"
        if head[8:12] in _HEIC_BRANDS:
            return "HEIC"
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "BMP"
    return None


def decodable(head: bytes) -> bool:
    """Whether the file is an image in a format that ktray decodes."""
    kind = image_kind(head)
    return kind is not None and (kind != "HEIC" or heic.available())


def what_it_is(head: bytes) -> str:
    """A description of a file that is not an image ktray decodes; empty if nothing is known."""
    kind = image_kind(head)
    if kind == "HEIC" and not heic.available():
        return heic.MISSING
    for start, text in _OTHERS:
        if head.startswith(start):
            return text
    if head[4:8] == b"ftyp":
        return "a video (MP4)"
    words = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if words.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if words.startswith((b"<svg", b"<?xml")):
        return "an XML or SVG file: export it as PNG"
    if words.startswith((b"{", b"[")):
        return "a JSON text"
    return "zeros only" if head and not head.strip(b"\0") else ""
