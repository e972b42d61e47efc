"""``gs://`` and ``az://`` against small servers that imitate them: listing, class folders, tables, what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_clouds import served
from pictures import picture

from ktray.data import filesystem
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError


@pytest.fixture(params=["gs", "az"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    root = tmp_path / "cloud"
    for split, number in (("train", 4), ("test", 2)):
        for label in ("cat", "große Hunde"):
            for i in range(number):
                path = root / "pets" / "photos" / split / label / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(f"{split}{label}{i}"))
    (root / "pets" / "tables").mkdir()
    images = pa.array([picture(f"p{i}") for i in range(6)])
    pq.write_table(pa.table({"image": images, "text": [f"no. {i}" for i in range(6)]}), root / "pets/tables/a.parquet")
    with served({"gs": "google", "az": "azure"}[request.param], root) as endpoint:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        monkeypatch.setenv("AZURE_STORAGE_BLOB_ENDPOINT", endpoint)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "devstore")
        monkeypatch.setenv("AZURE_STORAGE_KEY", "c2VjcmV0")
        yield f"{request.param}://pets"


def test_class_folders_and_splits(bucket: str) -> None:
    found = read_labelled(f"{bucket}/photos", seed=0)
    assert found.classes == ["cat", "große Hunde"]
    assert (len(found.train) + len(found.val), len(found.test)) == (8, 4)
    uri = f"{bucket}/photos/test/große Hunde/1.jpg"
    assert uri in {example.uri for example in found.test}
    assert list(fetch([uri])) == [(uri, picture("testgroße Hunde1"), None)]


def test_a_gallery_of_tables(bucket: str) -> None:
    (shard,) = gallery_shards(f"{bucket}/tables", "auto", None)
    records = list(read_shard(shard))
    assert [(r.data, r.caption) for r in records] == [(picture(f"p{i}"), f"no. {i}") for i in range(6)]
    assert filesystem.expand(f"{bucket}/tab*/*.parquet") == [f"{bucket}/tables/a.parquet"]


def test_what_is_missing(bucket: str) -> None:
    with pytest.raises(KtrayError, match=r"photos/gone' does not exist\. Check the (bucket|container) and"):
        read_labelled(f"{bucket}/photos/gone", seed=0)


def test_an_account_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(KtrayError, match=r"az://pets needs the name of a storage account.*AZURE_STORAGE_ACCOUNT"):
        read_labelled("az://pets/photos", seed=0)
