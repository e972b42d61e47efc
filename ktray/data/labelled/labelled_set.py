"""A task's labelled images: the splits train, val and test, and how images are divided into them.

Every random draw (of splits and of the label budget) is determined by a hash of the seed and the image's path inside
the data. Therefore it is the same on every machine and for every order of directory entries.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ktray.data.labelled.forms import LabelledRow, count, three
from ktray.errors import KtrayError


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A labelled image.

    Attributes:
        uri: where the image is (see `ktray.data.sources.uris`).
        label: index into `LabelledSet.classes`; 0 if a mask contains the classes; the number itself if the task
            predicts a number.
        mask: uri of the image's label map, or empty. It has one channel of 8 bits and the size of the image; class =
            value - `LabelledSet.mask_offset`. 255 and every value that is not the number of a class are ignored.
    """

    uri: str
    label: Any
    mask: str = ""


@dataclass(frozen=True)
class LabelledSet:
    """A task's labelled images.

    Attributes:
        classes: names in the order of the model's outputs. Class names that are numbers are sorted by value, others by
            their code points; the classes of masks are in the order of the masks' values.
        train, val, test: disjoint lists; train contains only the images within the label budget.
        unlabeled: uris of the training images beyond the label budget, without their labels.
        notes: decisions with their reasons, one sentence each.
        fingerprint: hash of names, labels, splits and, for folders, sizes and modification times.
        names: readable class names for people and text towers; empty if nothing better than ``classes`` is known.
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


def divide(
    rows: Sequence[LabelledRow],
    *,
    classes: Callable[[Sequence[LabelledRow]], list[str]],
    label: Callable[[LabelledRow, dict[str, int]], Any],
    seed: int,
    val_fraction: float,
    test_fraction: float,
    budget: int | None,
    notes: list[str],
    names: Callable[[list[str]], list[str]] = lambda classes: [],
    mask_offset: int = 0,
    facts: Any = None,
) -> LabelledSet:
    """Divide rows into train, val, test and the unlabelled rest.

    Args:
        rows: all rows; repeated rows are counted once.
        classes: takes the rows with their splits and returns the class names.
        label: takes a row and the numbers of the classes and returns the value of `LabelledExample.label`. Examples are
            sorted by this value.
        seed: seed of the draws of missing splits and of the label budget.
        val_fraction, test_fraction: shares of train that are moved to val and test if these splits are missing. For
            each label at least one row stays in train; with two rows, one is moved to val; with three or more, at
            least one is moved to each missing split.
        budget: number of training images to keep for each label; a smaller budget is a subset of a larger budget with
            the same seed. None keeps all.
        notes: list to which decisions with their reasons are appended; the result contains it.
        names: takes the class names and returns readable names.
        mask_offset: see `LabelledSet`.
        facts: additional content of the fingerprint; None: none.

    Raises:
        KtrayError: one image in two splits or with two labels.
    """
    rows = _fill_splits(_without_repeats(rows, notes), seed, val_fraction, test_fraction, notes)
    class_names = classes(rows)
    kept, surplus = _budget([r for r in rows if r.split == "train"], seed, budget, notes)
    number = {name: i for i, name in enumerate(class_names)}

    def part(chosen: Iterable[LabelledRow]) -> list[LabelledExample]:
        order = sorted(((label(r, number), r.key, r) for r in chosen), key=lambda entry: entry[:2])
        return [LabelledExample(r.uri, value, r.mask) for value, _, r in order]

    val, test = ([r for r in rows if r.split == name] for name in ("val", "test"))
    if not val:
        notes.append("There is no validation image: each class has only one image, which stays in train.")
    if not test:
        notes.append("There is no test image and therefore no test metric.")
    pool = sorted([*surplus, *(r for r in rows if r.split == "pool")], key=lambda r: r.key)
    digest = hashlib.blake2b(digest_size=16)
    for row in [*sorted(rows, key=lambda r: (r.key, r.split)), *sorted(kept, key=lambda r: r.key)]:
        digest.update(repr(row).encode())
    if facts is not None:
        digest.update(repr(facts).encode())
    return LabelledSet(
        class_names,
        part(kept),
        part(val),
        part(test),
        [r.uri for r in pool],
        notes,
        digest.hexdigest(),
        names(class_names),
        mask_offset,
    )


def check_train_list(train_list: str | None, splits: str | None) -> None:
    """Raises KtrayError if task.train_list is set without task.splits."""
    if train_list and not splits:
        raise KtrayError(
            f"task.train_list={train_list} is a list in the folder task.splits, which is not set",
            "Set task.splits as well.",
        )


def _without_repeats(rows: Sequence[LabelledRow], notes: list[str]) -> list[LabelledRow]:
    """Remove repeated rows of an image. Raises KtrayError for an image in two splits or with two labels."""
    first_rows: dict[str, LabelledRow] = {}
    in_two_splits: list[str] = []
    splits: set[str] = set()
    two_labels: list[str] = []
    repeats = 0
    for row in rows:
        first = first_rows.setdefault(row.uri, row)
        if first is row:
            continue
        repeats += 1
        if first.split != row.split:
            in_two_splits.append(row.uri)
            splits |= {first.split, row.split}
        elif first.label != row.label:
            two_labels.append(row.uri)
    if in_two_splits:
        split_names = ", ".join("larger train lists" if name == "pool" else name for name in sorted(splits))
        raise KtrayError(
            f"{count(in_two_splits, 'image')} {'is' if len(in_two_splits) == 1 else 'are'} in two splits: "
            f"{three(in_two_splits)} ({split_names})",
            "Keep each image in only one of train, val and test. A test on training images has no meaning.",
        )
    if two_labels:
        raise KtrayError(
            f"{count(two_labels, 'image')} {'has' if len(two_labels) == 1 else 'have'} two labels: {three(two_labels)}",
            "Keep one label for each image.",
        )
    if repeats:
        notes.append(f"{repeats} lines of the list are repeats and are ignored.")
    return list(first_rows.values())


def _fill_splits(
    rows: Sequence[LabelledRow], seed: int, val_fraction: float, test_fraction: float, notes: list[str]
) -> list[LabelledRow]:
    present = {r.split for r in rows}
    shares = {"val": val_fraction, "test": test_fraction}
    missing = [name for name in ("test", "val") if name not in present]
    if not missing:
        return list(rows)
    divided = [r for r in rows if r.split != "train"]
    small_classes = 0
    for _, group in _by_class(r for r in rows if r.split == "train"):
        remaining = _shuffled(group, "split", seed)
        small_classes += len(remaining) <= len(missing)
        for name in missing:
            later = len(missing) - missing.index(name)  # each remaining split, and train, should get at least one image
            target = max(1, round(shares[name] * len(group)))
            # With too few images, val has priority over test: without validation no model can be chosen.
            number = min(target, len(remaining) - later) if len(remaining) > later else 0
            divided += [replace(r, split=name) for r in remaining[:number]]
            remaining = remaining[number:]
        divided += remaining
    names = " and ".join(reversed(missing))
    fractions = " and ".join(f"{shares[name]:g}" for name in reversed(missing))
    share_of = "of each class" if rows and rows[0].label else "of the images"
    notes.append(f"There is no {names} split: {fractions} {share_of} is split off from train (seed {seed}).")
    if small_classes:
        notes.append(
            f"Number of classes with too few images for every split: {small_classes}. "
            "Train has priority, then val, then test."
        )
    return divided


def _budget(
    train: Sequence[LabelledRow], seed: int, labels_per_class: int | None, notes: list[str]
) -> tuple[list[LabelledRow], list[LabelledRow]]:
    """Divide the training rows into those within the label budget and the rest."""
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
