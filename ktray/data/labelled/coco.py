"""Sets of classes in the annotations of COCO: JSON with ``images``, ``annotations`` and ``categories``.

The classes of an image are the names of the categories of its annotations; an image without annotations has the empty
set. Either one file has all images, or a folder has a file for each split, as COCO itself
(``annotations/instances_train2017.json``) or an export of an annotation tool (``train/_annotations.coco.json``). An
entry of ``images`` may have a key ``split``. Boxes and masks are not read.

See Lin et al., Microsoft COCO: Common Objects in Context, arXiv 1405.0312, and the format at cocodataset.org.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.labelled.label_lists import decode, encode
from ktray.data.labelled.list_columns import ListColumns
from ktray.data.labelled.rows import SPLITS, LabelledRow, nfc, three
from ktray.errors import KtrayError

_REMEDY = "Name a JSON file with the lists images, annotations and categories, as COCO's instances_train2017.json."
_SUFFIX = ".json"
# COCO has several files for a split; only this one names the objects in an image.
_OBJECTS = "instances"


def fits(path: str, file: FileStat | None) -> bool:
    return bool(path.lower().endswith(_SUFFIX) if file else _files(path))


def read(path: str, file: FileStat | None, notes: list[str], asked: ListColumns) -> list[LabelledRow]:
    """The rows of all images. Their labels are those of `ktray.data.labelled.label_lists.encode`.

    Raises:
        KtrayError: a file is not in the format, an annotation refers to an image or a category that does not exist, or
            no image exists.
    """
    asked.refuse(path, "a file or folder with COCO annotations")
    files = {"": [path]} if file else _files(path)
    twice = next((names for names in files.values() if len(names) > 1), None)
    if twice:
        raise KtrayError(f"'{path}' has two files of annotations for one split: {three(twice)}", "Remove one of them.")
    if files.keys() != {""} and "train" not in files:
        raise KtrayError(f"'{path}' has annotations for {' and '.join(sorted(files))}, but not for train", _REMEDY)
    root = path.rpartition("/")[0] if file else path
    rows: list[LabelledRow] = []
    unused: set[str] = set()
    for split, (name,) in sorted(files.items()):
        content = _content(name)
        rows += _rows(content, name, root, split)
        unused |= set(_categories(content, name).values())
    unused -= {name for row in rows for name in decode(row.label)}
    if unused:
        notes.append(f"Categories that no image has are ignored: {three(sorted(unused))}.")
    return rows


def _files(path: str) -> dict[str, list[str]]:
    """By split, the files of annotations in a folder, in its folder ``annotations``, and in the folders of splits."""
    folders, _ = filesystem.children(path)
    found: dict[str, list[str]] = defaultdict(list)
    inside = [""] + [name for name in folders if name == "annotations" or name.lower() in SPLITS]
    for folder in inside:
        place = f"{path}/{folder}" if folder else path
        names = [name for name in filesystem.children(place)[1] if name.lower().endswith(_SUFFIX)]
        chosen = [name for name in names if name.lower().startswith(_OBJECTS)] or names
        for name in chosen:
            split = SPLITS.get(folder.lower()) or _split_of(name)
            if split:
                found[split].append(f"{place}/{name}")
    return dict(found)


def _split_of(name: str) -> str | None:
    words = (re.sub(r"\d+$", "", word) for word in re.split(r"[_.\-]", name.lower()))
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _content(path: str) -> dict[str, Any]:
    try:
        with filesystem.open_random(path) as stream:  # COCO's own files are larger than any image may be
            content = json.load(stream)
    except OSError as error:
        raise KtrayError(f"'{path}' cannot be read: {filesystem.why(error)}", "Check its permissions.") from error
    except ValueError as error:  # of the encoding, or of the format
        raise KtrayError(f"'{path}' is not JSON: {error}", "Write the file again.") from error
    parts = ("images", "annotations", "categories")
    missing = [name for name in parts if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        raise KtrayError(f"'{path}' has no list {' and no list '.join(missing)}", _REMEDY)
    return dict(content)


def _categories(content: dict[str, Any], path: str) -> dict[Any, str]:
    try:
        return {entry["id"]: nfc(str(entry["name"]).strip()) for entry in content["categories"]}
    except (KeyError, TypeError) as error:
        raise KtrayError(f"A category in '{path}' has no {error}", "Each category has an id and a name.") from error


def _rows(content: dict[str, Any], path: str, root: str, split: str) -> list[LabelledRow]:
    categories, labels = _categories(content, path), defaultdict[Any, set[str]](set)
    try:
        images = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        splits = {entry["id"]: str(entry.get("split") or split or "train").lower() for entry in content["images"]}
        unknown = [a["image_id"] for a in content["annotations"] if a["image_id"] not in images]
        nameless = [a["category_id"] for a in content["annotations"] if a["category_id"] not in categories]
        for entry in content["annotations"]:
            labels[entry["image_id"]].add(categories.get(entry["category_id"], ""))
    except (KeyError, TypeError, AttributeError) as error:
        raise KtrayError(
            f"An entry of '{path}' has no {error}",
            "An image has an id and a file_name, an annotation an image_id and a category_id.",
        ) from error
    for what, ids in (("images", unknown), ("categories", nameless)):
        if ids:
            raise KtrayError(
                f"{len(ids)} annotations in '{path}' refer to {what} that it does not have, for example {ids[0]}",
                "Write the file again.",
            )
    wrong = sorted(set(splits.values()) - set(SPLITS))
    if wrong:
        raise KtrayError(f"'{path}' has the split '{wrong[0]}'", "Splits are train, val and test.")
    if not images:
        raise KtrayError(f"'{path}' has no images", _REMEDY)
    folder, status = _folder(list(images.values()), path, root), filesystem.stat(path)
    version = f"{status.size}:{status.mtime_ns}" if status else ""
    return [
        LabelledRow(
            _join(folder, name), nfc(f"{split}/{name}"), encode(labels[number]), SPLITS[splits[number]], version
        )
        for number, name in images.items()
    ]


def _join(folder: str, name: str) -> str:
    return name if name.startswith("/") or filesystem.is_remote(name) else f"{folder}/{name}"


def _folder(names: list[str], path: str, root: str) -> str:
    """The folder that the file names of a file of annotations start at."""
    near = path.rpartition("/")[0]
    tokens = re.split(r"[_.]", path.rpartition("/")[2])  # instances_train2017.json has its images in train2017/
    places = [near, root, f"{root}/images", f"{near}/images"]
    above = root.rpartition("/")[0]
    places += [f"{base}/{token}" for base in (root, f"{root}/images", above) for token in tokens if token]
    for place in dict.fromkeys(places):
        if any(filesystem.stat(_join(place, name)) is not None for name in names[:3]):
            return place
    raise KtrayError(
        f"The images of '{path}' are not found, for example '{names[0]}'",
        "Put them beside the file, or into the folder images/ or a folder with the name of the split beside it.",
    )
