"""Folders of images with metadata.csv, .jsonl or .parquet, compared with what ``datasets`` reads where it is there."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import picture

from ktray.data.labelled.read import read_labelled
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError

ROWS = [{"file_name": f"img/{i}.jpg", "label": ("cat", "dog")[i % 2], "text": f"no. {i}"} for i in range(8)]


def write(folder: Path, kind: str, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    for row in rows:
        path = folder / str(row.get("file_name", "x.jpg"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(str(path)))
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), folder / "metadata.parquet")
    else:
        with open(folder / "metadata.csv", "w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def labels(found: Any) -> dict[str, str]:
    return {e.uri: found.classes[e.label] for e in [*found.train, *found.val, *found.test]}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_labels_are_read_from_the_table(tmp_path: Path, kind: str) -> None:
    found = read_labelled(str(write(tmp_path / "d", kind)), seed=0)
    assert labels(found) == {f"{tmp_path}/d/{row['file_name']}": row["label"] for row in ROWS}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_it_is_what_datasets_reads(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    for split, rows in (("train", ROWS[:6]), ("test", ROWS[6:])):
        write(tmp_path / "d" / split, kind, rows)
    found = read_labelled(str(tmp_path / "d"), seed=0)
    assert (len(found.train) + len(found.val), len(found.test)) == (6, 2)
    reference = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    expected = {
        row["image"]["path"]: row["label"]
        for split in reference.values()
        for row in split.cast_column("image", datasets.Image(decode=False))
    }
    assert labels(found) == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_gallery_takes_captions_from_the_table(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "d", kind)
    (folder / "img" / "other.jpg").write_bytes(picture("other"))
    (shard,) = gallery_shards(str(folder), "auto", None)
    captions = {record.uri.removeprefix(f"{folder}/"): record.caption for record in read_shard(shard)}
    assert captions == {**{row["file_name"]: row["text"] for row in ROWS}, "img/other.jpg": None}


def test_a_table_without_labels_leaves_them_to_the_class_folders(tmp_path: Path) -> None:
    rows = [{"file_name": f"{c}/{i}.jpg", "text": "x"} for c in ("cat", "dog") for i in range(4)]
    found = read_labelled(str(write(tmp_path / "d", "csv", rows)), seed=0)
    assert labels(found) == {f"{tmp_path}/d/{row['file_name']}": row["file_name"][:3] for row in rows}


def test_another_table_of_this_name_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "d", "csv", [{"file_name": f"{c}/{i}.jpg"} for c in ("cat", "dog") for i in range(4)])
    (tmp_path / "d" / "metadata.csv").write_text("year,country\n2020,FI\n")
    assert read_labelled(str(tmp_path / "d"), seed=0).classes == ["cat", "dog"]
    assert sum(shard.count or 0 for shard in gallery_shards(str(tmp_path / "d"), "auto", None)) == 8


def test_json_lines_are_lists_too(tmp_path: Path) -> None:
    path = write(tmp_path / "d", "jsonl") / "metadata.jsonl"
    moved = path.rename(path.with_name("list.jsonl"))
    assert len(labels(read_labelled(str(moved), seed=0))) == 8
    (shard,) = gallery_shards(str(moved), "auto", None)
    assert [record.caption for record in read_shard(shard)] == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "image,label\n0.jpg,cat\n", r"metadata\.csv' has no column file_name, only image, label"),
        ("metadata.csv", "file_name,label\n,cat\n", r"metadata\.csv' has no file_name in row 1"),
        ("metadata.csv", "file_name,label\n0.jpg,\n", r"has no label in row 1"),
        ("metadata.jsonl", '{"file_name": "0.jpg", "label"\n', r"metadata\.jsonl' cannot be read as JSON Lines"),
        ("metadata.jsonl", "", r"metadata\.jsonl' cannot be read as JSON Lines: it is empty"),
        ("metadata.parquet", "PAR1", r"metadata\.parquet' is not a complete Parquet file"),
        ("metadata.csv", "file_name,label\ngone.jpg,cat\n", r"None of the 1 images of list .* exists.*gone\.jpg"),
    ],
)
def test_a_damaged_table_says_what_is_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "0.jpg").write_bytes(picture("0"))
    (tmp_path / name).write_text(text)
    with pytest.raises(KtrayError, match=message):
        read_labelled(str(tmp_path), seed=0)


def test_two_tables_or_labels_for_one_split_only(tmp_path: Path) -> None:
    write(tmp_path / "train", "csv")
    write(tmp_path / "test", "csv", [{"file_name": "1.jpg", "text": "x"}])
    with pytest.raises(KtrayError, match=r"test/metadata\.csv' has no column with labels"):
        read_labelled(str(tmp_path), seed=0)
    write(tmp_path / "train", "jsonl")
    with pytest.raises(KtrayError, match="has several tables"):
        read_labelled(str(tmp_path), seed=0)
