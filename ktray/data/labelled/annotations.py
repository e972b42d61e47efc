"""Splits whose labels are in a text file beside the images, as in TinyImageNet: ``val/val_annotations.txt``."""

from __future__ import annotations

from ktray.data import filesystem
from ktray.data.labelled.rows import LabelledRow, nfc
from ktray.data.sources.records import is_image
from ktray.errors import KtrayError


def annotated(root: str, name: str, split: str) -> list[LabelledRow] | None:
    """The rows of a split folder with ``NAME_annotations.txt``, whose lines begin with a file name and a class, divided
    by tabs; the images are in its folder ``images``. None if it has no such file.

    Args:
        root: the folder of the data.
        name: name of the split folder.

    Raises:
        KtrayError: a line has no class.
    """
    folder = f"{root}/{name}"
    file = filesystem.stat(f"{folder}/{name}_annotations.txt")
    if file is None:
        return None
    images = f"{folder}/images" if filesystem.is_folder(f"{folder}/images") else folder
    sizes = {f.path.rpartition("/")[2]: f for f in filesystem.walk(images) if is_image(f.path)}
    rows: list[LabelledRow] = []
    for number, line in enumerate(filesystem.read_bytes(file.path).decode("utf-8-sig", "replace").splitlines(), 1):
        if not line.strip():
            continue
        image, tab, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not tab or not label:
            raise KtrayError(
                f"Line {number} of '{file.path}' has no class", "Each line has a file name and a class, with a tab."
            )
        found = sizes.get(image.strip())
        if found is not None:
            key = f"{name}/{found.path[len(folder) + 1 :]}"
            rows.append(LabelledRow(found.path, nfc(key), nfc(label), split, f"{found.size}:{found.mtime_ns}"))
    return rows
