"""Sets of classes from lists and from COCO annotations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_zoo import jpeg

from ktray.data.labelled.decode import SetReader, decode_examples
from ktray.data.labelled.label_sets import read_label_sets
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.labelled.list_columns import ListColumns
from ktray.errors import KtrayError

ROWS = [
    ("a.jpg", "cat|dog", "train"),
    ("b.jpg", "dog ; bird|dog", "train"),
    ("c.jpg", "", "train"),
    ("d.jpg", "cat", "val"),
    ("e.jpg", "bird;cat", "test"),
]
# By file, the classes: bird 0, cat 1, dog 2.
EXPECTED = {"a.jpg": (1, 2), "b.jpg": (0, 2), "c.jpg": (), "d.jpg": (1,), "e.jpg": (0, 1)}


def images(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def labels(found: LabelledSet) -> dict[str, tuple[int, ...]]:
    return {e.uri.rpartition("/")[2]: e.label for e in [*found.train, *found.val, *found.test]}


def write_csv(folder: Path, rows: list[tuple[str, str, str]] = ROWS) -> str:
    images(folder, [name for name, _, _ in rows])
    lines = [f'{name},"{label}",{split}' for name, label, split in rows]
    (folder / "list.csv").write_text("\n".join(["path,label,split", *lines]), encoding="utf-8")
    return str(folder / "list.csv")


def test_a_csv_list_has_names_with_separators(tmp_path: Path) -> None:
    found = read_label_sets(write_csv(tmp_path), seed=0)
    assert found.classes == ["bird", "cat", "dog"]
    assert labels(found) == EXPECTED
    assert [len(part) for part in (found.train, found.val, found.test)] == [3, 1, 1]
    assert any("without a validation image: 'bird', 'dog'" in note for note in found.notes)


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string()), None])
def test_a_parquet_list_has_lists_or_text(tmp_path: Path, kind: pa.DataType | None) -> None:
    images(tmp_path, [name for name, _, _ in ROWS])
    names = [[n.strip() for n in label.replace(";", "|").split("|") if n.strip()] for _, label, _ in ROWS]
    column = pa.array([label for _, label, _ in ROWS]) if kind is None else pa.array([n or None for n in names], kind)
    table = {"path": [r[0] for r in ROWS], "label": column, "split": [r[2] for r in ROWS]}
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    assert labels(read_label_sets(str(tmp_path / "list.parquet"), seed=0)) == EXPECTED


def test_names_in_parquet_lists_may_have_separators_and_be_numbers(tmp_path: Path) -> None:
    images(tmp_path, ["a.jpg", "b.jpg"])
    for values, classes in (
        ([["salt|pepper", "x"], ["x"]], ["salt|pepper", "x"]),
        ([[10, 9], [9]], ["9", "10"]),
    ):
        table = pa.table({"path": ["a.jpg", "b.jpg"], "label": values, "split": ["train", "val"]})
        pq.write_table(table, tmp_path / "list.parquet")
        assert read_label_sets(str(tmp_path / "list.parquet"), seed=0).classes == classes


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_the_recipe_may_name_the_column_of_the_sets(tmp_path: Path, form: str) -> None:
    images(tmp_path, [name for name, _, _ in ROWS])
    sets = {name: [c for c in ("bird", "cat", "dog") if c in label] for name, label, _ in ROWS}
    if form == "csv":
        lines = [f"{name},nothing,{'|'.join(sets[name])},{split}" for name, _, split in ROWS]
        (tmp_path / "list.csv").write_text("\n".join(["path,label,Tags,split", *lines]), encoding="utf-8")
    else:
        table = {"path": list(sets), "label": ["nothing"] * len(ROWS), "Tags": list(sets.values())}
        pq.write_table(pa.table({**table, "split": [r[2] for r in ROWS]}), tmp_path / "list.parquet")
    found = read_label_sets(str(tmp_path / f"list.{form}"), seed=0, columns=ListColumns(label="tags"))
    assert found.classes == ["bird", "cat", "dog"]
    assert labels(found) == EXPECTED


def test_images_inside_a_parquet_file(tmp_path: Path) -> None:
    table = pa.table({"image": [jpeg(seed=i) for i in range(4)], "label": [["a"], ["a", "b"], ["b"], []]})
    pq.write_table(table, tmp_path / "list.parquet")
    found = read_label_sets(str(tmp_path / "list.parquet"), seed=0, val_fraction=0.3, test_fraction=0.1)
    examples = [(e.uri, e.label, "") for e in [*found.train, *found.val, *found.test]]
    columns, bad = decode_examples(examples, 10**6, {}, SetReader(num_classes=2))
    assert not bad
    assert sorted(columns["label"].tolist()) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert columns["label"].dtype == "uint8"
    assert SetReader(num_classes=3).columns([], {})["label"].shape == (0, 3)


def coco(names: list[str], sets: dict[str, list[str]], categories: list[str]) -> dict[str, Any]:
    number = {name: 10 * i + 3 for i, name in enumerate(categories)}  # ids have gaps, as COCO's have
    annotations = [
        {"id": i, "image_id": names.index(name), "category_id": number[c], "bbox": [0, 0, 2, 2], "iscrowd": 0}
        for i, (name, c) in enumerate((name, c) for name, classes in sets.items() for c in [*classes, *classes[:1]])
    ]
    return {
        "images": [{"id": i, "file_name": name, "height": 4, "width": 4} for i, name in enumerate(names)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "x"} for name, i in number.items()],
    }


SETS = {"a.jpg": ["cat", "dog"], "b.jpg": ["dog", "bird"]}


def test_the_folders_of_coco_itself(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    images(tmp_path / "train2017", ["a.jpg", "b.jpg", "c.jpg"])
    images(tmp_path / "val2017", ["d.jpg"])
    train = coco(["a.jpg", "b.jpg", "c.jpg"], SETS, ["bird", "cat", "dog", "zebra"])
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(train))
    (tmp_path / "annotations/captions_train2017.json").write_text("{}")
    val = coco(["d.jpg"], {"d.jpg": ["cat"]}, ["bird", "cat", "dog", "zebra"])
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(val))
    found = read_label_sets(str(tmp_path), seed=0, test_fraction=0.3)
    assert found.classes == ["bird", "cat", "dog"]
    assert labels(found) == {name: EXPECTED[name] for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")}
    assert [e.uri for e in found.val] == [str(tmp_path / "val2017/d.jpg")]
    assert any("'zebra'" in note for note in found.notes)


def test_the_folders_of_an_annotation_tool_and_one_file_with_splits(tmp_path: Path) -> None:
    for split, names in (("train", ["a.jpg", "b.jpg", "c.jpg"]), ("valid", ["d.jpg"]), ("test", ["e.jpg"])):
        images(tmp_path / "tool" / split, names)
        sets = {n: [["bird", "cat", "dog"][c] for c in EXPECTED[n]] for n in names}
        content = coco(names, sets, ["dog", "cat", "bird"])
        (tmp_path / "tool" / split / "_annotations.coco.json").write_text(json.dumps(content))
    assert labels(read_label_sets(str(tmp_path / "tool"), seed=0)) == EXPECTED
    names = [name for name, _, _ in ROWS]
    images(tmp_path / "one" / "images", names)
    content = coco(names, {n: [["bird", "cat", "dog"][c] for c in EXPECTED[n]] for n in names}, ["dog", "cat", "bird"])
    for entry, (_, _, split) in zip(content["images"], ROWS, strict=True):
        entry["split"] = split
    (tmp_path / "one/all.json").write_text(json.dumps(content))
    found = read_label_sets(str(tmp_path / "one/all.json"), seed=0)
    assert labels(found) == EXPECTED
    assert len(found.test) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "has no list images"),
        ({"categories": [{"id": 3}]}, "A category in .* has no 'name'"),
        ({"annotations": [{"image_id": 99, "category_id": 3}]}, "1 annotations .* refer to images .* for example 99"),
        ({"annotations": [{"image_id": 0, "category_id": 4}]}, "1 annotations .* refer to categories .* example 4"),
        ({"annotations": [{"image_id": 0}]}, "An entry of .* has no 'category_id'"),
        ({"images": [], "annotations": []}, "has no images"),
        ({"images": [{"id": 0, "file_name": "x.jpg"}], "annotations": []}, "are not found, for example 'x.jpg'"),
        ({"images": [{"id": 0, "file_name": "a.jpg", "split": "extra"}], "annotations": []}, "has the split 'extra'"),
    ],
)
def test_damaged_annotations_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    images(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "x.json").write_text(json.dumps(coco(["a.jpg", "b.jpg"], SETS, ["bird", "cat", "dog"]) | change))
    with pytest.raises(KtrayError, match=message):
        read_label_sets(str(tmp_path / "x.json"), seed=0)


def test_other_forms_are_refused(tmp_path: Path) -> None:
    images(tmp_path / "folders", ["cat/a.jpg"])
    (tmp_path / "x.json").write_text("[1,")
    (tmp_path / "x.txt").write_text("a")
    for name, message in (("folders", "not in a format"), ("x.txt", "not in a format"), ("x.json", "is not JSON")):
        with pytest.raises(KtrayError, match=message):
            read_label_sets(str(tmp_path / name), seed=0)
    with pytest.raises(KtrayError, match=r"task\.group=patient is a column"):
        read_label_sets(str(tmp_path / "x.json"), seed=0, columns=ListColumns(group="patient"))


def test_classes_that_cannot_be_learned_are_named(tmp_path: Path) -> None:
    unknown = write_csv(tmp_path / "unknown", [*ROWS, ("f.jpg", "cat|zebra", "val")])
    with pytest.raises(KtrayError, match=r"1 class of val or test has no training image .*'zebra'"):
        read_label_sets(unknown, seed=0)
    empty = write_csv(tmp_path / "empty", [(name, "", split) for name, _, split in ROWS])
    with pytest.raises(KtrayError, match=r"No training image .* has a class"):
        read_label_sets(empty, seed=0)
    with pytest.raises(KtrayError, match="label budget leaves 1 class without a training image: 'cat'"):
        read_label_sets(write_csv(tmp_path / "few"), seed=0, labels=1)
    with pytest.raises(KtrayError, match="both set"):
        read_label_sets(write_csv(tmp_path / "both"), seed=0, labels=1, labels_per_class=1)
    wrong = write_csv(tmp_path / "split", [*ROWS, ("f.jpg", "", "extra")])
    with pytest.raises(KtrayError, match="split 'extra' in row 7"):
        read_label_sets(wrong, seed=0)
    twice = write_csv(tmp_path / "twice", [*ROWS, ("a.jpg", "cat", "train")])
    with pytest.raises(KtrayError, match="1 image has two labels"):
        read_label_sets(twice, seed=0)


def test_one_class_alone_and_the_order_of_names_do_not_matter(tmp_path: Path) -> None:
    found = read_label_sets(
        write_csv(tmp_path / "one", [(n, "cat" if "cat" in c else "", s) for n, c, s in ROWS]), seed=0
    )
    assert found.classes == ["cat"]
    again = write_csv(tmp_path / "order", [(n, "|".join(reversed(c.split("|"))), s) for n, c, s in ROWS])
    assert labels(read_label_sets(again, seed=0)) == EXPECTED
