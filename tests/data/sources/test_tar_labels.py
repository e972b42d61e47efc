"""Labelled tar shards, written by ``webdataset`` where it is installed, and by tarfile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from archives import tar_bytes
from pictures import picture

from ktray.data.labelled.list_columns import ListColumns
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch
from ktray.errors import KtrayError


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(list(members.items()), "w:gz" if path.name.endswith("gz") else "w"))
    return path


def samples(name: str, rows: int, suffix: str = "cls", labels: Any = (0, 1)) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for i in range(rows):
        label = labels[i % len(labels)]
        members[f"{name}{i}.jpg"] = picture(f"{name}{i}")
        members[f"{name}{i}.{suffix}"] = label if isinstance(label, bytes) else str(label).encode()
    return members


def labels(found: Any) -> dict[str, str]:
    everything = [*found.train, *found.val, *found.test]
    return {e.uri.partition("#member=")[2].partition("&")[0]: found.classes[e.label] for e in everything}


def test_shards_of_webdataset(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    for split, rows in (("train", 8), ("test", 4)):
        with wds.TarWriter(str(tmp_path / f"pets-{split}-0000.tar")) as sink:
            for i in range(rows):
                sink.write({"__key__": f"{split}{i}", "jpg": picture(f"{split}{i}"), "cls": i % 2})
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    found = read_labelled(str(tmp_path), seed=0)
    assert (len(found.train) + len(found.val), len(found.test)) == (8, 4)
    expected = {}
    for split in ("train", "test"):
        for sample in wds.WebDataset(str(tmp_path / f"pets-{split}-0000.tar"), shardshuffle=False).decode(only="cls"):
            expected[f"{sample['__key__']}.jpg"] = ("cat", "dog")[sample["cls"]]
    assert labels(found) == expected
    example = found.test[0]
    name = example.uri.partition("#member=")[2].partition(".")[0]
    assert [data for _, data, _ in fetch([example.uri])] == [picture(name)]


@pytest.mark.parametrize("name", ["train.tar", "train.tar.gz", "train.tgz"])
def test_names_of_classes_in_json_or_text(tmp_path: Path, name: str) -> None:
    members = samples("a", 4, "json", [json.dumps({"label": c, "width": 3}).encode() for c in ("cat", "dog")])
    members |= samples("b", 4, "cls", [b"cat", b"dog\n"])
    found = read_labelled(str(shard(tmp_path / name, members)), seed=0)
    assert labels(found) == {f"{n}{i}.jpg": ("cat", "dog")[i % 2] for n in "ab" for i in range(4)}


def test_a_cls_decides_over_json_and_splits_may_be_in_json(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(8):
        facts = {"label": 9, "split": "test" if i > 5 else "train", "patient": f"p{i}"}
        members |= {f"{i}.cls": str(i % 2).encode(), f"{i}.json": json.dumps(facts).encode()}
        members[f"{i}.jpg"] = picture(str(i))
    found = read_labelled(str(shard(tmp_path / "x.tar", members)), seed=0, columns=ListColumns(group="patient"))
    assert found.classes == ["0", "1"]
    assert len(found.test) == 2


def test_folders_of_splits(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "0.tar", samples("a", 6))
    shard(tmp_path / "test" / "0.tar", samples("b", 2))
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    found = read_labelled(str(tmp_path), seed=0)
    assert found.classes == ["cat", "dog"]
    assert len(found.test) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x", "a.txt": b"a cat"}, r"x\.tar' has no labels, only \.jpg, \.txt\. A labelled sample has KEY"),
        ({}, "has no labels, only no members"),
        ({"a.jpg": b"x", "a.json": b"{"}, r"'a\.json' in '.*x\.tar' is not JSON"),
        ({"a.jpg": b"x", "a.cls": b"\xff\xfe"}, r"'a\.cls' in '.*' is not text in UTF-8"),
        ({"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"y"}, r"has no label in row 2"),
    ],
)
def test_what_has_no_labels_says_so(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(KtrayError, match=message):
        read_labelled(str(shard(tmp_path / "x.tar", members)), seed=0)


def test_class_numbers_beyond_the_names(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(KtrayError, match=r"has the label 1 in row 2, and its 1 classes are numbered from 0"):
        read_labelled(str(shard(tmp_path / "x.tar", samples("a", 2))), seed=0)


def test_a_truncated_shard(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", samples("a", 8))
    path.write_bytes(path.read_bytes()[:7000])
    with pytest.raises(KtrayError, match=r"x\.tar' is broken or truncated.*Write or fetch it again"):
        read_labelled(str(path), seed=0)


def test_members_that_are_not_files_are_left_out(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", {**samples("a", 4), "._a0.jpg": b"x"})
    assert len(labels(read_labelled(str(path), seed=0))) == 4
