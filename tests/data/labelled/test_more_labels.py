"""Labels that come back join the training images, and nothing that would spoil a task is taken in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import tar_bytes
from image_zoo import jpeg

from ktray.data.labelled.label_sets import read_label_sets
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.labelled.more_labels import with_more_labels
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch_images
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError
from ktray.recipe.schema import TaskConfig

CLASSES = ["Ström", "cat", "dog"]


@pytest.fixture
def task(tmp_path: Path) -> LabelledSet:
    for split, n in (("train", 3), ("val", 2), ("test", 2)):
        for name in CLASSES:
            folder = tmp_path / "task" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                (folder / f"{split}{i}.jpg").write_bytes(f"{split}{name}{i}".encode())
    (tmp_path / "gallery").mkdir()
    for i in range(4):
        (tmp_path / "gallery" / f"{i}.jpg").write_bytes(b"x%d" % i)
    return read_labelled(str(tmp_path / "task"), seed=0)


def written(path: Path, *rows: tuple[str, str], header: str = "uri,label,rank") -> str:
    lines = [header, *(f'"{uri}","{label}",{i}' for i, (uri, label) in enumerate(rows, 1))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def added(task: LabelledSet, more: Any, sets: bool = False) -> LabelledSet:
    return with_more_labels(task, TaskConfig(more_labels=more), image_classes=not sets, sets=sets)


def test_labels_join_the_training_images_and_nothing_else_changes(task: LabelledSet, tmp_path: Path) -> None:
    gallery = tmp_path / "gallery"
    rows = [(f"{gallery}/0.jpg", "dog"), (f"{gallery}/1.jpg", "Ström"), (f"{gallery}/2.jpg", "")]
    found = added(task, written(tmp_path / "s.csv", *rows))
    new = {e.uri: e.label for e in found.train if e not in task.train}
    assert new == {f"{gallery}/0.jpg": 2, f"{gallery}/1.jpg": 0}
    assert [e for e in found.train if e in task.train] == task.train
    assert [e.label for e in found.train] == sorted(e.label for e in found.train)
    assert (found.val, found.test, found.classes) == (task.val, task.test, task.classes)
    assert "1 rows of task.more_labels have no label yet." in found.notes
    assert "task.more_labels adds 2 training images (1 Ström, 1 dog)." in found.notes
    assert found.fingerprint != task.fingerprint


def test_without_the_key_the_task_is_the_same_object(task: LabelledSet) -> None:
    assert added(task, None) is task


def test_the_fingerprint_follows_labels_and_contents_and_not_their_order(task: LabelledSet, tmp_path: Path) -> None:
    gallery = tmp_path / "gallery"
    rows = [(f"{gallery}/0.jpg", "dog"), (f"{gallery}/1.jpg", "cat")]
    one = added(task, written(tmp_path / "a.csv", *rows)).fingerprint
    assert added(task, written(tmp_path / "b.csv", *reversed(rows))).fingerprint == one
    assert added(task, written(tmp_path / "c.csv", (rows[0][0], "cat"), rows[1])).fingerprint != one
    (gallery / "1.jpg").write_bytes(b"another image")
    assert added(task, written(tmp_path / "a.csv", *rows)).fingerprint != one


def test_lists_have_any_form_and_a_folder_is_all_of_its_lists(task: LabelledSet, tmp_path: Path) -> None:
    rounds = tmp_path / "rounds"
    written(rounds / "1.csv", ("../gallery/0.jpg", "dog"))
    pq.write_table(pa.table({"path": [f"{tmp_path}/gallery/1.jpg"], "label": ["cat"]}), rounds / "2.parquet")
    (rounds / "page.html").write_text("no list")
    other = tmp_path / "excel.csv"
    other.write_text(f"label;uri\ndog;{tmp_path}/gallery/3.jpg\n", encoding="utf-16")
    found = added(task, [str(rounds), str(other)])
    new = {Path(e.uri).name: e.label for e in found.train if e not in task.train}
    assert new == {"0.jpg": 2, "1.jpg": 1, "3.jpg": 2}


def test_an_empty_folder_and_an_unfilled_list_add_nothing(task: LabelledSet, tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    for more in (str(tmp_path / "rounds"), written(tmp_path / "s.csv", (f"{tmp_path}/gallery/0.jpg", ""))):
        found = added(task, more)
        assert (found.train, found.fingerprint) == (task.train, task.fingerprint)
        assert found.notes[-1] == "task.more_labels adds no training image."


def test_images_beyond_the_budget_are_no_more_unlabelled(task: LabelledSet, tmp_path: Path) -> None:
    small = read_labelled(str(tmp_path / "task"), seed=0, labels_per_class=1)
    assert len(small.unlabeled) == 6
    chosen = small.unlabeled[0]
    found = added(small, written(tmp_path / "s.csv", (chosen, Path(chosen).parent.name)))
    assert len(found.train) == 4
    assert found.unlabeled == small.unlabeled[1:]


def test_a_repeated_label_is_taken_once(task: LabelledSet, tmp_path: Path) -> None:
    old = task.train[0]
    row, same = (f"{tmp_path}/gallery/0.jpg", "dog"), (old.uri, task.classes[old.label])
    found = added(task, [written(tmp_path / "a.csv", row, same), written(tmp_path / "b.csv", row)])
    assert len(found.train) == len(task.train) + 1
    assert "1 images of task.more_labels are training images of task.data with the same label." in found.notes


def test_images_inside_of_archives_are_found(task: LabelledSet, tmp_path: Path) -> None:
    (tmp_path / "g.tar").write_bytes(tar_bytes([("one.jpg", jpeg(0)), ("two.jpg", jpeg(1))]))
    uris = [r.uri for s in gallery_shards(str(tmp_path / "g.tar"), "auto", None) for r in read_shard(s)]
    found = added(task, written(tmp_path / "s.csv", (uris[1], "cat")))
    (new,) = [e for e in found.train if e not in task.train]
    ((_, image, problem),) = fetch_images([new.uri], max_pixels=10**8)
    assert (new.uri, problem) == (uris[1], "")
    assert image is not None


# By name: rows of a list, the message, and the remedy.
REFUSED: dict[str, tuple[list[tuple[str, str]], str, str]] = {
    "unknown class": (
        [("gallery/0.jpg", "kat")],
        "has the class 'kat', which task.data does not have",
        "Did you mean 'cat'?",
    ),
    "far class": ([("gallery/0.jpg", "zebra")], "class 'zebra'", "The classes are 'Ström', 'cat', 'dog'."),
    "missing": (
        [("gallery/0.jpg", "cat"), ("gallery/9.jpg", "cat")],
        "1 image of task.more_labels does not exist: .*9.jpg",
        "Check the paths",
    ),
    "validation": (
        [("task/val/cat/val0.jpg", "cat")],
        "1 image of task.more_labels is in the val split: .*val0.jpg",
        "Remove these rows",
    ),
    "test": (
        [("task/test/cat/test0.jpg", "cat"), ("task/val/dog/val1.jpg", "dog")],
        "2 images .* in the test and val split",
        "Remove these rows",
    ),
    "two labels": (
        [("gallery/0.jpg", "cat"), ("gallery/1.jpg", "cat"), ("gallery/0.jpg", "dog")],
        "1 image of task.more_labels has two labels: '.*/0.jpg'",
        "Keep one",
    ),
    "against task.data": (
        [("task/train/cat/train0.jpg", "dog")],
        "two labels: '.*train0.jpg' .*the other one is in task.data",
        "Keep one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_list_is_refused_by_name(task: LabelledSet, tmp_path: Path, case: str) -> None:
    rows, message, remedy = REFUSED[case]
    place = written(tmp_path / "s.csv", *((f"{tmp_path}/{uri}", label) for uri, label in rows))
    with pytest.raises(KtrayError, match=message) as refused:
        added(task, place)
    assert remedy in refused.value.remedy


def test_other_splits_and_other_files_are_refused(task: LabelledSet, tmp_path: Path) -> None:
    image = f"{tmp_path}/gallery/0.jpg"
    (tmp_path / "split.csv").write_text(f"path,label,split\n{image},cat,test\n")
    with pytest.raises(KtrayError, match="1 row with another split than train"):
        added(task, str(tmp_path / "split.csv"))
    with pytest.raises(KtrayError, match=r"task.more_labels=.*gone.csv does not exist"):
        added(task, str(tmp_path / "gone.csv"))
    with pytest.raises(KtrayError, match=r"0.jpg is not a list"):
        added(task, image)
    with pytest.raises(KtrayError, match="no column 'label'"):
        added(task, written(tmp_path / "x.csv", (image, "cat"), header="uri,other,rank"))
    with pytest.raises(KtrayError, match=r"task\.kind=classification have none"):
        with_more_labels(task, TaskConfig(more_labels=image), image_classes=False, sets=False)


def test_sets_of_classes_come_back_in_any_order_and_may_be_empty(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    rows = ["a.jpg,cat|dog,train", "b.jpg,cat,val", "c.jpg,dog,test"]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    task = read_label_sets(str(tmp_path / "list.csv"), seed=0)
    back = [("d.jpg", "dog; cat"), ("d.jpg", "cat|dog"), ("e.jpg", "|"), ("f.jpg", "")]
    found = added(task, written(tmp_path / "s.csv", *back), sets=True)
    assert {Path(e.uri).name: e.label for e in found.train} == {"a.jpg": (0, 1), "d.jpg": (0, 1), "e.jpg": ()}
    with pytest.raises(KtrayError, match="class 'cats'"):
        added(task, written(tmp_path / "s.csv", ("d.jpg", "dog|cats")), sets=True)
