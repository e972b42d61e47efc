"""Drawn splits and budgets of sets of classes are balanced, determined by the seed, and keep together what belongs
together."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from ktray.data.labelled.draw_sets import SetDrawing
from ktray.data.labelled.forms import LabelledRow
from ktray.data.labelled.label_lists import decode, encode

SHARES = (0.5, 0.2, 0.1, 0.03)


def rows(count: int, seed: int = 0, group: dict[int, str] | None = None) -> list[LabelledRow]:
    rng = np.random.default_rng(seed)
    member = rng.random((count, len(SHARES))) < SHARES
    member[:, 3] &= member[:, 0]  # the rarest class occurs together with the most frequent one only
    return [
        LabelledRow(
            f"/data/{i}",
            str(i),
            encode(f"c{c}" for c in np.flatnonzero(member[i])),
            "train",
            group=(group or {}).get(i, ""),
        )
        for i in range(count)
    ]


def counts(drawn: list[LabelledRow], split: str) -> Counter[str]:
    return Counter(c for r in drawn if r.split == split for c in decode(r.label) or [""])


@pytest.mark.parametrize("seed", range(4))
def test_every_class_has_its_share_in_each_split(seed: int) -> None:
    given = rows(600, seed)
    drawn = SetDrawing().fill_splits(given, seed, 0.2, 0.2, [], [])
    assert {r.uri for r in drawn} == {r.uri for r in given}
    total = Counter(c for r in given for c in decode(r.label) or [""])
    for split in ("val", "test"):
        found = counts(drawn, split)
        for c, n in total.items():
            assert abs(found[c] - 0.2 * n) <= max(2, 0.03 * n), (split, c)
    # A draw without the classes leaves the rarest one farther from its share, now and then.
    shuffled = list(reversed(given))
    assert sorted(SetDrawing().fill_splits(shuffled, seed, 0.2, 0.2, [], []), key=lambda r: r.uri) == sorted(
        drawn, key=lambda r: r.uri
    )


@pytest.mark.parametrize(("images", "expected"), [(1, "train"), (2, "train val"), (3, "train val test")])
def test_few_images_go_to_train_then_val_then_test(images: int, expected: str) -> None:
    common = [LabelledRow(f"/c/{i}", f"c{i}", encode(["common"]), "train") for i in range(30)]
    rare = [LabelledRow(f"/r/{i}", f"r{i}", encode(["rare"]), "train") for i in range(images)]
    notes: list[str] = []
    drawn = SetDrawing().fill_splits([*common, *rare], 5, 0.2, 0.2, [], notes)
    assert {r.split for r in drawn if r.uri.startswith("/r/")} == set(expected.split())
    assert any("too few images" in note and "'rare'" in note for note in notes) == (images < 3)


@pytest.mark.parametrize("seed", range(10))
def test_no_class_is_without_a_training_image(seed: int) -> None:
    """Classes that only occur together compete for the same images."""
    rng = np.random.default_rng(seed)
    labels = [encode(f"c{c}" for c in rng.choice(8, 3, replace=False)) for _ in range(12)]
    given = [LabelledRow(f"/{i}", str(i), label, "train") for i, label in enumerate(labels)]
    drawn = SetDrawing().fill_splits(given, seed, 0.4, 0.4, [], [])
    assert counts(drawn, "train").keys() >= {c for label in labels for c in decode(label)}


def test_groups_and_copies_stay_in_one_split() -> None:
    group = {i: f"g{i // 4}" for i in range(80)}
    copies = [("/data/100", "/data/101"), ("/data/101", "/data/102")]
    notes: list[str] = []
    drawn = {r.uri: r for r in SetDrawing().fill_splits(rows(200, group=group), 1, 0.2, 0.2, copies, notes)}
    for g in set(group.values()):
        assert len({r.split for r in drawn.values() if r.group == g}) == 1
    assert len({drawn[f"/data/{i}"].split for i in (100, 101, 102)}) == 1
    assert any("stays in one split" in note for note in notes)


def test_given_splits_are_kept() -> None:
    given = [LabelledRow(f"/{i}", str(i), encode(["a"]), ("train", "val", "test")[i % 3]) for i in range(9)]
    drawing = SetDrawing()
    assert drawing.fill_splits(given, 0, 0.2, 0.2, [], []) == given
    assert not drawing.draws(given, None)
    assert not drawing.draws(given, 3)
    assert drawing.draws(given, 2)
    assert drawing.draws([r for r in given if r.split != "test"], None)


def test_budgets_are_nested_and_balanced() -> None:
    given = rows(400)
    kept = {n: SetDrawing().keep_budget(given, 3, n, [], [])[0] for n in (5, 20, 60, 200, 1000)}
    for small, large in itertools.pairwise(kept.values()):
        assert small == large[: len(small)]
    assert [len(chosen) for chosen in kept.values()] == [5, 20, 60, 200, 400]
    found = counts(kept[20], "train")
    assert set(found) == {"c0", "c1", "c2", "c3", ""}  # the rarest class has 3% of the images, at most
    assert all(found[c] >= 4 for c in ("c0", "c1", "c2", ""))
    _, rest = SetDrawing().keep_budget(given, 3, 20, [], [])
    assert len(rest) == 380


def test_a_budget_per_class_is_the_shortest_prefix_that_has_it() -> None:
    given, notes = rows(400), list[str]()
    order = SetDrawing().keep_budget(given, 3, 400, [], [])[0]
    kept, _ = SetDrawing(per_class=True).keep_budget(given, 3, 10, [], notes)
    assert kept == order[: len(kept)]
    total = Counter(c for r in given for c in decode(r.label) or [""])
    enough = {c: min(10, n) for c, n in total.items()}
    assert all(counts(kept, "train")[c] >= n for c, n in enough.items())
    assert any(counts(kept[:-1], "train")[c] < n for c, n in enough.items())
    assert ("c3" in " ".join(notes)) == (total["c3"] < 10)


def test_copies_come_last_and_never_without_labels() -> None:
    given = [LabelledRow(f"/{i}", str(i), encode(["a"]), "train") for i in range(10)]
    notes: list[str] = []
    kept, rest = SetDrawing().keep_budget(given, 0, 9, [("/3", "/7")], notes)
    assert {"/3", "/7"} & {r.uri for r in kept}
    assert {"/3", "/7"}.isdisjoint(r.uri for r in rest)
    assert any("copies of images within the budget" in note for note in notes)
