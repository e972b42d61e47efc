"""A task's labelled images: train, val and test, and how they are divided.

Everything that is drawn (splits, the label budget) is drawn by a hash of the seed and the image's path inside
the data, so it is the same on every machine and whatever the order of a directory.
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
        label: index into `LabelledSet.classes`; 0 where a mask holds the classes; the number itself where the task
            predicts a number.
        mask: uri of the image's label map, or empty. One channel of 8 bits, the image's size; class = value -
            `LabelledSet.mask_offset`; 255, and every value that is then no class's number, is ignored.
    """

    uri: str
    label: Any
    mask: str = ""


@dataclass(frozen=True)
class LabelledSet:
    """A task's labelled images.

    Attributes:
        classes: names in the order of the model's outputs. Class names that are numbers are in the order of their
            values, others in that of their code points; the classes of masks in the order of the masks' values.
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
    """Rows to train, val, test and the unlabelled rest.

    Args:
        rows: as they were found; repeated ones are counted once.
        classes: gives the names of the classes from the rows with their splits.
        label: gives what `LabelledExample.label` holds, from a row and the classes' numbers; it orders the examples.
        seed: draws the splits that are missing and the label budget.
        val_fraction, test_fraction: shares that are split off where there is no val or test. Of the rows of each label
            at least one stays in train; with two, one goes to val; from three on, at least one to each.
        budget: training images kept of each label; a smaller budget is a subset of a larger one with the same seed.
            None keeps all.
        notes: what was decided and why; it is extended and kept.
        names: gives the classes as text for people from their names.
        mask_offset: see `LabelledSet`.
        facts: what the fingerprint covers beside the rows; None: nothing.

    Raises:
        KtrayError: one image in two splits or with two labels.
    """
    rows = _fill_splits(_without_repeats(rows, notes), seed, val_fraction, test_fraction, notes)
    known = classes(rows)
    kept, surplus = _budget([r for r in rows if r.split == "train"], seed, budget, notes)
    number = {name: i for i, name in enumerate(known)}

    def part(chosen: Iterable[LabelledRow]) -> list[LabelledExample]:
        order = sorted(((label(r, number), r.key, r) for r in chosen), key=lambda one: one[:2])
        return [LabelledExample(r.uri, value, r.mask) for value, _, r in order]

    val, test = ([r for r in rows if r.split == name] for name in ("val", "test"))
    if not val:
        notes.append("There is no validation image: each class has a single one, which trains.")
    if not test:
        notes.append("There is no test image, so no test metric.")
    pool = sorted([*surplus, *(r for r in rows if r.split == "pool")], key=lambda r: r.key)
    digest = hashlib.blake2b(digest_size=16)
    for row in [*sorted(rows, key=lambda r: (r.key, r.split)), *sorted(kept, key=lambda r: r.key)]:
        digest.update(repr(row).encode())
    if facts is not None:
        digest.update(repr(facts).encode())
    return LabelledSet(
        known,
        part(kept),
        part(val),
        part(test),
        [r.uri for r in pool],
        notes,
        digest.hexdigest(),
        names(known),
        mask_offset,
    )


def check_train_list(train_list: str | None, splits: str | None) -> None:
    """Raises KtrayError: a train list is named, and no folder to find it in."""
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
