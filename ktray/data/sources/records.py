"""The record of an image that was read, and the file suffixes of images."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".jp2", ".jpx", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".mpo",
)  # fmt: skip


# CLIP reads at most 77 tokens of a caption, and an array of captions has the width of its longest one.
MOST_CAPTION = 512


@dataclass(frozen=True)
class ImageRecord:
    """One image that was read, or the reason why it could not be read.

    Attributes:
        uri: see `ktray.data.sources.uris`; with an error it may be the uri of the containing file.
        data: the encoded bytes; None with an error.
        caption: the caption of the image, if it has one; at most `MOST_CAPTION` characters are kept.
        error: why there is no data; None if there is data.
    """

    uri: str
    data: bytes | None
    caption: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.caption and len(self.caption) > MOST_CAPTION:
            object.__setattr__(self, "caption", self.caption[:MOST_CAPTION])


# Files that are not images, whatever they contain, and whose content need not be looked at. Raw photos (the last line)
# begin as TIFF does, with a small preview as their first image.
_NO_IMAGES = (
    ".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".html", ".htm", ".pdf", ".npy", ".npz", ".mat", ".pt",
    ".pth", ".h5", ".zip", ".gz", ".tgz", ".tar", ".7z", ".rar", ".parquet", ".arrow", ".db", ".ini", ".log", ".yaml",
    ".yml", ".py", ".ipynb", ".sh", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".mp3", ".wav", ".lnk", ".url", ".xmp",
    ".aae", ".part", ".crdownload", ".tmp", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx",
    ".dng", ".nef", ".nrw", ".cr2", ".cr3", ".arw", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw",
)  # fmt: skip


def may_be_image(name: str) -> bool:
    """Whether a file without the suffix of an image may be one, so that its content decides."""
    return not name.lower().endswith(_NO_IMAGES)


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)
