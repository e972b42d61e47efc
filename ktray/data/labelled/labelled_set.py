"""A task's labelled images: the splits train, val and test, and how images are divided into them.

Every random draw (of splits and of the label budget) is determined by a hash of the seed and the image's path inside
the data. Therefore it is the same on every machine and for every order of directory entries.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ktray.data.labelled import draw
from ktray.data.labelled.contents import content_versions
from ktray.data.labelled.draw import Drawing
from ktray.data.labelled.hygiene_copies import find_copies
from ktray.data.labelled.hygiene_groups import in_words, torn_groups
from ktray.data.labelled.names import Names
from ktray.data.labelled.rows import LabelledRow, count, three
from ktray.errors import KtrayError


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A labelled image.

    Attributes:
        uri: where the image is (see `ktray.data.sources.uris`).
        label: index into `LabelledSet.classes`; a tuple of such indices, in order, if an image has a set of classes; 0
            if a mask contains the classes; the number itself if the task predicts a number.
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
        fingerprint: hash of names, labels, splits and of the contents of local files (of much data and of remote files:
            sizes and modification times).
        names: readable class names for people and text towers; empty if nothing better than ``classes`` is known.
        mask_offset: see `LabelledExample.mask`.
        torn: groups of images (``task.group``) that are in more than one split of the data, with these splits.
    """

    classes: list[str]
    train: list[LabelledExample]
    val: list[LabelledExample]
    test: list[LabelledExample]
    unlabeled: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    names: list[str] = field(default_factory=list)
    mask_offset: int = 0
    torn: dict[str, list[str]] = field(default_factory=dict)


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
    drawing: Drawing = draw,
) -> LabelledSet:
    """Divide rows into train, val, test and the unlabelled rest.

    What is drawn here keeps images together that show the same (`copies.find_copies`), and the splits also keep groups
    (`LabelledRow.group`) together. Splits that the rows already have are not changed.

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
        drawing: how splits and the label budget are drawn; by default, by the one class of each row.

    Raises:
        KtrayError: one image in two splits or with two labels.
    """
    rows = _without_repeats(rows, notes)
    copies = find_copies(rows, notes) if drawing.draws(rows, budget) else []
    rows = drawing.fill_splits(rows, seed, val_fraction, test_fraction, copies, notes)
    torn = torn_groups((r.group, r.split) for r in rows)
    if torn:
        notes.append(f"WARNING: {in_words(torn)}")
    class_names = classes(rows)
    kept, surplus = drawing.keep_budget([r for r in rows if r.split == "train"], seed, budget, copies, notes)
    number = {name: i for i, name in enumerate(class_names)}

    def part(chosen: Iterable[LabelledRow]) -> list[LabelledExample]:
        order = sorted(((label(r, number), r.key, r) for r in chosen), key=lambda entry: entry[:2])
        return [LabelledExample(r.uri, value, r.mask) for value, _, r in order]

    val, test = ([r for r in rows if r.split == name] for name in ("val", "test"))
    if not val:
        raise KtrayError(
            "There is no validation image: each class has only one image, which has to train",
            "Add a second image to at least one class, or a val split: without validation no model can be chosen.",
        )
    if not test:
        notes.append("There is no test image and therefore no test metric.")
    pool = sorted([*surplus, *(r for r in rows if r.split == "pool")], key=lambda r: r.key)
    digest = hashlib.blake2b(digest_size=16)
    contents = content_versions(rows)
    for row in [*sorted(rows, key=lambda r: (r.key, r.split)), *sorted(kept, key=lambda r: r.key)]:
        known = [contents.get(uri) for uri in (row.uri, row.mask) if uri]
        version = row.version if None in known else ":".join(map(str, known))
        # Without `replace` where it changes nothing: half of the time, for a list of a million images.
        digest.update(repr(row if version == row.version else replace(row, version=version)).encode())
    if facts is not None:
        digest.update(repr(facts).encode())
    if grouped := sorted((r.key, r.group) for r in rows if r.group):
        digest.update(repr(grouped).encode())
    found = LabelledSet(
        class_names,
        part(kept),
        part(val),
        part(test),
        Names(r.uri for r in pool),
        notes,
        digest.hexdigest(),
        names(class_names),
        mask_offset,
        torn,
    )
    # A copy: its strings lie together. Strings of the rows, one here and one there, would keep the memory of all rows.
    copied: LabelledSet = pickle.loads(pickle.dumps(replace(found, notes=[])))
    return replace(copied, notes=notes)


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
