"""Draw the missing splits and the label budget for rows that each have a set of classes.

Splits are drawn by iterative stratification (Sechidis et al., On the Stratification of Multi-Label Data, ECML PKDD
2011, algorithm 1): the images of the class that has the fewest remaining ones are divided first, each into the split
that lacks this class most. Images with the empty set are treated like those of one more class. As in
`ktray.data.labelled.draw`, draws depend on the seed and on the keys of the rows alone, and units stay together.

The label budget is a prefix of one order of the training images: each next image is one of the class that has the
fewest images so far. So a small budget has every class, about equally often, and is a subset of a larger one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ktray.data.labelled.draw import SPLITS, note_units, shuffled, without_copies
from ktray.data.labelled.hygiene_groups import Pairs, units
from ktray.data.labelled.label_lists import decode
from ktray.data.labelled.rows import LabelledRow, count, three

NONE = ""  # stands for the class of images with the empty set
TRAIN, VAL, TEST = "train", "val", "test"


@dataclass(frozen=True)
class SetDrawing:
    """The drawing for rows whose labels are sets of classes.

    Attributes:
        per_class: whether the budget is a number of images for each class, instead of a number of images in all.
    """

    per_class: bool = False

    def draws(self, rows: Sequence[LabelledRow], budget: int | None) -> bool:
        """Whether anything is drawn."""
        train = sum(row.split == TRAIN for row in rows)
        return not {row.split for row in rows}.issuperset(SPLITS) or (budget is not None and train > budget)

    def fill_splits(
        self,
        rows: Sequence[LabelledRow],
        seed: int,
        val_fraction: float,
        test_fraction: float,
        copies: Pairs,
        notes: list[str],
    ) -> list[LabelledRow]:
        """Move rows of train to the splits that are missing. Of each class, at least one image stays in train, then one
        goes to each missing split, first to val, as far as there are images that allow it."""
        present = {row.split for row in rows}
        shares = {VAL: val_fraction, TEST: test_fraction}
        missing = [name for name in (VAL, TEST) if name not in present]
        if not missing:
            return list(rows)
        train = [row for row in rows if row.split == TRAIN]
        unit = units(train, copies, groups=True)
        content: dict[int, Counter[str]] = defaultdict(Counter)
        for row in shuffled(train, "split", seed):  # units are in the order of their first rows
            content[unit[row.uri]].update(_classes(row))
        chosen = _stratify(content, {name: shares[name] for name in missing})
        names = " and ".join(reversed(missing))
        fractions = " and ".join(f"{shares[name]:g}" for name in reversed(missing))
        notes.append(
            f"There is no {names} split: {fractions} of each class is split off from train by iterative stratification "
            f"(seed {seed})."
        )
        lacking = _lacking(content, chosen, missing)
        if lacking:
            notes.append(f"{count(lacking, 'class', 'classes')} with too few images for every split: {three(lacking)}.")
        note_units(unit, notes)
        others = [row for row in rows if row.split != TRAIN]
        return others + [replace(row, split=chosen[unit[row.uri]]) for row in train]

    def keep_budget(
        self, train: Sequence[LabelledRow], seed: int, budget: int | None, copies: Pairs, notes: list[str]
    ) -> tuple[list[LabelledRow], list[LabelledRow]]:
        """Divide the training rows into those within the budget and the rest.

        Images without copies are taken first, and copies of images within the budget are not in the rest.
        """
        if budget is None:
            return list(train), []
        unit = units(train, copies, groups=False)
        sizes = Counter(unit.values())
        order = _in_balance(sorted(shuffled(train, "budget", seed), key=lambda row: sizes[unit[row.uri]]))
        length = budget if not self.per_class else _enough(order, budget)
        kept, surplus = order[:length], order[length:]
        short = _short(order, budget) if self.per_class else []
        if short:
            notes.append(
                f"{count(short, 'class', 'classes')} with fewer than {budget} training images: {three(short)}."
            )
        if not self.per_class and len(order) < budget:
            notes.append(f"There are fewer than {budget} training images: {len(order)}.")
        return kept, without_copies(surplus, kept, unit, notes)


def _classes(row: LabelledRow) -> list[str]:
    return decode(row.label) or [NONE]


def _stratify(content: Mapping[int, Counter[str]], shares: Mapping[str, float]) -> dict[int, str]:
    """The split of each unit.

    Args:
        content: by unit, in the order of the draw, the number of its images of each class.
        shares: the shares of the splits that are drawn, val before test; the others are for train.
    """
    total: Counter[str] = Counter()
    for counts in content.values():
        total.update(counts)
    wanted = {name: {c: max(1, round(share * n)) for c, n in total.items()} for name, share in shares.items()}
    wanted = {TRAIN: {c: n - sum(wanted[name][c] for name in shares) for c, n in total.items()}, **wanted}
    for c in total:  # with too few images for every split, train has priority, then val, then test
        for name in reversed(wanted):
            if wanted[TRAIN][c] < 1 and name != TRAIN and wanted[name][c]:
                wanted[TRAIN][c] += 1
                wanted[name][c] -= 1
    space = {name: share * len(content) for name, share in shares.items()}
    space[TRAIN] = len(content) - sum(space.values())
    chosen: dict[int, str] = {}
    remaining = Counter(total)
    while remaining:
        rarest = min(remaining, key=lambda c: (remaining[c], c))
        for unit, counts in content.items():
            if unit in chosen or rarest not in counts:
                continue
            # Equal needs are decided by the free space; equal spaces by the order train, val, test.
            best = max(wanted, key=lambda name: (wanted[name][rarest], space[name]))
            chosen[unit] = best
            space[best] -= 1
            for c, n in counts.items():
                wanted[best][c] -= n
                remaining[c] -= n
        remaining = +remaining  # without the classes that are divided
    _return_to_train(content, chosen)
    return chosen


def _return_to_train(content: Mapping[int, Counter[str]], chosen: dict[int, str]) -> None:
    """For each class that no image in train has, return its smallest unit to train."""
    classes = sorted({c for counts in content.values() for c in counts if c != NONE})
    for c in classes:
        own = [unit for unit, counts in content.items() if c in counts]
        if not any(chosen[unit] == TRAIN for unit in own):
            chosen[min(own, key=lambda unit: content[unit].total())] = TRAIN


def _lacking(content: Mapping[int, Counter[str]], chosen: Mapping[int, str], missing: Sequence[str]) -> list[str]:
    """The classes that have no image in a split that was drawn."""
    found = {(chosen[unit], c) for unit, counts in content.items() for c in counts}
    classes = sorted({c for _, c in found} - {NONE})
    return [c for c in classes if any((name, c) not in found for name in missing)]


def _in_balance(rows: Sequence[LabelledRow]) -> list[LabelledRow]:
    """The rows in an order in which each next row has the class that is rarest among those before it; of several such
    classes the one that has the fewest rows in all (the empty set comes last), and of several such rows the first."""
    waiting: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        for c in _classes(row):
            waiting[c].append(i)
    totals = {c: len(numbers) for c, numbers in waiting.items()}
    position, taken = dict.fromkeys(waiting, 0), [False] * len(rows)
    seen: Counter[str] = Counter()
    order: list[LabelledRow] = []
    while waiting:
        c = min(waiting, key=lambda name: (seen[name], name == NONE, totals[name], name))
        numbers = waiting[c]
        while position[c] < len(numbers) and taken[numbers[position[c]]]:
            position[c] += 1
        if position[c] == len(numbers):
            del waiting[c]
            continue
        number = numbers[position[c]]
        taken[number] = True
        seen.update(_classes(rows[number]))
        order.append(rows[number])
    return order


def _enough(order: Sequence[LabelledRow], each: int) -> int:
    """The length of the shortest prefix in which every class has ``each`` rows, or all of its rows."""
    totals = Counter(c for row in order for c in _classes(row))
    open_classes = {c: min(each, n) for c, n in totals.items()}
    for length, row in enumerate(order):
        if not open_classes:
            return length
        for c in _classes(row):
            if c in open_classes:
                open_classes[c] -= 1
                if not open_classes[c]:
                    del open_classes[c]
    return len(order)


def _short(order: Sequence[LabelledRow], each: int) -> list[str]:
    totals = Counter(c for row in order for c in decode(row.label))
    return sorted(c for c, n in totals.items() if n < each)
