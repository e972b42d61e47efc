"""Labelled images: a folder, a list, or official split lists become train, val and test.

Everything that is drawn (splits, the label budget) is drawn by a hash of the seed and the image's path inside
the data, so it is the same on every machine and whatever the order of a directory.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ktray.data.filesystem import normalise
from ktray.data.labelled.forms import LabelledRow, count, place, read_rows, three
from ktray.data.labelled.layouts import readable
from ktray.data.labelled.masked import read_masked
from ktray.data.labelled.split_lists import read_split_lists
from ktray.errors import KtrayError


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A labelled image.

    Attributes:
        uri: where the image lies (see `ktray.data.sources.uris`).
        label: index into `LabelledSet.classes`; 0 where there is a mask.
        mask: uri of the label map of a segmentation task, else empty. One channel of 8 bits, the image's size;
            class = value - `LabelledSet.mask_offset`; 255 and whatever is then no class's number are ignored.
    """

    uri: str
    label: int
    mask: str = ""


@dataclass(frozen=True)
class LabelledSet:
    """A task's labelled images.

    Attributes:
        classes: names in the order of the labels: numeric names by value, others by code point; for segmentation in
            the order of the masks' values.
        train, val, test: disjoint; train holds the label budget alone.
        unlabeled: uris of the training images beyond the label budget, without their labels.
        notes: what was decided and why, one sentence each.
        fingerprint: hash of names, labels, splits and, for folders, sizes and modification times.
        names: the classes as text for people and text towers, where something better is known; else empty.
        mask_offset: see `LabelledExample.mask`.
    """

    classes: list[str]
    train: list[LabelledExample]
    val: list[LabelledExample]
    test: list[LabelledExample]
    unlabeled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    names: list[str] = field(default_factory=list)
    mask_offset: int = 0


def read_labelled(
    data: str,
    *,
    splits: str | None = None,
    seed: int,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    labels_per_class: int | None = None,
    labels: int | None = None,
    layout: str = "auto",
    train_list: str | None = None,
    kind: str = "classification",
) -> LabelledSet:
    """Read a labelled data set.

    Args:
        data: for classification a folder with ``train/`` and perhaps ``val/`` (or ``valid/``, ``validation/``) and
            ``test/``, each of class folders; a folder of class folders; a CSV or Parquet list with columns path,
            label and perhaps split (paths absolute, ``s3://``, or relative to the list's folder; a Parquet list may
            hold image bytes in place of paths). For segmentation a folder with ``train/images``, ``train/masks``,
            perhaps the same for val and test, and ``classes.txt``; or ADE20K's. Local or ``s3://``.
        splits: a folder of lists ``train*.txt``, ``val*.txt``, ``test*.txt`` of lines ``file,class`` (ADE20K:
            plain file names) for the images under ``data``. Images of the other train lists are unlabeled.
        seed: draws the splits that are missing and the label budget.
        val_fraction, test_fraction: shares that are split off where there is no val or test. Of each class at
            least one image stays in train; with two, one goes to val; from three, one at least to each.
        labels_per_class: label budget of classification; a smaller one is a subset of a larger one with the same
            seed. None takes all of train.
        labels: label budget of segmentation: training images with their masks, in total; nested likewise.
        layout: whose folders and lists these are (`layouts.LAYOUTS`); auto tells by the lists' names.
        train_list: which train list of ``splits``, with or without its ending; None: by the budget, else the full.
        kind: classification or segmentation.

    Returns:
        The set, each part in a fixed order.

    Raises:
        KtrayError: nothing there, a list without the columns, fewer than two classes, classes in val or test
            that train lacks, one image in two splits or with two labels, no image where the list says, images
            without masks, a key that does not go with the kind of task.
    """
    _check_keys(kind, splits, labels_per_class, labels, layout, train_list)
    notes: list[str] = []
    classes: list[str] = []
    names: list[str] = []
    offset = 0
    if kind == "segmentation":
        found = read_masked(data, splits, labels, train_list, layout, notes)
        rows, classes, names, offset = found.rows, found.classes, found.names, found.offset
    elif splits:
        root, file = place(data)
        if file is not None:
            raise KtrayError(
                f"task.splits goes with a folder of images, and '{root}' is a list", "Leave one of them out."
            )
        rows, known = read_split_lists(root, normalise(splits), labels_per_class, train_list, layout, notes)
    else:
        rows = read_rows(data, notes)
    rows = _without_repeats(rows, notes)
    rows = _fill_splits(rows, seed, val_fraction, test_fraction, notes)
    if kind == "classification":
        classes = _classes(rows, data)
        names = readable(known, root, classes) if splits else []
    budget = labels if kind == "segmentation" else labels_per_class
    kept, surplus = _budget([r for r in rows if r.split == "train"], seed, budget, notes)
    number = {name: i for i, name in enumerate(classes)} if kind == "classification" else {"": 0}

    def part(chosen: Iterable[LabelledRow]) -> list[LabelledExample]:
        order = sorted(chosen, key=lambda r: (number[r.label], r.key))
        return [LabelledExample(r.uri, number[r.label], r.mask) for r in order]

    val, test = ([r for r in rows if r.split == name] for name in ("val", "test"))
    if not val:
        notes.append("There is no validation image: each class has a single one, which trains.")
    if not test:
        notes.append("There is no test image, so no test metric.")
    pool = sorted([*surplus, *(r for r in rows if r.split == "pool")], key=lambda r: r.key)
    digest = hashlib.blake2b(digest_size=16)
    for row in [*sorted(rows, key=lambda r: (r.key, r.split)), *sorted(kept, key=lambda r: r.key)]:
        digest.update(repr(row).encode())
    if kind == "segmentation":
        digest.update(repr((classes, offset)).encode())
    return LabelledSet(
        classes,
        part(kept),
        part(val),
        part(test),
        [r.uri for r in pool],
        notes,
        digest.hexdigest(),
        names,
        offset,
    )


def _check_keys(
    kind: str, splits: str | None, labels_per_class: int | None, labels: int | None, layout: str, train_list: str | None
) -> None:
    """Raises KtrayError: a key that would have no effect."""
    if kind == "segmentation":
        if labels_per_class is not None:
            raise KtrayError(
                "task.labels_per_class does not go with task.kind=segmentation: an image has many classes",
                "Set task.labels=N for N labelled images in total, or task.train_list.",
            )
    elif labels is not None:
        raise KtrayError(
            "task.labels counts the labelled images of a segmentation task", "Set task.labels_per_class instead."
        )
    elif layout == "ade20k":
        raise KtrayError("task.layout=ade20k has masks", "Set task.kind=segmentation.")
    elif layout != "auto" and not splits:
        raise KtrayError(
            f"task.layout={layout} needs its split lists",
            "Set task.splits to the folder with them, or task.layout=auto for train/ val/ test/ of class folders.",
        )
    if train_list and not splits:
        raise KtrayError(f"task.train_list={train_list} is looked for in task.splits, which is not set", "Set it too.")


def _without_repeats(rows: Sequence[LabelledRow], notes: list[str]) -> list[LabelledRow]:
    """One row an image; an image in two splits or with two labels is an error."""
    seen: dict[str, LabelledRow] = {}
    torn: list[str] = []
    between: set[str] = set()
    named_twice: list[str] = []
    repeats = 0
    for row in rows:
        before = seen.setdefault(row.uri, row)
        if before is row:
            continue
        repeats += 1
        if before.split != row.split:
            torn.append(row.uri)
            between |= {before.split, row.split}
        elif before.label != row.label:
            named_twice.append(row.uri)
    if torn:
        where = ", ".join("larger train lists" if name == "pool" else name for name in sorted(between))
        raise KtrayError(
            f"{count(torn, 'image')} {'stands' if len(torn) == 1 else 'stand'} in two splits: {three(torn)} ({where})",
            "Keep each image in one of train, val and test: a test on training images says nothing.",
        )
    if named_twice:
        raise KtrayError(
            f"{count(named_twice, 'image')} {'has' if len(named_twice) == 1 else 'have'} two labels: "
            f"{three(named_twice)}",
            "Keep one label an image.",
        )
    if repeats:
        notes.append(f"{repeats} repeated lines of the list are counted once.")
    return list(seen.values())


def _fill_splits(
    rows: Sequence[LabelledRow], seed: int, val_fraction: float, test_fraction: float, notes: list[str]
) -> list[LabelledRow]:
    have = {r.split for r in rows}
    shares = {"val": val_fraction, "test": test_fraction}
    missing = [name for name in ("test", "val") if name not in have]
    if not missing:
        return list(rows)
    out = [r for r in rows if r.split != "train"]
    few = 0
    for _, group in _by_class(r for r in rows if r.split == "train"):
        left = _shuffled(group, "split", seed)
        few += len(left) <= len(missing)
        for name in missing:
            later = len(missing) - missing.index(name)  # each missing split and train want one
            wanted = max(1, round(shares[name] * len(group)))
            # With too few images for all, val goes before test: without it no model can be chosen.
            take = min(wanted, len(left) - later) if len(left) > later else 0
            out += [replace(r, split=name) for r in left[:take]]
            left = left[take:]
        out += left
    names = " and ".join(reversed(missing))
    amounts = " and ".join(f"{shares[name]:g}" for name in reversed(missing))
    of = "of each class" if rows and rows[0].label else "of the images"
    notes.append(f"There is no {names} split: {amounts} {of} is split off from train (seed {seed}).")
    if few:
        notes.append(
            f"Classes with too few images for every split: {few}; train keeps one at least, then val, then test."
        )
    return out


def _classes(rows: Sequence[LabelledRow], data: str) -> list[str]:
    names = {r.label for r in rows if r.split == "train"}
    unknown = Counter(r.label for r in rows if r.split in ("val", "test") and r.label not in names)
    if unknown:
        raise KtrayError(
            f"{count(unknown, 'class', 'classes')} of val or test has no training image in '{data}': "
            f"{three(sorted(unknown))}",
            "Check the spelling, add training images, or take these classes out.",
        )
    if len(names) < 2:
        only = f"only one class, {three(names)}" if names else "no training images"
        raise KtrayError(
            f"'{data}' has {only}", "Classification needs two classes at least, such as 'it' and 'everything else'."
        )
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _budget(
    train: Sequence[LabelledRow], seed: int, labels_per_class: int | None, notes: list[str]
) -> tuple[list[LabelledRow], list[LabelledRow]]:
    """Training rows within the label budget, and the rest."""
    if labels_per_class is None:
        return list(train), []
    kept: list[LabelledRow] = []
    surplus: list[LabelledRow] = []
    short = []
    for name, group in _by_class(train):
        order = _shuffled(group, "budget", seed)
        kept += order[:labels_per_class]
        surplus += order[labels_per_class:]
        if len(group) < labels_per_class:
            short.append(name)
    if short:
        notes.append(
            f"{count(short, 'class', 'classes')} with fewer than {labels_per_class} training images: {three(short)}."
            if short != [""]
            else f"There are fewer than {labels_per_class} training images: {len(kept)}."
        )
    return kept, surplus


def _by_class(rows: Iterable[LabelledRow]) -> list[tuple[str, list[LabelledRow]]]:
    groups: dict[str, list[LabelledRow]] = defaultdict(list)
    for row in rows:
        groups[row.label].append(row)
    return sorted(groups.items())


def _shuffled(rows: Iterable[LabelledRow], purpose: str, seed: int) -> list[LabelledRow]:
    def draw(row: LabelledRow) -> bytes:
        return hashlib.blake2b(f"{purpose}\0{seed}\0{row.key}".encode(), digest_size=16).digest()

    return sorted(rows, key=draw)
