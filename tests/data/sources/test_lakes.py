"""Tables of Delta Lake and of Iceberg, written by deltalake and pyiceberg themselves."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pictures import picture

from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError


def columns(name: str, rows: int, split: str = "train") -> pa.Table:
    return pa.table(
        {
            "image": pa.array([picture(f"{name}{i}") for i in range(rows)], pa.binary()),
            "label": [("cat", "dog")[i % 2] for i in range(rows)],
            "split": [split] * rows,
        }
    )


def write_delta(folder: Path, table: pa.Table, **options: Any) -> str:
    deltalake = pytest.importorskip("deltalake")
    deltalake.write_deltalake(str(folder), table, **options)
    return str(folder)


def write_iceberg(folder: Path, *tables: pa.Table) -> Any:
    sql = pytest.importorskip("pyiceberg.catalog.sql")
    pytest.importorskip("sqlalchemy")
    folder.mkdir(parents=True)
    catalog = sql.SqlCatalog("local", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}")
    catalog.create_namespace("n")
    table = catalog.create_table("n.t", schema=tables[0].schema)
    for part in tables:
        table.append(part)
    return table


def images(place: str) -> set[bytes | None]:
    return {record.data for shard in gallery_shards(place, "auto", None) for record in read_shard(shard)}


def test_the_newest_version_of_a_delta_table(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    place = write_delta(tmp_path / "t", columns("old", 4))
    write_delta(tmp_path / "t", columns("new", 4), mode="overwrite")
    write_delta(tmp_path / "t", columns("more", 2), mode="append")
    assert images(place) == {picture(f"new{i}") for i in range(4)} | {picture(f"more{i}") for i in range(2)}
    deltalake.DeltaTable(place).delete("label = 'dog'")
    assert images(place) == {picture("new0"), picture("new2"), picture("more0")}


def test_labels_of_a_delta_table_with_partitions(tmp_path: Path) -> None:
    table = pa.concat_tables([columns("a", 8), columns("b", 4, "test")])
    found = read_labelled(write_delta(tmp_path / "t", table, partition_by=["split", "label"]), seed=0)
    assert (len(found.train) + len(found.val), len(found.test)) == (8, 4)
    expected = {picture(f"b{i}"): ("cat", "dog")[i % 2] for i in range(4)}
    classes = {e.uri: found.classes[e.label] for e in found.test}
    assert {data: classes[uri] for uri, data, _ in fetch(list(classes))} == expected


def rewrite(place: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the actions of the first version of a table."""
    log = Path(place) / "_delta_log" / "00000000000000000000.json"
    actions = [change(json.loads(line)) for line in log.read_text().splitlines()]
    log.write_text("\n".join(json.dumps(action) for action in actions))


def test_a_delta_table_with_other_names_in_its_files_is_refused(tmp_path: Path) -> None:
    place = write_delta(tmp_path / "t", columns("a", 4))

    def mapped(action: dict[str, Any]) -> dict[str, Any]:
        if "metaData" in action:
            action["metaData"]["configuration"]["delta.columnMapping.mode"] = "name"
        return action

    rewrite(place, mapped)
    with pytest.raises(KtrayError, match=r"other names in its files \(column mapping name\)|cannot be read as a table"):
        gallery_shards(place, "auto", None)


Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def z85(data: bytes) -> str:
    """Base 85 as in ZeroMQ's RFC 32, which Delta Lake uses for deletion vectors in its log."""
    text = ""
    for (number,) in struct.iter_unpack(">I", data):
        text += "".join(Z85[number // 85**power % 85] for power in (4, 3, 2, 1, 0))
    return text


def test_a_delta_table_with_rows_that_are_only_marked_as_deleted_is_refused(tmp_path: Path) -> None:
    bitmaps = pytest.importorskip("pyroaring")
    place = write_delta(tmp_path / "t", columns("a", 4))
    rows = bitmaps.BitMap([1]).serialize()
    vector = struct.pack("<IQI", 1681511377, 1, 0) + rows  # magic number, one bitmap, its high bits
    size = len(vector)
    vector += bytes(-size % 4)
    deleted = {"storageType": "i", "pathOrInlineDv": z85(vector), "sizeInBytes": size, "cardinality": 1}
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}

    def marked(action: dict[str, Any]) -> dict[str, Any]:
        if "protocol" in action:
            return {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}}
        if "add" in action:
            action["add"]["deletionVector"] = deleted
        return action

    rewrite(place, marked)
    with pytest.raises(KtrayError, match=r"has deletion vectors.*Rewrite these files"):
        gallery_shards(place, "auto", None)


def test_the_current_snapshot_of_an_iceberg_table(tmp_path: Path) -> None:
    table = write_iceberg(tmp_path / "w", columns("a", 8), columns("b", 4, "test"))
    place = str(tmp_path / "w" / "n" / "t")
    assert images(place) == {picture(f"a{i}") for i in range(8)} | {picture(f"b{i}") for i in range(4)}
    found = read_labelled(place, seed=0)
    assert (len(found.train) + len(found.val), len(found.test)) == (8, 4)
    table.delete("label == 'dog'")
    assert images(place) == {picture(f"a{i}") for i in range(0, 8, 2)} | {picture(f"b{i}") for i in range(0, 4, 2)}
    metadata = tmp_path / "w" / "n" / "t" / "metadata"
    first = sorted(path.name for path in metadata.glob("00002-*.metadata.json"))[0]
    (metadata / "version-hint.text").write_text(first.removesuffix(".metadata.json"))
    assert len(images(place)) == 12


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "delta",
            lambda t: [p.write_text("{") for p in (t / "_delta_log").glob("*.json")],
            r"cannot be read as a table of Delta Lake.*Restore",
        ),
        (
            "delta",
            lambda t: [p.unlink() for p in t.glob("*.parquet")],
            r"1 of the 1 files of the table .* do not exist",
        ),
        (
            "iceberg",
            lambda t: [p.write_text("{}") for p in (t / "metadata").glob("*.json")],
            r"metadata\.json' cannot be read as metadata of Iceberg.*Restore",
        ),
        (
            "iceberg",
            lambda t: shutil.rmtree(t / "data"),
            r"1 of the 1 files of the table .* do not exist.*absolute paths",
        ),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path: Path, kind: str, change: Callable[[Path], Any], message: str) -> None:
    place = tmp_path / "w" / "n" / "t"
    if kind == "delta":
        write_delta(place, columns("a", 4))
    else:
        write_iceberg(tmp_path / "w", columns("a", 4))
    change(place)
    with pytest.raises(KtrayError, match=message) as raised:
        gallery_shards(str(place), "auto", None)
    assert "\n" not in str(raised.value)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d" / "_delta_log").mkdir(parents=True)
    (tmp_path / "i" / "metadata").mkdir(parents=True)
    (tmp_path / "i" / "metadata" / "v1.metadata.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "deltalake", None)
    monkeypatch.setitem(sys.modules, "pyiceberg.table", None)
    for name, extra in (("d", "delta"), ("i", "iceberg")):
        with pytest.raises(KtrayError, match=rf"is not installed.*pip install 'ktray\[{extra}\]'"):
            gallery_shards(str(tmp_path / name), "auto", None)
