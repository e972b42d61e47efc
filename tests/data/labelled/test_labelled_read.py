import itertools
import os
import random
import unicodedata
from collections import Counter

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from archives import write_parquet
from image_zoo import jpeg

from ktray.data import filesystem
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch
from ktray.errors import KtrayError


def make(root, counts, order=None):
    """Empty files are enough here: nothing is decoded."""
    names = [f"{folder}/{i}.jpg" for folder, count in counts.items() for i in range(count)]
    if order is not None:
        random.Random(order).shuffle(names)
    for folder in counts:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).write_bytes(name.encode())
    return str(root)


def per_class(examples):
    return Counter(e.label for e in examples)


def inside(root, examples):
    return [e.uri.removeprefix(root) for e in examples]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_three_splits_are_taken_as_they_are(tmp_path, val):
    counts = {f"{s}/{c}": n for s, n in (("train", 5), (val, 3), ("test", 2)) for c in ("a b", "ü 写")}
    root = make(tmp_path / "d", counts)
    out = read_labelled(root, seed=0)
    assert out.classes == ["a b", "ü 写"]
    assert per_class(out.train) == {0: 5, 1: 5}
    assert per_class(out.val) == {0: 3, 1: 3}
    assert per_class(out.test) == {0: 2, 1: 2}
    assert out.notes == []
    assert out.unlabeled == []
    for examples, split in ((out.train, "train"), (out.val, val), (out.test, "test")):
        for e in examples:
            assert e.uri.startswith(f"{root}/{split}/{out.classes[e.label]}/")


def test_missing_splits_are_drawn_stratified_disjoint_and_noted(tmp_path):
    root = make(tmp_path / "d", {"a": 10, "b": 40, "c/deeper": 20})
    out = read_labelled(root, seed=3, val_fraction=0.2, test_fraction=0.3)
    assert out.classes == ["a", "b", "c"]
    assert per_class(out.test) == {0: 3, 1: 12, 2: 6}
    assert per_class(out.val) == {0: 2, 1: 8, 2: 4}
    assert per_class(out.train) == {0: 5, 1: 20, 2: 10}
    every = [e.uri for part in (out.train, out.val, out.test) for e in part]
    assert len(set(every)) == len(every) == 70
    assert any("val and test" in note and "seed 3" in note for note in out.notes)


def test_only_val_missing(tmp_path):
    root = make(tmp_path / "d", {"train/a": 10, "train/b": 10, "test/a": 4, "test/b": 4})
    out = read_labelled(root, seed=0)
    assert per_class(out.val) == {0: 2, 1: 2}
    assert all("/train/" in e.uri for e in [*out.train, *out.val])
    assert len(out.test) == 8
    assert len(out.notes) == 1


def test_draws_depend_on_seed_and_not_on_place_or_order(tmp_path, monkeypatch):
    counts = {"a": 30, "b": 30}
    first, second = make(tmp_path / "x", counts, order=1), make(tmp_path / "y/z", counts, order=2)
    one = read_labelled(first, seed=0, labels_per_class=7)
    scandir = os.scandir

    class Reversed(list):
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(sorted(scandir(path), key=lambda e: e.name)[::-1]))
    two = read_labelled(second, seed=0, labels_per_class=7)
    for part in ("train", "val", "test"):
        assert inside(first, getattr(one, part)) == inside(second, getattr(two, part))
    other = read_labelled(first, seed=1, labels_per_class=7)
    assert set(other.train) != set(one.train)
    assert set(other.test) != set(one.test)
    assert other.fingerprint != one.fingerprint == read_labelled(first, seed=0, labels_per_class=7).fingerprint


def test_budgets_are_nested_and_leave_the_rest_unlabeled(tmp_path):
    root = make(tmp_path / "d", {"a": 50, "b": 50, "c": 9})
    sets = {n: read_labelled(root, seed=5, labels_per_class=n) for n in (1, 2, 5, 10, 30)}
    full = read_labelled(root, seed=5)
    chosen = [set(s.train) for s in sets.values()]
    for small, large in itertools.pairwise(chosen):
        assert small < large
    assert chosen[-1] <= set(full.train)
    for n, s in sets.items():
        assert per_class(s.train) == {0: min(n, 30), 1: min(n, 30), 2: min(n, 5)}
        assert (s.val, s.test) == (full.val, full.test)
        assert {e.uri for e in s.train} | set(s.unlabeled) == {e.uri for e in full.train}
        assert not {e.uri for e in s.train} & set(s.unlabeled)
        assert not set(s.unlabeled) & {e.uri for e in [*s.val, *s.test]}
    assert any("fewer than 10" in note and "'c'" in note for note in sets[10].notes)
    assert len({s.fingerprint for s in sets.values()}) == len(sets)


@pytest.mark.parametrize(("count", "split"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (4, (2, 1, 1))])
def test_tiny_classes_keep_train_then_val_then_test(tmp_path, count, split):
    root = make(tmp_path / "d", {"tiny": count, "z": 20})
    out = read_labelled(root, seed=0)
    assert (per_class(out.train)[0], per_class(out.val)[0], per_class(out.test)[0]) == split
    assert any("too few images" in note for note in out.notes) == (count < 3)


def test_large_fractions_never_empty_train(tmp_path):
    out = read_labelled(
        make(tmp_path / "d", {"a": 4, "b": 3}), seed=0, val_fraction=0.9, test_fraction=0.9, labels_per_class=None
    )
    for part in (out.train, out.val, out.test):
        assert set(per_class(part)) == {0, 1}


def test_clutter_is_ignored_and_counted(tmp_path):
    root = tmp_path / "d"
    make(root, {"train/a": 5, "train/b": 5, "train/empty": 0, "val/a": 1, "test/b": 1, "extras/x": 3})
    (root / "train/a/readme.txt").write_text("")
    (root / "train/a/Thumbs.db").write_text("")
    (root / "train/b/notes.json").write_text("{}")
    (root / "train/a/.DS_Store").write_text("")
    (root / "train/loose.png").write_bytes(b"")
    out = read_labelled(str(root), seed=0)
    assert out.classes == ["a", "b"]
    assert len(out.train) == 10
    notes = " ".join(out.notes)
    assert "Files in 'train/' are ignored because they are not images: " in notes
    assert "1 images directly in 'train/'" in notes
    assert "Class folders in 'train/' without images are ignored: 'empty'" in notes
    assert "extras" in notes


def test_linked_class_folder_is_a_class(tmp_path):
    root = make(tmp_path / "d", {"a": 5})
    other = make(tmp_path / "elsewhere", {"pictures": 5})
    (tmp_path / "d/b").symlink_to(f"{other}/pictures")
    out = read_labelled(root, seed=0)
    assert out.classes == ["a", "b"]
    assert len(out.train) + len(out.val) + len(out.test) == 10


def test_unicode_forms_of_one_class_are_one_class(tmp_path):
    forms = [unicodedata.normalize(form, "für") for form in ("NFC", "NFD")]
    root = make(tmp_path / "d", {f"train/{forms[0]}": 3, "train/b": 3, f"val/{forms[1]}": 1, "test/b": 1})
    out = read_labelled(root, seed=0)
    assert out.classes == ["b", forms[0]]
    assert [e.label for e in out.val] == [1]


def test_numeric_classes_are_in_numeric_order(tmp_path):
    out = read_labelled(make(tmp_path / "d", {"10": 3, "9": 3, "0": 3}), seed=0)
    assert out.classes == ["0", "9", "10"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("with_split", [True, False])
def test_lists(tmp_path, kind, with_split):
    make(tmp_path / "my images", {"x": 12})
    rows = [(f"my images/x/{i}.jpg", f"größe {i % 2}", ["train", "Validation", "test"][i % 3]) for i in range(11)]
    rows.append((str(tmp_path / "my images/x/11.jpg"), "größe 1", "train"))
    names = ["Path", "label", *(["split"] if with_split else [])]
    if kind == "csv":
        lines = [",".join(names), *(",".join(row[: len(names)]) for row in rows)]
        (tmp_path / "list.csv").write_text("\n".join(lines), "utf-8-sig")
    else:
        columns = {n: [row[i] for row in rows] for i, n in enumerate(names)}
        write_parquet(tmp_path / "list.parquet", columns)
    out = read_labelled(str(tmp_path / f"list.{kind}"), seed=0)
    assert out.classes == ["größe 0", "größe 1"]
    every = [*out.train, *out.val, *out.test]
    assert len(every) == 12
    assert {(e.uri, out.classes[e.label]) for e in every} == {
        (str(tmp_path / path) if path[0] != "/" else path, label) for path, label, _ in rows
    }
    if with_split:
        assert (len(out.train), len(out.val), len(out.test)) == (5, 4, 3)
    assert all(error is None for _, _, error in fetch([e.uri for e in every]))


def test_parquet_list_with_image_bytes(tmp_path):
    images = pa.array([{"bytes": jpeg(i), "path": f"{i}"} for i in range(8)])
    path = write_parquet(tmp_path / "list.parquet", {"image": images, "label": [i // 4 for i in range(8)]})
    out = read_labelled(path, seed=0)
    assert out.classes == ["0", "1"]
    for e in [*out.train, *out.val, *out.test]:
        ((_, data, _),) = fetch([e.uri])
        assert [jpeg(i) for i in range(8)].index(data) // 4 == e.label


def test_folder_and_list_on_s3(tmp_path, monkeypatch):
    make(tmp_path / "bucket/d", {"a b": 5, "ü": 5})
    fake = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(filesystem, "bucket_filesystem", lambda name: {"s3://bucket": fake}[name])
    out = read_labelled("s3://bucket/d/", seed=0)
    assert out.classes == ["a b", "ü"]
    uris = [e.uri for e in [*out.train, *out.val, *out.test]]
    assert len(uris) == 10
    assert all(error is None for _, _, error in fetch(uris))
    local = read_labelled(str(tmp_path / "bucket/d"), seed=0)
    assert [u.removeprefix("s3://") for u in uris] == [
        e.uri.removeprefix(f"{tmp_path}/") for e in [*local.train, *local.val, *local.test]
    ]
    (tmp_path / "bucket/list.csv").write_text("path,label,split\nd/a b/0.jpg,x,\nd/ü/0.jpg,y,train\nd/ü/1.jpg,y,val\n")
    assert [e.uri for e in read_labelled("s3://bucket/list.csv", seed=0).train] == [
        "s3://bucket/d/a b/0.jpg",
        "s3://bucket/d/ü/0.jpg",
    ]


def lists(folder, **files):
    folder.mkdir()
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("\n".join(f"{file},{label}" for file, label in lines))
    return str(folder)


def test_split_lists_choose_by_budget_and_find_images_by_class(tmp_path):
    # The same file names in every class, and a class whose name is a path, as in Places365.
    root = make(tmp_path / "d", {"h/lodge/outdoor": 9, "a/airfield": 9})
    labels = ("lodge_outdoor", "airfield")
    splits = lists(
        tmp_path / "s",
        train_2img_per_class=[(f"{i}.jpg", c) for i in range(2) for c in labels],
        train_5img_per_class=[(f"{i}.jpg", c) for i in range(5) for c in labels],
        val=[(f"{i}.jpg", c) for i in (5, 6) for c in labels],
        test=[(f"{i}.jpg", c) for i in (7, 8) for c in labels],
    )
    out = read_labelled(root, splits=splits, seed=0, labels_per_class=2)
    assert out.classes == ["airfield", "lodge_outdoor"]
    assert inside(root, out.train) == [f"/{c}/{i}.jpg" for c in ("a/airfield", "h/lodge/outdoor") for i in range(2)]
    assert per_class(out.val) == per_class(out.test) == {0: 2, 1: 2}
    assert len(out.unlabeled) == 6
    assert set(out.unlabeled) == {f"{root}/{c}/{i}.jpg" for c in ("a/airfield", "h/lodge/outdoor") for i in (2, 3, 4)}
    assert any("train_2img_per_class.txt" in note for note in out.notes)
    with pytest.raises(
        KtrayError, match=r"several lists for one split.*train_2img_per_class.*task\.train_list.*labels_per_class"
    ):
        read_labelled(root, splits=splits, seed=0)


def test_split_lists_name_what_is_not_there(tmp_path):
    root = make(tmp_path / "d", {"a": 3, "b": 3})
    splits = lists(tmp_path / "s", train=[("a/0.jpg", "a"), ("b/0.jpg", "b"), ("b/7.jpg", "b")])
    with pytest.raises(KtrayError, match=r"1 image of the lists .*b/7.jpg,b"):
        read_labelled(root, splits=splits, seed=0)


@pytest.mark.parametrize(
    ("counts", "what"),
    [
        ({"only": 5}, "only one class, 'only'.*two classes"),
        ({"only": 5, "empty": 0}, "only one class"),
        ({"train/a": 2, "train/b": 2, "val/c": 1, "test/d": 1}, "2 classes of val or test .* 'c', 'd'"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "test/c": 3}, "1 class of val or test .* 'c'"),
        ({"train/a": 2, "train/b": 0, "val/b": 1}, "1 class of val or test .* 'b'"),
        ({"test/a": 2, "val/a": 2}, "has test and val but no train"),
        ({"val/a": 1, "valid/a": 1, "train/a": 1}, "two folders for one split: val and valid"),
        ({"a": 0}, "has no images in class folders"),
        ({".": 3}, "has no images in class folders"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, counts, what):
    root = make(tmp_path / "d", counts)
    with pytest.raises(KtrayError, match=what) as caught:
        read_labelled(root, seed=0)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


HEAD = "path,label,split\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "has no rows"),
        ("place,label\nx/0.jpg,a\n", "no column 'path'"),
        ("path,lable\nx/0.jpg,a\n", "no column 'label'.*Rename 'lable'"),
        ("path:label\nx/0.jpg:a\n", "no column 'path'"),
        (HEAD + "x/0.jpg,a,train\nx/1.jpg,,train\n", "no label in row 3"),
        (HEAD + "x/0.jpg,a,trian\n", "split 'trian' in row 2"),
        (
            HEAD + "gone/0.jpg,a,train\ngone/1.jpg,b,train\n",
            "None of the 2 images .* exists.*relative to the folder of the list",
        ),
        (HEAD + "".join(f"x/{i}.jpg,a,{s}\n" for i in range(5) for s in ("train", "test")), "5 images are in two"),
        (HEAD + "x/0.jpg,a,train\nx/./0.jpg,a,test\n", "1 image is in two splits: '.*x/0.jpg'"),
        (HEAD + "x/0.jpg,a,train\nx/0.jpg,b,train\n", "1 image has two labels"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, what):
    make(tmp_path, {"x": 6})
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(KtrayError, match=what) as caught:
        read_labelled(str(tmp_path / "list.csv"), seed=0)
    if "5 images" in what:
        assert str(caught.value).count(".jpg'") == 3
        assert "and 2 more" in str(caught.value)


def test_repeated_lines_count_once(tmp_path):
    make(tmp_path, {"x": 4})
    lines = [f"x/{i}.jpg,{'ab'[i % 2]},train" for i in range(4)]
    (tmp_path / "list.csv").write_text(HEAD + "\n".join([*lines, *lines[:3]]))
    out = read_labelled(str(tmp_path / "list.csv"), seed=0)
    assert len(out.train) + len(out.val) + len(out.test) == 4
    assert any("3 lines of the list are repeats" in note for note in out.notes)


def test_what_is_not_there_or_not_data(tmp_path):
    with pytest.raises(KtrayError, match=r"does not exist\. Folder '.*' has no 'gone'.*task\.data"):
        read_labelled(str(tmp_path / "gone"), seed=0)
    (tmp_path / "photos").mkdir()
    with pytest.raises(KtrayError, match=r"Did you mean '.*/photos'.*task\.data"):
        read_labelled(str(tmp_path / "photo"), seed=0)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(KtrayError, match="not in a format of labelled data"):
        read_labelled(str(tmp_path / "x.txt"), seed=0)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(KtrayError, match="not a complete Parquet file"):
        read_labelled(str(tmp_path / "x.parquet"), seed=0)
