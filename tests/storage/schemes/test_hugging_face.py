"""``hf://`` as a file system, and data sets of the hub as labelled images and as a gallery."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, FakeHub, fake_hub
from pictures import picture

from ktray.data import filesystem
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError

PETS = "hf://datasets/me/pets"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as found:
        yield found


def parquet(name: str, rows: int = 8, group: int = 4) -> bytes:
    """A file as ``datasets`` writes it: image structs, class numbers with names in the schema."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": picture(f"{name}{i}"), "path": f"{i}.jpg"} for i in range(rows)]
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    schema = pa.schema([("image", struct), ("label", pa.int64())]).with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    out = io.BytesIO()
    table = pa.table({"image": images, "label": [i % 2 for i in range(rows)]}, schema=schema)
    pq.write_table(table, out, row_group_size=group)
    return out.getvalue()


@pytest.fixture
def pets(hub: FakeHub) -> FakeHub:
    hub.files["datasets/me/pets"] = {
        "README.md": b"# Pets",
        "data/train-00000-of-00002.parquet": parquet("a"),
        "data/train-00001-of-00002.parquet": parquet("b"),
        "data/test-00000-of-00001.parquet": parquet("c", 4),
    }
    return hub


@pytest.mark.parametrize("place", ["", "/data", "@v1", f"@{COMMIT}/data/*.parquet"])
def test_a_data_set_is_read_with_its_classes_and_splits(pets: FakeHub, place: str) -> None:
    found = read_labelled(f"{PETS}{place}", seed=0)
    assert found.classes == ["cat", "dog"]
    assert (len(found.train) + len(found.val), len(found.test)) == (16, 4)
    assert Counter(e.label for e in found.test) == {0: 2, 1: 2}
    revision = place.partition("/")[0]
    assert all(e.uri.startswith(f"{PETS}{revision}/data/") for e in found.train)
    example = next(e for e in found.train if "train-00001" in e.uri)
    row = int(example.uri.rpartition("=")[2])
    assert list(fetch([example.uri])) == [(example.uri, picture(f"b{row}"), None)]
    assert example.label == row % 2


def test_a_gallery_is_read_in_ranges(pets: FakeHub) -> None:
    shards = gallery_shards(PETS, "auto", None)
    assert [shard.count for shard in shards] == [4, 8, 8]
    records = [record for shard in shards for record in read_shard(shard)]
    assert [record.data for record in records][:4] == [picture(f"c{i}") for i in range(4)]
    assert all(record.uri.startswith(PETS) for record in records)


def test_the_version_of_a_file_is_that_of_its_content(pets: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = filesystem.stat(f"{PETS}/README.md")
    same = filesystem.stat(f"{PETS}@v1/README.md")
    other = filesystem.stat(f"{PETS}/data/test-00000-of-00001.parquet")
    assert before is not None
    assert same is not None
    assert other is not None
    assert before.size == 6
    assert before.mtime_ns == same.mtime_ns
    assert other.mtime_ns not in (0, before.mtime_ns)


def test_class_folders_of_the_hub(hub: FakeHub) -> None:
    files = {f"train/{c}/{i}.jpg": picture(f"{c}{i}") for c in ("cat", "dog") for i in range(4)}
    hub.files["datasets/me/folders"] = files
    found = read_labelled("hf://datasets/me/folders", seed=0)
    uri = "hf://datasets/me/folders/train/dog/2.jpg"
    assert uri in {e.uri for e in [*found.train, *found.val, *found.test]}
    assert list(fetch([uri])) == [(uri, picture("dog2"), None)]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hf://datasets/me/gone", r"'hf://datasets/me/gone' does not exist\. Check the name, the revision .*HF_TOKEN"),
        (f"{PETS}@v9", r"'hf://datasets/me/pets@v9' does not exist\. Check the name, the revision"),
        (f"{PETS}/data/none.parquet", r"none\.parquet' does not exist\. Check the name"),
        (f"{PETS}/../other/x.parquet", "does not exist"),
        ("hf://user:secret@datasets/me/pets", r"is not the name of a bucket\. Use hf://datasets/ORG/NAME"),
    ],
)
def test_what_is_not_there_says_what_to_check(pets: FakeHub, place: str, message: str) -> None:
    with pytest.raises(KtrayError, match=message) as raised:
        read_labelled(place, seed=0)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_gated_data_set_names_its_terms(pets: FakeHub) -> None:
    pets.gated.add("datasets/me/pets")
    with pytest.raises(KtrayError, match=r"terms are not accepted|no permission"):
        read_labelled(PETS, seed=0)


def test_a_private_data_set_needs_the_token_which_no_message_shows(
    pets: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pets.files["datasets/me/private"] = pets.files["datasets/me/pets"]
    pets.closed.add("datasets/me/private")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(KtrayError, match="set HF_TOKEN") as raised:
        read_labelled("hf://datasets/me/private", seed=0)
    assert "hf_wrong" not in str(raised.value)
    pets.files["datasets/me/private2"] = pets.files["datasets/me/pets"]
    pets.closed.add("datasets/me/private2")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert read_labelled("hf://datasets/me/private2", seed=0).classes == ["cat", "dog"]


def test_a_damaged_file_of_the_hub(pets: FakeHub) -> None:
    pets.files["datasets/me/pets"]["data/train-00000-of-00002.parquet"] = parquet("a")[:-20]
    with pytest.raises(KtrayError, match=r"'hf://datasets/me/pets/data/train-00000.*' is not a complete Parquet file"):
        read_labelled(PETS, seed=0)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(KtrayError, match=r"'hf://datasets/me/pets' cannot be read: the hub does not give") as raised:
        read_labelled(PETS, seed=0)
    assert "\n" not in str(raised.value)


def test_nothing_is_written_to_the_hub(pets: FakeHub) -> None:
    with pytest.raises(OSError, match=r"export\.push"):
        filesystem.write_bytes(f"{PETS}/x.txt", b"")


def test_the_allowed_places_hold_for_the_hub(pets: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRAY_DATA_ROOTS", "hf://datasets/you")
    ((_, data, error),) = fetch([f"{PETS}/README.md"])
    assert data is None
    assert "outside of KTRAY_DATA_ROOTS" in str(error)
