"""Drawn splits keep what belongs together; without copies and groups they are those of independent rows."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ktray.data.labelled.draw import draws, fill_splits, keep_budget
from ktray.data.labelled.hygiene_groups import torn_groups, units
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.labelled.list_columns import ListColumns
from ktray.data.labelled.read import read_labelled
from ktray.data.labelled.rows import LabelledRow
from ktray.errors import KtrayError
from ktray.recipe.schema import TaskConfig
from ktray.tasks.base import task_kind


def row(i: int, label: str, group: str = "", split: str = "train") -> LabelledRow:
    return LabelledRow(f"/data/{i}", str(i), label, split, group=group)


def rows(count: int, classes: int = 3, group: dict[int, str] | None = None) -> list[LabelledRow]:
    return [row(i, f"c{i % classes}", (group or {}).get(i, "")) for i in range(count)]


def shuffled_groups(seed: int, count: int) -> dict[int, str]:
    """Groups of 1 to 5 images of any classes."""
    rng = np.random.default_rng(seed)
    names, at = {}, 0
    order = rng.permutation(count)
    while at < count:
        size = int(rng.integers(1, 6))
        names.update({int(i): f"g{at}" for i in order[at : at + size]})
        at += size
    return names


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_torn_and_the_shares_stay_close(seed: int) -> None:
    groups = shuffled_groups(seed, 300)
    divided = fill_splits(rows(300, group=groups), seed, 0.2, 0.2, [], [])
    splits = defaultdict(set)
    for r in divided:
        splits[r.group].add(r.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {r.uri for r in divided} == {r.uri for r in rows(300)}
    number = Counter(r.split for r in divided)
    assert 0.12 <= number["val"] / 300 <= 0.28
    assert 0.12 <= number["test"] / 300 <= 0.28
    for label in ("c0", "c1", "c2"):
        assert {r.split for r in divided if r.label == label} == {"train", "val", "test"}


def test_copies_stay_together_also_in_a_chain_and_with_a_group() -> None:
    chain = [("/data/0", "/data/4"), ("/data/4", "/data/9"), ("/data/9", "/nowhere")]
    for seed in range(8):
        divided = {r.uri: r.split for r in fill_splits(rows(30, group={9: "g", 14: "g"}), seed, 0.3, 0.3, chain, [])}
        assert len({divided[f"/data/{i}"] for i in (0, 4, 9, 14)}) == 1


def test_without_copies_and_groups_the_draw_is_that_of_single_rows() -> None:
    """The first images in the order of the hash, as documented: the shares are exact."""
    import hashlib

    divided = fill_splits(rows(60), 7, 0.2, 0.1, [], [])
    for label in ("c0", "c1", "c2"):
        keys = [str(i) for i in range(60) if f"c{i % 3}" == label]
        order = sorted(keys, key=lambda k: hashlib.blake2b(f"split\0{7}\0{k}".encode(), digest_size=16).digest())
        named = {r.key: r.split for r in divided if r.label == label}
        assert [named[k] for k in order] == ["test"] * 2 + ["val"] * 4 + ["train"] * 14


def test_a_class_always_keeps_an_image_in_train() -> None:
    """All images of class b are copies of images of class a, which may not take them all away."""
    given = [row(i, "a") for i in range(20)] + [row(100, "b"), row(101, "b"), row(102, "b")]
    copies = [("/data/0", "/data/100"), ("/data/1", "/data/101"), ("/data/2", "/data/102")]
    for seed in range(30):
        divided = fill_splits(given, seed, 0.4, 0.4, copies, [])
        assert {r.label for r in divided if r.split == "train"} == {"a", "b"}
        split = {r.uri: r.split for r in divided}
        assert all(split[a] == split[b] for a, b in copies)


def test_one_group_alone_stays_in_train() -> None:
    divided = fill_splits(rows(9, classes=1, group=dict.fromkeys(range(9), "all")), 0, 0.2, 0.2, [], [])
    assert {r.split for r in divided} == {"train"}


def test_the_budget_takes_images_without_copies_first_and_leaves_copies_of_its_images_out() -> None:
    given = rows(40, classes=2)
    copies = [(f"/data/{i}", f"/data/{i + 2}") for i in range(0, 12, 4)]  # even numbers: class c0
    notes: list[str] = []
    kept, rest = keep_budget(given, 0, 16, copies, notes)
    labelled, unlabelled = {r.uri for r in kept}, {r.uri for r in rest}
    assert Counter(r.label for r in kept) == {"c0": 16, "c1": 16}
    single = {f"/data/{i}" for i in range(14, 40, 2)} | {"/data/12"}
    assert single <= labelled
    for a, b in copies:
        assert not ({a, b} & labelled and {a, b} & unlabelled)
    assert len(labelled) + len(unlabelled) == 40 - sum(len({a, b} - labelled) for a, b in copies if {a, b} & labelled)
    assert any("left out" in note for note in notes) == (len(labelled) + len(unlabelled) < 40)


def test_a_smaller_budget_is_part_of_a_larger_one() -> None:
    copies = [("/data/0", "/data/3"), ("/data/3", "/data/6"), ("/data/9", "/data/12")]
    chosen = [{r.uri for r in keep_budget(rows(60), 0, n, copies, [])[0]} for n in (1, 2, 5, 17, 19, 20)]
    assert all(a < b for a, b in itertools.pairwise(chosen))
    assert [len(c) for c in chosen] == [3, 6, 15, 51, 57, 60]


def test_images_are_compared_only_if_something_is_drawn() -> None:
    split = [row(i, "a", split=s) for i, s in enumerate(("train", "train", "val", "test"))]
    assert not draws(split, None)
    assert not draws(split, 2)
    assert draws(split, 1)
    assert draws(split[:3], None)


def test_units_without_connections_are_the_rows() -> None:
    assert len(set(units(rows(5), [], groups=True).values())) == 5
    grouped = rows(5, group={0: "x", 3: "x"})
    assert len(set(units(grouped, [], groups=True).values())) == 4
    assert len(set(units(grouped, [], groups=False).values())) == 5


def test_a_group_in_the_pool_is_a_group_in_train() -> None:
    found = torn_groups([("a", "train"), ("a", "pool"), ("b", "pool"), ("b", "test"), ("", "val"), ("", "test")])
    assert found == {"b": ["test", "train"]}


def picture(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    coarse.resize((48, 40), Image.Resampling.BICUBIC).save(path)


def write_list(folder: Path, form: str, column: str | None, split: bool = False) -> Path:
    """40 images of two classes; those of one group have consecutive numbers. Image 39 is image 0, mirrored."""
    for i in range(39):
        picture(folder / f"{i}.png", i)
    Image.open(folder / "0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "39.png")
    table = {"path": [f"{i}.png" for i in range(40)], "label": ["cat" if i % 2 else "dog" for i in range(40)]}
    if column:
        table[column] = [f"patient {i // 4}" if i < 36 else "" for i in range(40)]
    if split:
        held = {1: "test", 10: "test", 11: "test", **dict.fromkeys(range(20, 24), "val")}
        table["split"] = [held.get(i, "train") for i in range(40)]
    path = folder / f"list.{form}"
    if form == "csv":
        lines = [",".join(table), *(",".join(values) for values in zip(*table.values(), strict=True))]
        path.write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.table(table), path)
    return path


def splits_of(task: LabelledSet) -> dict[int, str]:
    named = {"train": task.train, "val": task.val, "test": task.test}
    return {int(Path(e.uri).stem): name for name, examples in named.items() for e in examples}


@pytest.mark.parametrize(("form", "column", "key"), [("csv", "group", None), ("parquet", "Who", "who")])
def test_the_group_column_of_a_list_is_kept_together(tmp_path, form: str, column: str, key: str | None) -> None:
    path = write_list(tmp_path, form, column)
    for seed in range(3):
        split = splits_of(read_labelled(str(path), seed=seed, columns=ListColumns(group=key)))
        assert set(split.values()) == {"train", "val", "test"}
        for patient in range(9):
            assert len({split[i] for i in range(4 * patient, 4 * patient + 4)}) == 1
        assert split[39] == split[0]  # the copy


def test_another_column_is_no_group(tmp_path) -> None:
    path = write_list(tmp_path, "csv", "who")
    torn = [splits_of(read_labelled(str(path), seed=seed)) for seed in range(3)]
    assert any(len({split[i] for i in range(4)}) > 1 for split in torn)


def test_a_torn_group_of_the_users_splits_is_reported_and_not_changed(tmp_path) -> None:
    task = read_labelled(str(write_list(tmp_path, "csv", "group", split=True)), seed=0)
    split = splits_of(task)
    assert [i for i, name in split.items() if name == "test"] != []
    assert sorted(i for i, name in split.items() if name == "test") == [1, 10, 11]
    assert task.torn == {"patient 0": ["test", "train"], "patient 2": ["test", "train"]}
    (warning,) = [note for note in task.notes if note.startswith("WARNING")]
    assert "2 groups are in more than one split" in warning
    assert "'patient 0 (test, train)'" in warning


def test_groups_are_part_of_the_fingerprint_only_if_there_are_any(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    path = write_list(tmp_path / "a", "csv", "group", split=True)
    with_groups = read_labelled(str(path), seed=0).fingerprint
    text = path.read_text().replace("patient 3", "patient 8")
    path.write_text(text)
    assert read_labelled(str(path), seed=0).fingerprint != with_groups


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_folder_has_no_columns(tmp_path, kind: str) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "0.png", 0)
    with pytest.raises(KtrayError, match=r"task\.group=patient is a column of a CSV or Parquet list"):
        task_kind(kind).read(str(tmp_path), TaskConfig(group="patient"))
    with pytest.raises(KtrayError, match=r"task\.label=dx is a column of a CSV or Parquet list"):
        task_kind(kind).read(str(tmp_path), TaskConfig(label="dx"))


def test_a_missing_group_column_names_the_nearest(tmp_path) -> None:
    path = write_list(tmp_path, "csv", "patient_id")
    with pytest.raises(KtrayError, match=r"no column 'patientid' \(task\.group\)[\s\S]*Is 'patient_id' meant"):
        read_labelled(str(path), seed=0, columns=ListColumns(group="patientid"))
