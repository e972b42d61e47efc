"""Draw the splits that the data does not have, and the label budget.

Every draw is determined by a hash of the seed and the key of the row. Therefore it is the same on every machine and for
every order of directory entries.

Rows that belong together are one unit, which stays in one split: an image and its copies, or the images of one group
(``task.group``). scikit-learn's StratifiedGroupKFold draws shares of 1/k only, and its draw depends on the order.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from ktray.data.labelled.hygiene_groups import Pairs, units
from ktray.data.labelled.rows import LabelledRow, count, three

SPLITS = ("test", "val")


class Drawing(Protocol):
    """How splits and the label budget are drawn. This module is the drawing for rows with one class each; the functions
    below describe the methods."""

    def draws(self, rows: Sequence[LabelledRow], budget: int | None) -> bool: ...

    def fill_splits(
        self,
        rows: Sequence[LabelledRow],
        seed: int,
        val_fraction: float,
        test_fraction: float,
        copies: Pairs,
        notes: list[str],
    ) -> list[LabelledRow]: ...

    def keep_budget(
        self, train: Sequence[LabelledRow], seed: int, budget: int | None, copies: Pairs, notes: list[str]
    ) -> tuple[list[LabelledRow], list[LabelledRow]]: ...


def draws(rows: Sequence[LabelledRow], budget: int | None) -> bool:
    """Whether anything is drawn: a split is missing, or a class has more training images than the label budget."""
    splits = {r.split for r in rows}
    most = max(Counter(r.label for r in rows if r.split == "train").values(), default=0)
    return not splits.issuperset(SPLITS) or (budget is not None and most > budget)


def fill_splits(
    rows: Sequence[LabelledRow],
    seed: int,
    val_fraction: float,
    test_fraction: float,
    copies: Pairs,
    notes: list[str],
) -> list[LabelledRow]:
    """Move rows of train to the splits that are missing, by class; see `ktray.data.labelled.labelled_set.divide`.

    A unit is drawn with the class of its first row. A unit that would make a split larger than its share of any class
    is passed over, except if the split would have no image of the class.

    Args:
        copies: pairs of uris of images that show the same.
    """
    present = {r.split for r in rows}
    shares = {"val": val_fraction, "test": test_fraction}
    missing = [name for name in SPLITS if name not in present]
    if not missing:
        return list(rows)
    train = [r for r in rows if r.split == "train"]
    unit = units(train, copies, groups=True)
    classes = _by_class(train)
    content: dict[int, Counter[str]] = defaultdict(Counter)
    owner: dict[int, str] = {}
    for row in shuffled(train, "split", seed):
        content[unit[row.uri]][row.label] += 1
        owner.setdefault(unit[row.uri], row.label)
    target = {name: {label: max(1, round(shares[name] * len(group))) for label, group in classes} for name in missing}
    filled: dict[str, Counter[str]] = {name: Counter() for name in missing}
    chosen: dict[int, str] = {}
    small_classes = 0
    for label, group in classes:
        order = shuffled(group, "split", seed)
        remaining = [u for u in dict.fromkeys(unit[r.uri] for r in order) if owner[u] == label]
        small_classes += len(remaining) <= len(missing)
        for name in missing:
            later = len(missing) - missing.index(name)  # each remaining split, and train, should get at least one unit
            # With too few images, val has priority over test: without validation no model can be chosen.
            taken = _take(remaining, content, label, target[name], filled[name], len(remaining) - later)
            chosen.update(dict.fromkeys(taken, name))
            remaining = [u for u in remaining if u not in chosen]
    for u in _needed_in_train(classes, unit, chosen):
        del chosen[u]
    names = " and ".join(reversed(missing))
    fractions = " and ".join(f"{shares[name]:g}" for name in reversed(missing))
    share_of = "of each class" if rows and rows[0].label else "of the images"
    notes.append(f"There is no {names} split: {fractions} {share_of} is split off from train (seed {seed}).")
    if small_classes:
        notes.append(
            f"Number of classes with too few images for every split: {small_classes}. "
            "Train has priority, then val, then test."
        )
    note_units(unit, notes)
    others = [r for r in rows if r.split != "train"]
    return others + [replace(r, split=chosen.get(unit[r.uri], "train")) for r in train]


def note_units(unit: Mapping[str, int], notes: list[str]) -> None:
    """Add a note about the units that have several images, if there are any."""
    together = [n for n in Counter(unit.values()).values() if n > 1]
    if together:
        notes.append(
            f"{sum(together)} images are copies of another one or share their group with another one. Such images are "
            f"kept together: each of the {count(together, 'set')} stays in one split."
        )


def _take(
    units: Sequence[int],
    content: Mapping[int, Counter[str]],
    label: str,
    target: Mapping[str, int],
    filled: Counter[str],
    most: int,
) -> list[int]:
    """At most ``most`` units, in their order, that fill a split up to its targets; one more if it has no image of the
    class ``label`` otherwise.

    Args:
        content: by unit, the number of its rows of each class.
        target: by class, the number of rows that the split should have.
        filled: by class, the number of rows that it has; the rows of the units are added.
    """
    taken: list[int] = []
    for unit in units:
        fits = all(filled[name] + number <= target[name] for name, number in content[unit].items())
        if fits and len(taken) < most:
            taken.append(unit)
            filled.update(content[unit])
    if not filled[label] and most > 0:
        taken = [min(units, key=lambda unit: content[unit].total())]
        filled.update(content[taken[0]])
    return taken


def _needed_in_train(
    classes: Sequence[tuple[str, list[LabelledRow]]], unit: dict[str, int], chosen: dict[int, str]
) -> list[int]:
    """Units to return to train, one for each class of which no row would stay there: the smallest one of the class."""
    sizes = Counter(unit.values())
    back: list[int] = []
    for _, group in classes:
        own = sorted({unit[r.uri] for r in group})
        if all(u in chosen and u not in back for u in own):
            back.append(min(own, key=lambda u: sizes[u]))
    return back


def keep_budget(
    train: Sequence[LabelledRow],
    seed: int,
    budget: int | None,
    copies: Pairs,
    notes: list[str],
) -> tuple[list[LabelledRow], list[LabelledRow]]:
    """Divide the training rows into those within the label budget and the rest, which are used without their labels.

    Images without copies are taken first, because a copy is a label that teaches nothing new. Copies of images within
    the budget are not in the rest. Images of one group (``task.group``) may be in both, because both are for training.

    Args:
        budget: number of training images of each class; None: all.
        copies: pairs of uris of images that show the same.
    """
    if budget is None:
        return list(train), []
    unit = units(train, copies, groups=False)
    sizes = Counter(unit.values())
    kept: list[LabelledRow] = []
    surplus: list[LabelledRow] = []
    short = []
    for name, group in _by_class(train):
        order = shuffled(group, "budget", seed)
        first = {u: i for i, u in reversed(list(enumerate(unit[r.uri] for r in order)))}
        order.sort(key=lambda r: (sizes[unit[r.uri]], first[unit[r.uri]]))
        kept += order[:budget]
        surplus += order[budget:]
        if len(group) < budget:
            short.append(name)
    if short:
        notes.append(
            f"{count(short, 'class', 'classes')} with fewer than {budget} training images: {three(short)}."
            if short != [""]
            else f"There are fewer than {budget} training images: {len(kept)}."
        )
    return kept, without_copies(surplus, kept, unit, notes)


def without_copies(
    surplus: Sequence[LabelledRow], kept: Sequence[LabelledRow], unit: Mapping[str, int], notes: list[str]
) -> list[LabelledRow]:
    """The rows beyond a label budget that are no copies of rows within it (``kept``)."""
    labelled = {unit[r.uri] for r in kept}
    rest = [r for r in surplus if unit[r.uri] not in labelled]
    if len(rest) < len(surplus):
        notes.append(
            f"{len(surplus) - len(rest)} training images beyond the label budget are left out: they are copies of "
            "images within the budget."
        )
    return rest


def _by_class(rows: Iterable[LabelledRow]) -> list[tuple[str, list[LabelledRow]]]:
    groups: dict[str, list[LabelledRow]] = defaultdict(list)
    for row in rows:
        groups[row.label].append(row)
    return sorted(groups.items())


def shuffled(rows: Iterable[LabelledRow], purpose: str, seed: int) -> list[LabelledRow]:
    """The rows in an order that the purpose, the seed and the keys of the rows determine."""

    def draw(row: LabelledRow) -> bytes:
        return hashlib.blake2b(f"{purpose}\0{seed}\0{row.key}".encode(), digest_size=16).digest()

    return sorted(rows, key=draw)
