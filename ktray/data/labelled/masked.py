"""Read images with masks (label maps) for segmentation, in ktray's own folder layout or that of ADE20K."""

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
from ktray.data.labelled.forms import place
from ktray.data.labelled.labelled_set import LabelledSet, check_train_list, divide
from ktray.data.labelled.layouts import distinct
from ktray.data.labelled.masks import IGNORE, decode_mask
from ktray.data.labelled.rows import SPLITS, LabelledRow, count, nfc, three
from ktray.data.labelled.split_lists import choose_lists, read_list
from ktray.data.sources.records import is_image
from ktray.errors import BadImage, KtrayError

MOST_CLASSES = 255  # values 0 to 254; 255 is not a class
SAMPLE = 16
FORMS = (
    "A segmentation data set has train/images/NAME.jpg and train/masks/NAME.png (one channel, value = class, "
    "255 = ignore), optionally val/ and test/ with the same folders, and classes.txt with one class name per line."
)
ADE_PARTS = {"train": "training", "test": "validation"}


@dataclass(frozen=True)
class Masked:
    """The images and classes of a segmentation data set.

    Attributes:
        rows: images with their masks; labels are empty.
        classes: class names in the order of the masks' values.
        names: readable class names, or empty.
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
    """Read images with masks. Several masks are opened to check that they are label maps of these classes.

    Args:
        data: local path or ``s3://`` of a folder with ``train/images``, ``train/masks``, optionally the same folders
            for val and test, and ``classes.txt``; or of the folder of ADE20K.
        splits: only for ADE20K: a folder with lists ``train*.txt``, ``val*.txt``, ``test*.txt`` of file names.
        seed, val_fraction, test_fraction: see `ktray.data.labelled.labelled_set.divide`.
        labels: label budget: number of training images with masks, in total; a smaller budget is a subset of a larger
            one.
        layout: ``auto`` or ``ade20k``.
        train_list: name of the train list in ``splits``, with or without suffix; None: the list for the budget if there
            is one, otherwise the full list.

    Raises:
        KtrayError: the data has neither layout, images have no mask or masks no image, the class list is invalid, masks
            are not label maps, or a key would have no effect. Messages contain the number of cases and three examples.
    """
    check_train_list(train_list, splits)
    notes: list[str] = []
    masked = _find(data, splits, labels, train_list, layout, notes)
    return divide(
        masked.rows,
        classes=lambda rows: masked.classes,
        label=lambda row, number: 0,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        budget=labels,
        notes=notes,
        names=lambda classes: masked.names,
        mask_offset=masked.offset,
        facts=(masked.classes, masked.offset),
    )


def _find(
    data: str, splits: str | None, labels: int | None, train_list: str | None, layout: str, notes: list[str]
) -> Masked:
    root, file = place(data)
    if file is not None:
        raise KtrayError(f"'{root}' is a file, but a segmentation data set is a folder", FORMS)
    ade = _ade_root(root)
    if layout == "ade20k" and ade is None:
        raise KtrayError(
            f"'{root}' has no images/training and annotations/training",
            "For task.layout=ade20k, set task.data to the folder ADEChallengeData2016.",
        )
    if layout not in ("auto", "ade20k"):
        raise KtrayError(
            f"task.layout={layout} is a layout without masks", "Set task.kind=classification for this layout."
        )
    if ade is not None:
        masked = _ade20k(ade, splits, labels, train_list, notes)
    elif splits:
        raise KtrayError(
            f"For segmentation, task.splits is only for the layout of ADE20K, which '{root}' does not have",
            "Remove task.splits: train/, val/ and test/ are the splits, and task.labels sets the label budget.",
        )
    else:
        masked = _read_own_layout(root, notes)
    _check_sample(masked)
    return masked


def _read_own_layout(root: str, notes: list[str]) -> Masked:
    parts = {name: SPLITS[name.lower()] for name in filesystem.children(root)[0] if name.lower() in SPLITS}
    if len(set(parts.values())) < len(parts):
        raise KtrayError(f"'{root}' has two folders for one split: {three(parts)}", "Merge the folders, or remove one.")
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
    repeated = [line for line in lines if line in seen or seen.add(line)]  # type: ignore[func-returns-value]
    for problem, wrong in (("empty lines", empty), ("repeated names", repeated)):
        if wrong:
            raise KtrayError(
                f"Class list '{path}' has {len(wrong)} {problem}: {three(wrong)}",
                "Write each class name once, one per line, in the order of the masks' values from 0.",
            )
    if not 2 <= len(lines) <= MOST_CLASSES:
        raise KtrayError(
            f"Class list '{path}' has {count(lines, 'class', 'classes')}: {three(lines) or 'none'}",
            f"Use at least two and at most {MOST_CLASSES} classes; the value {IGNORE} marks ignored pixels.",
        )
    return lines


def _pair(root: str, images: str, masks: str, split: str, notes: list[str]) -> list[LabelledRow]:
    """Rows of the images below one folder, each with the mask of the same name below the other folder."""
    files = {kind: _by_stem(folder, notes) for kind, folder in (("image", images), ("mask", masks))}
    missing = {
        "image": sorted(files["image"].keys() - files["mask"].keys()),
        "mask": sorted(files["mask"].keys() - files["image"].keys()),
    }
    problems = [
        f"{count(stems, kind)} in '{images if kind == 'image' else masks}' without {other}: {three(stems)}"
        for (kind, stems), other in zip(missing.items(), ("mask", "image"), strict=True)
        if stems
    ]
    if problems:
        raise KtrayError(
            "; ".join(problems),
            "Each image needs a mask of the same name (NAME.jpg and NAME.png): add or remove files.",
        )
    rows = []
    for stem, image in sorted(files["image"].items()):
        mask = files["mask"][stem]
        version = f"{image.size}:{image.mtime_ns}|{mask.size}:{mask.mtime_ns}"
        rows.append(LabelledRow(image.path, nfc(image.path[len(root) + 1 :]), "", split, version, mask.path))
    return rows


def _by_stem(folder: str, notes: list[str]) -> dict[str, FileStat]:
    files_by_stem: dict[str, FileStat] = {}
    twice: list[str] = []
    ignored = 0
    for file in filesystem.walk(folder):
        if file.size < 0 or not is_image(file.path):
            ignored += 1
            continue
        stem = posixpath.splitext(file.path[len(folder) + 1 :])[0]
        if stem in files_by_stem:
            twice.append(stem)
        files_by_stem[stem] = file
    if twice:
        raise KtrayError(
            f"{count(twice, 'name')} in '{folder}' with two files: {three(sorted(twice))}",
            "Keep one file per name: images and masks are matched by name.",
        )
    if ignored:
        notes.append(
            f"{ignored} files in '{folder}' are ignored: they are not images, or in linked or unreadable folders."
        )
    return files_by_stem


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
    notes.append("Layout: ade20k; the value 0 of the masks (other objects) is ignored.")
    if not splits:
        notes.append("ADE20K's validation images are the test set, as in the paper.")
        return Masked(list(rows.values()), classes, distinct(classes), offset=1)
    splits = filesystem.normalise(splits)
    chosen, larger = choose_lists(splits, labels, train_list, "task.labels")
    notes.append("Split lists: " + ", ".join(f"{file.rpartition('/')[2]}" for file in chosen.values()) + ".")
    named = {kind: [name for name, _ in read_list(file, classes=False)] for kind, file in chosen.items()}
    train = set(named["train"])
    pool = dict.fromkeys(name for file in larger for name, _ in read_list(file, classes=False))
    named["pool"] = [name for name in pool if name not in train]
    if missing := [name for names in named.values() for name in names if posixpath.basename(name) not in rows]:
        raise KtrayError(
            f"{count(missing, 'image')} of the lists in '{splits}' cannot be found in '{root}/images': "
            f"{three(missing)}",
            "Lists for ADE20K have one file name per line, such as ADE_train_00000001.jpg: correct the lists.",
        )
    listed = []
    for kind, names in named.items():
        for name in names:
            row = rows[posixpath.basename(name)]
            listed.append(LabelledRow(row.uri, row.key, "", kind, row.version, row.mask))
    return Masked(listed, classes, distinct(classes), offset=1)


def _ade_classes(path: str) -> list[str]:
    """Class names by index from objectInfo150.txt: a heading, then columns Idx, Ratio, Train, Val, Stuff, Name."""
    if filesystem.stat(path) is None:
        raise KtrayError(f"'{path}' does not exist", "Copy it from ADEChallengeData2016: it contains the class names.")
    lines = filesystem.read_bytes(path).decode("utf-8-sig").splitlines()
    matches = [re.match(r"\s*(\d+)\s+[\d.]+\s+\d+\s+\d+\s+\d+\s+(.+)", line) for line in lines]
    numbered = [(int(row[1]), nfc(row[2].strip())) for row in matches if row]
    names = [name for _, name in numbered]
    if [i for i, _ in numbered] != list(range(1, len(numbered) + 1)) or len(set(names)) < 2:
        raise KtrayError(f"'{path}' does not number the classes from 1", "Use the file of ADEChallengeData2016.")
    return names


def _check_sample(masked: Masked) -> None:
    """Check several masks, the same on every machine. Rare broken masks are left to the stage that reads all masks."""
    sample = sorted(masked.rows, key=lambda r: hashlib.blake2b(r.key.encode(), digest_size=8).digest())[:SAMPLE]
    not_maps: list[str] = []
    other_size: list[str] = []
    unknown: list[str] = []
    for row in sample:
        name = posixpath.basename(row.mask)
        try:
            mask = decode_mask(filesystem.read_bytes(row.mask), MOST_CLASSES, offset=masked.offset)
        except (OSError, BadImage) as error:
            not_maps.append(f"{name} ({error.reason if isinstance(error, BadImage) else filesystem.why(error)})")
            continue
        height, width = mask.shape
        image_size = _image_size(row.uri)
        if image_size and tuple(image_size) != (width, height):
            other_size.append(f"{name} ({width} x {height}, but the image is {image_size[0]} x {image_size[1]})")
        values = mask[(mask != IGNORE) & (mask >= len(masked.classes))]
        if values.size:
            unknown.append(f"{name} (value {int(values.min()) + masked.offset})")
    checked = f"of {count(sample, 'checked mask')}"
    rare = len(sample) // 8
    if len(not_maps) > rare:
        raise KtrayError(
            f"{len(not_maps)} {checked} are not label maps: {three(not_maps)}",
            "A mask must be a PNG with one channel, whose pixel values are the numbers of the classes, not colours.",
        )
    if len(other_size) > rare:
        raise KtrayError(
            f"{len(other_size)} {checked} and their images have different sizes: {three(other_size)}",
            "Resize the masks to the size of the images, after EXIF orientation.",
        )
    if unknown:
        raise KtrayError(
            f"{len(unknown)} {checked} have values beyond the {len(masked.classes)} classes: {three(unknown)}",
            f"Add a class name for every value to classes.txt, in order from 0; {IGNORE} marks unlabelled pixels.",
        )


def _image_size(uri: str) -> Sequence[int] | None:
    """Displayed width and height, or None if the image cannot be read (the stage that decodes it reports that)."""
    try:
        with Image.open(io.BytesIO(filesystem.read_bytes(uri)), formats=formats()) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return image.size[::-1] if turned else image.size
    except Exception:  # any of Pillow's errors
        return None
