"""Images with label maps, for segmentation: ktray's own folders, and ADE20K as its host lays it out."""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ktray.data import filesystem
from ktray.data.decode import formats
from ktray.data.filesystem import FileStat
from ktray.data.labelled.forms import SPLITS, LabelledRow, count, nfc, place, three
from ktray.data.labelled.labelled_set import LabelledSet, check_train_list, divide
from ktray.data.labelled.layouts import distinct
from ktray.data.labelled.masks import IGNORE, decode_mask
from ktray.data.labelled.split_lists import choose_lists, read_list
from ktray.data.sources.records import is_image
from ktray.errors import BadImage, KtrayError

MOST_CLASSES = 255  # values 0 to 254; 255 is no class
SAMPLE = 16
FORMS = (
    "For segmentation it has train/images/NAME.jpg and train/masks/NAME.png (one channel, value = class, "
    "255 = ignore), the same for val and test if there are any, and classes.txt with one name a line."
)
ADE_PARTS = {"train": "training", "test": "validation"}


@dataclass(frozen=True)
class Masked:
    """What was found.

    Attributes:
        rows: images with their masks; labels are empty.
        classes: names in the order of the masks' values.
        names: the same as text for people, or empty.
        offset: class = pixel value - offset.
    """

    rows: list[LabelledRow]
    classes: list[str]
    names: list[str]
    offset: int = 0


def read_masked(
    data: str,
    *,
    splits: str | None = None,
    seed: int,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    labels: int | None = None,
    layout: str = "auto",
    train_list: str | None = None,
) -> LabelledSet:
    """Read images with label maps.

    Args:
        data: a folder with ``train/images``, ``train/masks``, perhaps the same for val and test, and ``classes.txt``;
            or ADE20K's. Local or ``s3://``.
        splits: for ADE20K a folder of lists ``train*.txt``, ``val*.txt``, ``test*.txt`` of plain file names.
        seed, val_fraction, test_fraction: see `ktray.data.labelled.labelled_set.divide`.
        labels: label budget: training images with their masks, in total; a smaller one is a subset of a larger one.
        layout: ``auto`` or ``ade20k``.
        train_list: which train list of ``splits``, with or without its ending; None: by the budget, else the full.

    A few masks are opened to see that they are maps of these classes.

    Raises:
        KtrayError: not one of the forms, images without mask or masks without image, a class list that cannot be,
            masks that are no label maps, a key that would have no effect. Each says how many and shows three.
    """
    check_train_list(train_list, splits)
    notes: list[str] = []
    found = _find(data, splits, labels, train_list, layout, notes)
    return divide(
        found.rows,
        classes=lambda rows: found.classes,
        label=lambda row, number: 0,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        budget=labels,
        notes=notes,
        names=lambda classes: found.names,
        mask_offset=found.offset,
        facts=(found.classes, found.offset),
    )


def _find(
    data: str, splits: str | None, labels: int | None, train_list: str | None, layout: str, notes: list[str]
) -> Masked:
    root, file = place(data)
    if file is not None:
        raise KtrayError(f"'{root}' is a file, and a segmentation data set is a folder", FORMS)
    ade = _ade_root(root)
    if layout == "ade20k" and ade is None:
        raise KtrayError(
            f"'{root}' has no images/training and annotations/training",
            "task.data for task.layout=ade20k is the folder ADEChallengeData2016.",
        )
    if layout not in ("auto", "ade20k"):
        raise KtrayError(f"task.layout={layout} has no masks", "Set task.kind=classification for it.")
    if ade is not None:
        found = _ade20k(ade, splits, labels, train_list, notes)
    elif splits:
        raise KtrayError(
            f"task.splits goes with ADE20K's folders for segmentation, which '{root}' does not have",
            "Leave it out: train/, val/ and test/ are the splits; task.labels sets the label budget.",
        )
    else:
        found = _own(root, notes)
    _check_some(found)
    return found


def _own(root: str, notes: list[str]) -> Masked:
    parts = {name: SPLITS[name.lower()] for name in filesystem.children(root)[0] if name.lower() in SPLITS}
    if len(set(parts.values())) < len(parts):
        raise KtrayError(f"'{root}' has two folders for one split: {three(parts)}", "Merge or remove one.")
    if "train" not in parts.values():
        raise KtrayError(f"'{root}' has no train folder", FORMS)
    classes = _class_list(f"{root}/classes.txt")
    rows: list[LabelledRow] = []
    for name, split in sorted(parts.items()):
        for needed in ("images", "masks"):
            if not filesystem.is_folder(f"{root}/{name}/{needed}"):
                raise KtrayError(f"'{root}/{name}' has no folder '{needed}'", FORMS)
        rows += _pair(root, f"{root}/{name}/images", f"{root}/{name}/masks", split, notes)
    return Masked(rows, classes, [])


def _class_list(path: str) -> list[str]:
    if filesystem.stat(path) is None:
        raise KtrayError(f"'{path}' does not exist", FORMS)
    lines = [nfc(line.strip()) for line in filesystem.read_bytes(path).decode("utf-8-sig").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    empty = [f"line {i}" for i, line in enumerate(lines, 1) if not line]
    seen: set[str] = set()
    again = [line for line in lines if line in seen or seen.add(line)]  # type: ignore[func-returns-value]
    for what, wrong in (("empty lines", empty), ("names that were there before", again)):
        if wrong:
            raise KtrayError(
                f"Class list '{path}' has {len(wrong)} {what}: {three(wrong)}",
                "It has one name a line, in the order of the masks' values from 0, each once.",
            )
    if not 2 <= len(lines) <= MOST_CLASSES:
        raise KtrayError(
            f"Class list '{path}' has {count(lines, 'class', 'classes')}: {three(lines) or 'none'}",
            f"It takes two at least and {MOST_CLASSES} at most: {IGNORE} is what is ignored.",
        )
    return lines


def _pair(root: str, images: str, masks: str, split: str, notes: list[str]) -> list[LabelledRow]:
    """Rows of the images below one folder, each with the mask of its name below the other."""
    found = {kind: _by_stem(folder, notes) for kind, folder in (("image", images), ("mask", masks))}
    missing = {
        "image": sorted(found["image"].keys() - found["mask"].keys()),
        "mask": sorted(found["mask"].keys() - found["image"].keys()),
    }
    problems = [
        f"{count(stems, kind)} in '{images if kind == 'image' else masks}' without {other}: {three(stems)}"
        for (kind, stems), other in zip(missing.items(), ("mask", "image"), strict=True)
        if stems
    ]
    if problems:
        raise KtrayError(
            "; ".join(problems), "Each image has a mask of the same name (NAME.jpg and NAME.png): add or remove."
        )
    rows = []
    for stem, image in sorted(found["image"].items()):
        mask = found["mask"][stem]
        version = f"{image.size}:{image.mtime_ns}|{mask.size}:{mask.mtime_ns}"
        rows.append(LabelledRow(image.path, nfc(image.path[len(root) + 1 :]), "", split, version, mask.path))
    return rows


def _by_stem(folder: str, notes: list[str]) -> dict[str, FileStat]:
    out: dict[str, FileStat] = {}
    twice: list[str] = []
    others = 0
    for file in filesystem.walk(folder):
        if file.size < 0 or not is_image(file.path):
            others += 1
            continue
        stem = posixpath.splitext(file.path[len(folder) + 1 :])[0]
        if stem in out:
            twice.append(stem)
        out[stem] = file
    if twice:
        raise KtrayError(
            f"{count(twice, 'name')} in '{folder}' with two files: {three(sorted(twice))}",
            "Keep one file a name: image and mask are matched by it.",
        )
    if others:
        notes.append(f"{others} files in '{folder}' are ignored: not images, or in linked or closed folders.")
    return out


def _ade_root(root: str) -> str | None:
    for folder in (root, f"{root}/ADEChallengeData2016"):
        if all(filesystem.is_folder(f"{folder}/{kind}/training") for kind in ("images", "annotations")):
            return folder
    return None


def _ade20k(root: str, splits: str | None, labels: int | None, train_list: str | None, notes: list[str]) -> Masked:
    classes = _ade_classes(f"{root}/objectInfo150.txt")
    rows = {
        posixpath.basename(row.uri): row
        for split, part in ADE_PARTS.items()
        if filesystem.is_folder(f"{root}/images/{part}")
        for row in _pair(root, f"{root}/images/{part}", f"{root}/annotations/{part}", split, notes)
    }
    notes.append("Layout: ade20k; value 0 of its masks (other objects) is ignored.")
    if not splits:
        notes.append("ADE20K's validation images are the test set, as in the paper.")
        return Masked(list(rows.values()), classes, distinct(classes), offset=1)
    splits = filesystem.normalise(splits)
    chosen, larger = choose_lists(splits, labels, train_list, "task.labels")
    notes.append("Split lists: " + ", ".join(f"{file.rpartition('/')[2]}" for file in chosen.values()) + ".")
    named = {kind: [name for name, _ in read_list(file, classes=False)] for kind, file in chosen.items()}
    train = set(named["train"])
    others = dict.fromkeys(name for file in larger for name, _ in read_list(file, classes=False))
    named["pool"] = [name for name in others if name not in train]
    if missing := [name for some in named.values() for name in some if posixpath.basename(name) not in rows]:
        raise KtrayError(
            f"{count(missing, 'image')} of the lists in '{splits}' not found in '{root}/images': {three(missing)}",
            "The lists for ADE20K hold one file name a line, such as ADE_train_00000001.jpg.",
        )
    out = []
    for kind, some in named.items():
        for name in some:
            row = rows[posixpath.basename(name)]
            out.append(LabelledRow(row.uri, row.key, "", kind, row.version, row.mask))
    return Masked(out, classes, distinct(classes), offset=1)


def _ade_classes(path: str) -> list[str]:
    """Names by index from objectInfo150.txt: columns Idx, Ratio, Train, Val, Stuff, Name under a heading."""
    if filesystem.stat(path) is None:
        raise KtrayError(f"'{path}' does not exist", "It comes with ADEChallengeData2016 and names the classes.")
    lines = filesystem.read_bytes(path).decode("utf-8-sig").splitlines()
    found = [re.match(r"\s*(\d+)\s+[\d.]+\s+\d+\s+\d+\s+\d+\s+(.+)", line) for line in lines]
    numbered = [(int(row[1]), nfc(row[2].strip())) for row in found if row]
    names = [name for _, name in numbered]
    if [i for i, _ in numbered] != list(range(1, len(numbered) + 1)) or len(set(names)) < 2:
        raise KtrayError(f"'{path}' does not number the classes from 1", "Take the one of ADEChallengeData2016.")
    return names


def _check_some(found: Masked) -> None:
    """Open a few masks, the same ones on every machine. Rare broken ones are for the stage that reads them all."""
    sample = sorted(found.rows, key=lambda r: hashlib.blake2b(r.key.encode(), digest_size=8).digest())[:SAMPLE]
    not_maps: list[str] = []
    other_size: list[str] = []
    unknown: list[str] = []
    for row in sample:
        name = posixpath.basename(row.mask)
        try:
            mask = decode_mask(filesystem.read_bytes(row.mask), MOST_CLASSES, offset=found.offset)
        except (OSError, BadImage) as error:
            not_maps.append(f"{name} ({error.reason if isinstance(error, BadImage) else filesystem.why(error)})")
            continue
        height, width = mask.shape
        shown = _image_size(row.uri)
        if shown and tuple(shown) != (width, height):
            other_size.append(f"{name} ({width} x {height}, its image {shown[0]} x {shown[1]})")
        strange = mask[(mask != IGNORE) & (mask >= len(found.classes))]
        if strange.size:
            unknown.append(f"{name} (value {int(strange.min()) + found.offset})")
    of = f"of {count(sample, 'mask')} that were opened"
    rare = len(sample) // 8
    if len(not_maps) > rare:
        raise KtrayError(
            f"{len(not_maps)} {of} are no label maps: {three(not_maps)}",
            "A mask is a PNG of one channel whose pixel values are the classes' numbers, not their colours.",
        )
    if len(other_size) > rare:
        raise KtrayError(
            f"{len(other_size)} {of} have another size than their image: {three(other_size)}",
            "Image and mask are of one size (the image's with its EXIF orientation applied).",
        )
    if unknown:
        raise KtrayError(
            f"{len(unknown)} {of} have values beyond the {len(found.classes)} classes: {three(unknown)}",
            f"Name every value in classes.txt, in order from 0; {IGNORE} marks what is not labelled.",
        )


def _image_size(uri: str) -> Sequence[int] | None:
    """Width and height as they are shown, or None where it cannot be read (the stage that decodes it tells)."""
    try:
        with Image.open(io.BytesIO(filesystem.read_bytes(uri)), formats=formats()) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return image.size[::-1] if turned else image.size
    except Exception:  # any of Pillow's errors
        return None
