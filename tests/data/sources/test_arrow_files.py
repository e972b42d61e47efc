"""Folders of ``save_to_disk``, written by ``datasets`` where it is installed, and Arrow files written by pyarrow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pictures import picture

from ktray.data.labelled.read import read_labelled
from ktray.data.sources import arrow_files
from ktray.data.sources.fetch import fetch
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.data.sources.uris import ImageRef
from ktray.errors import KtrayError

FEATURES = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(name: str, rows: int) -> pa.Table:
    schema = pa.schema([("image", STRUCT), ("label", pa.int64()), ("text", pa.string())])
    images = [{"bytes": picture(f"{name}{i}"), "path": None} for i in range(rows)]
    columns = {"image": images, "label": [i % 2 for i in range(rows)], "text": [f"{name}-{i}" for i in range(rows)]}
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.table(columns, schema=schema.with_metadata(metadata))


def write_saved(folder: Path, name: str, rows: int) -> Path:
    """A folder in the layout of ``Dataset.save_to_disk``, with two files."""
    folder.mkdir(parents=True)
    files = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    whole = table(name, rows)
    for part, file in zip((whole[: rows // 2], whole[rows // 2 :]), files, strict=True):
        with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": f} for f in files]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


def every(found: Any) -> dict[str, str]:
    return {e.uri: found.classes[e.label] for e in [*found.train, *found.val, *found.test]}


def test_what_datasets_saves_is_read_as_it_saved_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = []
    for i in range(12):
        files.append(tmp_path / f"{i}.png")
        files[-1].write_bytes(picture(str(i), "PNG"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    whole = datasets.Dataset.from_dict({"image": [str(f) for f in files], "label": [0, 1] * 6}, features=features)
    parts = {"train": whole.select(range(10)).shuffle(seed=1), "test": whole.select([10, 11])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    for file in files:
        file.unlink()  # the saved data has the images themselves
    found = read_labelled(str(tmp_path / "saved"), seed=0)
    assert found.classes == ["cat", "dog"]
    assert (len(found.train) + len(found.val), len(found.test)) == (10, 2)
    reference = datasets.load_from_disk(tmp_path / "saved")
    classes = {
        row["image"]["bytes"]: found.classes[row["label"]]
        for split in reference.values()
        for row in split.cast_column("image", datasets.Image(decode=False))
    }
    labels = every(found)
    assert {data: labels[uri] for uri, data, _ in fetch(list(labels))} == classes
    shards = gallery_shards(str(tmp_path / "saved" / "train"), "auto", None)
    assert {record.data for shard in shards for record in read_shard(shard)} < set(classes)


def test_a_saved_data_set_with_splits(tmp_path: Path) -> None:
    for split, rows in (("train", 8), ("validation", 2), ("test", 4)):
        write_saved(tmp_path / "d" / split, split, rows)
    (tmp_path / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    found = read_labelled(str(tmp_path / "d"), seed=0)
    assert [len(part) for part in (found.train, found.val, found.test)] == [8, 2, 4]
    labels = every(found)
    for number, name in enumerate(("cat", "dog")):
        uri = f"{tmp_path}/d/test/data-00001-of-00002.arrow#record={number}"
        assert labels[uri] == name
        assert list(fetch([uri])) == [(uri, picture(f"test{number + 2}"), None)]


def test_a_gallery_has_captions_and_is_divided_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_saved(tmp_path / "d", "x", 10)
    shards = gallery_shards(str(folder), "auto", None)
    assert [shard.count for shard in shards] == [5, 5]
    records = [record for shard in shards for record in read_shard(shard)]
    assert [(r.data, r.caption) for r in records] == [(picture(f"x{i}"), f"x-{i}") for i in range(10)]
    assert [ref.kind for r in records for ref in (ImageRef.parse(r.uri),)] == ["arrow"] * 10


def test_files_with_a_footer_are_read_as_well(tmp_path: Path) -> None:
    whole = table("f", 6)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=4)
    found = read_labelled(str(tmp_path / "a.arrow"), seed=0)
    assert len(every(found)) == 6
    uri = f"{tmp_path}/a.arrow#record=5"
    assert list(fetch([uri])) == [(uri, picture("f5"), None)]


def test_rows_before_the_damage_are_used(tmp_path: Path) -> None:
    folder = write_saved(tmp_path / "d", "x", 12)
    shards = gallery_shards(str(folder), "auto", None)
    damaged = folder / "data-00001-of-00002.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1200])
    records = [record for shard in shards for record in read_shard(shard)]
    assert [r.error is None for r in records][:8] == [True] * 8
    assert "broken Arrow file" in str(records[-1].error)
    with pytest.raises(KtrayError, match=r"data-00001-of-00002\.arrow' is not a complete Arrow file.*Write it again"):
        read_labelled(str(folder), seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "state.json").write_text("{"), r"state\.json' cannot be read"),
        (lambda d: (d / "state.json").write_text("[]"), r"state\.json' is not an object"),
        (lambda d: (d / "state.json").write_text("{}"), r"state\.json' has no list of files"),
        (lambda d: (d / "data-00000-of-00002.arrow").unlink(), r"lists '.*data-00000.*', which does not exist"),
        (lambda d: (d / "dataset_dict.json").write_text("{}"), r"dataset_dict\.json' lists no splits"),
        (
            lambda d: (d / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}'),
            "saved as a selection of rows",
        ),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(tmp_path: Path, change: Any, message: str) -> None:
    folder = write_saved(tmp_path / "d", "x", 4)
    change(folder)
    with pytest.raises(KtrayError, match=message):
        read_labelled(str(folder), seed=0)


def test_a_row_that_is_gone_is_reported(tmp_path: Path) -> None:
    write_saved(tmp_path / "d", "x", 4)
    ((_, data, error),) = fetch([f"{tmp_path}/d/data-00000-of-00002.arrow#record=9"])
    assert data is None
    assert "row 9 does not exist" in str(error)


def test_the_memory_map_obeys_the_allowed_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_saved(tmp_path / "d", "x", 4)
    monkeypatch.setenv("KTRAY_DATA_ROOTS", "/nowhere")
    with pytest.raises(OSError, match="outside of KTRAY_DATA_ROOTS"):
        arrow_files.ArrowSource().footer(f"{tmp_path}/d/data-00000-of-00002.arrow")
