"""Uris of images.

==================================  ==============================================================
``/folder/photo.jpg``               a file; also ``s3://bucket/key.jpg``
``FILE#...``                        a part of a file, in the format of its source, such as
                                    ``X.tar#member=M&offset=O&size=N`` and ``X.parquet#row=R``
``photo.jpg#xywh=X,Y,W,H``          a crop of an image, in pixels (W3C Media Fragments 1.0, 4.2.2);
                                    ``&xywh=...`` after another fragment
==================================  ==============================================================

Names after the ``#`` are percent-encoded; paths before it are unchanged.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import ClassVar

from ktray.data import filesystem
from ktray.recipe.registries import SOURCES

Box = tuple[int, int, int, int]

_CROP = re.compile(r"(?P<rest>.+)(?P<mark>[#&])xywh=(?P<box>\d+,\d+,\d+,\d+)", re.DOTALL)


@dataclass(frozen=True)
class ImageRef:
    """A parsed uri; ``str()`` is the inverse. Sources have subclasses for images that are parts of a file.

    Attributes:
        path: the file that contains the image: the image file itself, a tar, a Parquet file, ...
        box: left, top, width and height of a crop, in pixels of the upright image; None for the whole image.
        kind: name of the source that reads it.
    """

    path: str
    box: Box | None = None
    kind: ClassVar[str] = "files"

    @property
    def fragment(self) -> str:
        """The name of the image inside ``path``; empty if the file is the image."""
        return ""

    @staticmethod
    def parse(uri: str) -> ImageRef:
        """Parse a uri. Any string is a uri: if it does not end in a fragment of a source, it is the path of a file."""
        if "#" not in uri:
            return ImageRef(uri)
        if match := _CROP.fullmatch(uri):
            whole = ImageRef.parse(match["rest"])
            if match["mark"] == ("&" if whole.fragment else "#") and whole.box is None:
                left, top, width, height = (int(n) for n in match["box"].split(","))
                return replace(whole, box=(left, top, width, height))
        refs = (source.parse(uri) for _, source in SOURCES)
        return next((ref for ref in refs if ref is not None), None) or ImageRef(uri)

    def __str__(self) -> str:
        crop = f"xywh={','.join(str(n) for n in self.box)}" if self.box else ""
        inside = "&".join(part for part in (self.fragment, crop) if part)
        return f"{self.path}#{inside}" if inside else self.path

    @property
    def whole(self) -> ImageRef:
        """The whole image of a crop."""
        return replace(self, box=None)

    def crop(self, box: Box) -> ImageRef:
        """A crop of this image; ``box`` is in pixels of this image, which may be a crop itself."""
        left, top = self.box[:2] if self.box else (0, 0)
        return replace(self, box=(left + box[0], top + box[1], box[2], box[3]))


# The bytes, or the reason why there are none.
One = tuple[bytes | None, str | None]
Held = dict[ImageRef, One]


def resolve(path: str, listed_in: str) -> str:
    """Resolve a path from a list: an absolute path, a uri, or a path relative to the folder of the list, also with the
    backslashes of Windows."""
    if not path:
        return path
    if filesystem.is_remote(path):
        return filesystem.normalise(path)
    folder = listed_in.rpartition("/")[0]
    if filesystem.is_remote(listed_in):  # a remote list must not refer to local files, also not with file://
        return f"{folder}/{path}"
    found = filesystem.normalise(path if path.startswith(("/", "~", "file://")) else f"{folder}/{path}")
    if "\\" in path and not os.path.exists(found):
        # A list of Windows. Elsewhere a backslash is an ordinary character, so that the file decides.
        other = filesystem.normalise(f"{folder}/{path.replace(chr(92), '/')}")
        return other if os.path.exists(other) else found
    return found
