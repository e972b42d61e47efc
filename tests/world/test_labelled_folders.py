"""Labelled data as it lies: what each folder is read as, or why it is refused. A case is an entry of a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ktray.data import heic
from ktray.data.labelled.read import read_labelled
from ktray.errors import KtrayError

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


@dataclass(frozen=True)
class Case:
    """What is written, and what it is read as.

    Attributes:
        files: by name, the content (see the fixture ``put``).
        classes: class and number of images over all splits; None: it is refused.
        says: regular expression for the notes, or for the error.
        silent: text that no note has.
        keys: further arguments of `read_labelled`.
    """

    files: Mapping[str, int | bytes | str]
    classes: Mapping[str, int] | None = None
    says: str = ""
    silent: str = "\0"
    keys: Mapping[str, str] = field(default_factory=dict)


THREE = {"bus": 6, "car": 6, "train": 6}
SPLIT = {"train/a": 5, "train/b": 5, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2}
CASES = {
    # Names of splits that are classes
    "a class is called train": Case(THREE, THREE, silent="ignored"),
    "classes are called train and test": Case({**THREE, "test": 6}, {**THREE, "test": 6}),
    "a class is called val": Case({"bus": 6, "val": 6}, {"bus": 6, "val": 6}),
    "a class is called dev": Case({"cat": 6, "dev": 6}, {"cat": 6, "dev": 6}),
    "train with kinds of trains beside classes": Case(
        {"bus": 6, "car": 6, "train/steam": 6, "train/diesel": 6}, says="task.layout=splits.*task.layout=classes"
    ),
    "the same, as classes": Case(
        {"bus": 6, "car": 6, "train/steam": 6, "train/diesel": 6},
        {"bus": 6, "car": 6, "train": 12},
        keys={"layout": "classes"},
    ),
    "the same, as splits": Case(
        {"bus": 6, "car": 6, "train/steam": 6, "train/diesel": 6},
        {"steam": 6, "diesel": 6},
        says="ignored: bus, car",
        keys={"layout": "splits"},
    ),
    "splits that are missing": Case({"a": 3, "b": 3}, says="no train folder", keys={"layout": "splits"}),
    "folders beside splits": Case(
        {**SPLIT, "unlabelled": 4, "docs/x.txt": b"x"}, {"a": 9, "b": 9}, says="ignored: docs, unlabelled"
    ),
    "splits in capitals": Case({"Train/a": 5, "Train/b": 5, "VAL/a": 2, "VAL/b": 2}, {"a": 7, "b": 7}),
    # Leftovers
    "leftovers of systems are no classes": Case(
        {
            "a": 6,
            "b": 6,
            **dict.fromkeys(
                (
                    "@eaDir",
                    "lost+found",
                    "$RECYCLE.BIN",
                    "#recycle",
                    ".ipynb_checkpoints",
                    "__MACOSX",
                    "a/@eaDir",
                    "System Volume Information",
                    ".thumbnails",
                    "@Recently-Snapshot",
                ),
                2,
            ),
            "a/._000.jpg": b"x",
            "a/Thumbs.db": b"x",
            "b/desktop.ini": b"x",
            "a/~$x.jpg": b"x",
        },
        {"a": 6, "b": 6},
        silent="ignored",
    ),
    "a store among the classes": Case(
        {"a": 6, "b": 6, "ktray-store/.ktray-store": b"", "ktray-store/stages/curate/x": 2}, {"a": 6, "b": 6}
    ),
    "a store in a class": Case({"a": 6, "b": 6, "b/s/.ktray-store": b"", "b/s/mlflow-artifacts": 2}, {"a": 6, "b": 6}),
    # Names and contents of images
    "JPEGs that are called HEIC": Case(
        {"a": 6, "b": 3, **{f"b/{i}.HEIC": "JPEG" for i in range(3)}}, {"a": 6, "b": 6}, silent="ignored"
    ),
    "images without a suffix": Case({"a": 6, "b": 3, "b/x": "PNG", "b/y.img": "WEBP"}, {"a": 6, "b": 5}),
    "real HEIC images": Case({"a": 6, "b": 4, "b/x.heic": HEIC}, {"a": 6, "b": 4}, says=r"HEIC.*ktray\[heic\]"),
    "only HEIC images": Case({"a/x.heic": HEIC, "b/y.heic": HEIC}, says="no images in class folders.*HEIC"),
    "sidecars and archives": Case(
        {"a": 6, "b": 6, "a/x.txt": b"\xff\xd8\xff", "a/x.xmp": b"<x>", "b/x.zip": b"PK\3\4"}, {"a": 6, "b": 6}
    ),
    # Published layouts
    "TinyImageNet": Case(
        {
            "train/n01/images": 5,
            "train/n02/images": 5,
            "val/images": 4,
            "test/images": 3,
            "train/n01/n01_boxes.txt": b"x",
            "val/val_annotations.txt": b"000.jpg\tn01\t0\t0\n001.jpg\tn02\t0\n002.jpg\tn01\t0\n003.jpg\tn02\t0\n",
        },
        {"n01": 7, "n02": 7},
        says="test folder has no class folders.*3 images without labels",
    ),
    "annotations without classes": Case(
        {"train/a": 5, "train/b": 5, "val/images": 1, "val/val_annotations.txt": b"000.jpg\n"},
        says=r"Line 1 of '.*val_annotations.txt' has no class",
    ),
    "a class of val without training images": Case({**SPLIT, "val/c": 2}, says="1 class of val or test .*'c'"),
    # Too few images
    "one image a class": Case(dict.fromkeys("abcd", 1), says="no validation image.*second image"),
    "one image a class, and a val split": Case(
        {f"{s}/{c}": n for c in "abc" for s, n in (("train", 1), ("val", 4))}, dict.fromkeys("abc", 5)
    ),
    "two images a class": Case({"a": 2, "b": 2}, {"a": 2, "b": 2}, says="no test image"),
    "classes a level lower": Case(
        {"pets/cat": 6, "pets/dog": 6}, says="'cat', 'dog' are the classes, set task.data=.*/pets"
    ),
    "raw photos beside images": Case(
        {"a": 6, "b": 6, "a/IMG_1.NEF": b"II*\0" + b"\0" * 60}, {"a": 6, "b": 6}, says="ignored"
    ),
    "one class": Case({"a": 9}, says="only one class"),
    "no images": Case({"a/x.txt": b"", "b/y.txt": b""}, says="no images in class folders"),
    "loose images": Case({".": 4}, says="4 images directly .* not in a class folder"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_folder_is_read_as_it_is_meant(
    tmp_path: Path, put: Callable[..., None], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heic, "available", lambda: False)
    for name, content in case.files.items():
        put(f"data/{name}", content)
    if case.classes is None:
        with pytest.raises(KtrayError, match=case.says):
            read_labelled(str(tmp_path / "data"), seed=0, **case.keys)
        return
    found = read_labelled(str(tmp_path / "data"), seed=0, **case.keys)
    counts = Counter(found.classes[e.label] for e in [*found.train, *found.val, *found.test])
    assert counts == Counter(case.classes)
    notes = " ".join(found.notes)
    assert re.search(case.says, notes), notes
    assert case.silent not in notes


def test_a_copy_with_other_times_is_the_same_data(tmp_path: Path, put: Callable[..., None]) -> None:
    put("data/a", 5)
    put("data/b", 5)
    before = read_labelled(str(tmp_path / "data"), seed=0).fingerprint
    for path in (tmp_path / "data").rglob("*.jpg"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert read_labelled(str(tmp_path / "data"), seed=0).fingerprint == before
    changed = tmp_path / "data/a/000.jpg"
    changed.write_bytes((tmp_path / "data/b/000.jpg").read_bytes())
    assert read_labelled(str(tmp_path / "data"), seed=0).fingerprint != before


def test_images_of_a_list_are_known_by_their_contents(tmp_path: Path, put: Callable[..., None]) -> None:
    put("x", 8)
    text = "path,label\n" + "".join(f"x/{i:03d}.jpg,{'ab'[i % 2]}\n" for i in range(8))
    (tmp_path / "l.csv").write_text(text)
    before = read_labelled(str(tmp_path / "l.csv"), seed=0).fingerprint
    (tmp_path / "l.csv").write_text(text + "\n")  # another time, and nothing else
    assert read_labelled(str(tmp_path / "l.csv"), seed=0).fingerprint == before
    (tmp_path / "x/003.jpg").write_bytes((tmp_path / "x/004.jpg").read_bytes())
    assert read_labelled(str(tmp_path / "l.csv"), seed=0).fingerprint != before
