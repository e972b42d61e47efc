"""Labelled data in tables: separators and encodings of CSV, and Parquet as Hugging Face, Spark and pandas write it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import picture

from ktray.data.labelled.list_columns import ListColumns
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.csv_lists import CsvTable
from ktray.data.sources.fetch import fetch
from ktray.data.sources.listing import list_shards
from ktray.errors import KtrayError

ROWS = [(f"x/{i:03d}.jpg", "a, b" if i % 2 else "c") for i in range(8)]


def csv_text(separator: str, quote: bool = True, end: str = "\n", names: tuple[str, str] = ("path", "label")) -> str:
    rows = [names, *ROWS]
    cells = [[f'"{cell}"' if quote else cell for cell in row] for row in rows]
    return end.join(separator.join(row) for row in cells) + end


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("comma", csv_text(",").encode()),
        ("semicolon of Excel", b"\xef\xbb\xbf" + csv_text(";", end="\r\n", names=("Path", "Label")).encode()),
        ("tab", csv_text("\t", quote=False).encode()),
        ("bar", csv_text("|", quote=False).encode()),
        ("UTF-16", csv_text(";").encode("utf-16")),
        ("other names", csv_text(",", names=("file_name", "class")).encode()),
        ("spaces and empty lines", csv_text(", ").replace("\n", "\n\n").encode()),
        ("Excel's line with the separator", b"sep=;\r\n" + csv_text(";", end="\r\n").encode()),
        ("line ends of old Macs", csv_text(",", end="\r").encode()),
        ("backslashes of Windows", csv_text(",").replace("/", chr(92)).encode()),
        ("trailing separators", csv_text(",").replace("\n", ",,\n").encode()),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_separators_and_encodings(
    tmp_path: Path, put: Callable[..., None], name: str, data: bytes, suffix: str
) -> None:
    put("x", 8)
    (tmp_path / f"l{suffix}").write_bytes(data)
    found = read_labelled(str(tmp_path / f"l{suffix}"), seed=0)
    assert found.classes == ["a, b", "c"]
    assert len(found.train) + len(found.val) + len(found.test) == 8


def test_text_in_another_encoding_says_so(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("path,label\nx/ü.jpg,a\n".encode("latin-1"))
    with pytest.raises(KtrayError, match=r"not CSV in UTF-8.*Save it as CSV in UTF-8"):
        read_labelled(str(tmp_path / "l.csv"), seed=0)


def test_a_long_list_is_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktray.data import filesystem

    monkeypatch.setattr(filesystem, "MAX_FILE_BYTES", 1000)  # the limit of images is not one of lists
    (tmp_path / "l.csv").write_text("path,text\n" + "".join(f"/x/{i}.jpg,t\n" for i in range(5000)))
    assert sum(1 for _ in CsvTable.open(str(tmp_path / "l.csv")).rows(["path"])) == 5000
    assert sum(shard.count or 0 for shard in list_shards(str(tmp_path / "l.csv"))) == 5000


def hugging_face(
    path: Path, number: int, start: int = 0, names: tuple[str, ...] = ("cat", "dog"), label: str = "label"
) -> None:
    """A file as `datasets` writes it: image structs, class numbers, names in the metadata of the schema."""
    features = {"image": {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": [
                {"bytes": picture(f"hf {i}", "PNG"), "path": f"/photos/of/author/{i}.png"}
                for i in range(start, start + number)
            ],
            label: pa.array([i % len(names) for i in range(start, start + number)], pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.mark.parametrize("place", ["data", ".", "plain_text"])
@pytest.mark.parametrize("named", ["root", "folder", "pattern"])
def test_a_data_set_of_hugging_face(tmp_path: Path, place: str, named: str) -> None:
    root = tmp_path / "set"
    for i, split in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test")):
        hugging_face(root / place / f"{split}.parquet", 6, 6 * i)
    (root / "README.md").write_text("# a data set")
    data = {"root": root, "folder": root / place, "pattern": root / place / "*.parquet"}[named]
    found = read_labelled(str(data), seed=0)
    assert found.classes == ["cat", "dog"]
    assert (len(found.train), len(found.val), len(found.test)) == (12, 6, 6)
    assert all(error is None for _, _, error in fetch([e.uri for e in found.train]))
    assert not [note for note in found.notes if "ignored" in note or "missing" in note]


@pytest.mark.parametrize("named", ["root", "pattern"])
def test_a_shard_that_was_not_copied_is_named(tmp_path: Path, named: str) -> None:
    hugging_face(tmp_path / "data/train-00000-of-00002.parquet", 12)
    hugging_face(tmp_path / "data/test-00000-of-00001.parquet", 6, 12)
    found = read_labelled(str(tmp_path if named == "root" else tmp_path / "data/*.parquet"), seed=0)
    missing = [note for note in found.notes if "missing" in note]
    assert missing == [f"WARNING: 1 of 2 shards are missing in '{tmp_path}/data': train-00001-of-00002.parquet."]


def test_splits_as_folders_of_parquet(tmp_path: Path) -> None:
    for i, split in enumerate(("train", "validation", "test")):
        hugging_face(tmp_path / split / "0000.parquet", 6, 6 * i)
    found = read_labelled(str(tmp_path), seed=0)
    assert (len(found.train), len(found.val), len(found.test)) == (6, 6, 6)


def test_several_configurations_are_not_mixed(tmp_path: Path) -> None:
    hugging_face(tmp_path / "small/train-0.parquet", 4)
    hugging_face(tmp_path / "large/train-0.parquet", 4)
    with pytest.raises(KtrayError, match=r"Parquet files in 2 folders: 'large', 'small'.*Set task\.data to one"):
        read_labelled(str(tmp_path), seed=0)


def test_test_images_without_labels(tmp_path: Path) -> None:
    hugging_face(tmp_path / "data/train-0.parquet", 12)
    path = tmp_path / "data/test-0.parquet"
    hugging_face(path, 4, 12)
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "label", pa.array([-1] * 4)), path)
    found = read_labelled(str(tmp_path), seed=0)
    assert len(found.train) + len(found.val) + len(found.test) == 12
    assert any("4 rows" in note and "no label (-1)" in note for note in found.notes)


def test_a_file_that_names_no_split_among_others(tmp_path: Path) -> None:
    hugging_face(tmp_path / "data/train-0.parquet", 4)
    hugging_face(tmp_path / "data/extra.parquet", 4, 4)
    with pytest.raises(KtrayError, match=r"extra\.parquet' begins with no split"):
        read_labelled(str(tmp_path), seed=0)


def test_images_have_priority_over_the_paths_of_their_author(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [{"bytes": picture(str(i)), "path": None} for i in range(10)],
            "path": [f"/photos/of/author/{i}.png" for i in range(10)],
            "label": [i % 2 for i in range(10)],
        }
    )
    pq.write_table(table, tmp_path / "l.parquet")
    found = read_labelled(str(tmp_path / "l.parquet"), seed=0)
    uris = [e.uri for e in [*found.train, *found.val, *found.test]]
    assert len(uris) == 10
    assert all(error is None for _, _, error in fetch(uris))
    (tmp_path / "moved").mkdir()
    (tmp_path / "l.parquet").rename(tmp_path / "moved/l.parquet")
    again = read_labelled(str(tmp_path / "moved/l.parquet"), seed=0)  # the draw does not depend on the place
    assert [e.uri.rpartition("#")[2] for e in again.test] == [e.uri.rpartition("#")[2] for e in found.test]


def test_text_columns_without_a_type(tmp_path: Path, put: Callable[..., None]) -> None:
    """Spark writes text as bytes."""
    put("x", 8)
    table = pa.table({"path": [p.encode() for p, _ in ROWS], "label": [label.encode() for _, label in ROWS]})
    pq.write_table(table, tmp_path / "l.parquet")
    assert Counter(read_labelled(str(tmp_path / "l.parquet"), seed=0).classes) == Counter(["a, b", "c"])
    assert sum(shard.count or 0 for shard in list_shards(str(tmp_path / "l.parquet"))) == 8


def test_a_column_that_may_be_a_group_is_told(tmp_path: Path, put: Callable[..., None]) -> None:
    put("x", 12)
    text = "path,label,lesion_id\n" + "".join(f"x/{i:03d}.jpg,{'ab'[i % 2]},L{i // 3}\n" for i in range(12))
    (tmp_path / "l.csv").write_text(text)
    found = read_labelled(str(tmp_path / "l.csv"), seed=0)
    assert any("task.group=lesion_id" in note for note in found.notes)
    grouped = read_labelled(str(tmp_path / "l.csv"), seed=0, columns=ListColumns(group="lesion_id"))
    assert not any("may name images that belong together" in note for note in grouped.notes)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_the_recipe_may_name_the_column_of_the_labels(tmp_path: Path, put: Callable[..., None], form: str) -> None:
    """As of HAM10000 (dx), or the coarse classes of CIFAR-100, whose fine ones are in another column."""
    put("x", 12)
    columns = {
        "path": [f"x/{i:03d}.jpg" for i in range(12)],
        "fine_label": [f"f{i % 4}" for i in range(12)],
        "coarse_label": [f"c{i % 2}" for i in range(12)],
        "dx": ["abc"[i % 3] for i in range(12)],
    }
    path = tmp_path / f"l.{form}"
    if form == "csv":
        rows = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(rows))
    else:
        pq.write_table(pa.table(columns), path)

    def classes(label: str | None) -> tuple[list[str], list[str]]:
        found = read_labelled(str(path), seed=0, columns=ListColumns(label))
        return found.classes, found.notes

    fine, notes = classes(None)
    assert fine == ["f0", "f1", "f2", "f3"]
    assert f"The column 'fine_label' of 'l.{form}' has the labels; task.label=coarse_label takes another." in notes
    coarse, notes = classes("Coarse_Label")
    assert coarse == ["c0", "c1"]
    assert not any("has the labels" in note for note in notes)
    assert classes("dx")[0] == ["a", "b", "c"]
    with pytest.raises(KtrayError, match=r"no column 'corse_label' \(task\.label\). Is 'coarse_label' meant\?"):
        classes("corse_label")
    with pytest.raises(KtrayError, match=r"no column 'kind' \(task\.label\). It has the columns path, fine_label"):
        classes("kind")


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK\3\4")
    with pytest.raises(KtrayError, match=r"'.*photos.zip' is an archive. Unpack it"):
        read_labelled(str(tmp_path / "photos.zip"), seed=0)


def test_a_backslash_in_a_name_is_kept(tmp_path: Path, put: Callable[..., None]) -> None:
    put("x", 8)
    (tmp_path / "x" / "000.jpg").rename(tmp_path / "x\\000.jpg")
    (tmp_path / "l.csv").write_text(csv_text(",").replace("x/000", "x\\000"))
    found = read_labelled(str(tmp_path / "l.csv"), seed=0)
    assert len(found.train) + len(found.val) + len(found.test) == 8
