"""One labelled image before the splits are drawn, the names of splits, and words for counts in messages."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field

from ktray.data import filesystem

SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One labelled image before the splits are drawn.

    Attributes:
        uri: where the image is.
        key: path of the image inside the data, or ``class/file`` of a split list. It is the same on every machine, and
            random draws depend on it.
        label: the name of the class, Unicode NFC; empty if a mask contains the classes.
        split: ``train``, ``val``, ``test``, or ``pool`` (a training image that is not in the chosen split list).
        version: size and modification time of the file (and of its mask), or empty.
        mask: where the label map of the image is, or empty.
        group: name of a group of images that are not independent, such as those of one patient or of one video, or
            empty. A split that ktray draws keeps the group together.
    """

    uri: str
    key: str
    label: str
    split: str
    version: str = ""
    mask: str = field(default="", repr=False)
    group: str = field(default="", repr=False)


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def three(names: Iterable[str]) -> str:
    """Up to three of the names, and the number of further names."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(f"'{filesystem.printable(name)}'" for name in listed[:3]) + more


def count(things: Sized, one: str, many: str = "") -> str:
    return f"{len(things)} {one if len(things) == 1 else many or one + 's'}"
