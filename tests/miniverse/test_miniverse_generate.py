"""Galleries and tasks on disk: layout, shares, no overlap, idempotence, concurrency, failure."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ktray.errors import KtrayError
from ktray.miniverse import WORLD_VERSION, ensure_gallery, ensure_generic_labels, ensure_task, generate
from ktray.miniverse.vocabulary import SUBJECTS
from ktray.miniverse.world import sample

Bytes = dict[str, bytes]


def _files(folder: Path) -> Bytes:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tasks")
    return {name: ensure_task(root, name) for name in ("letters", "digits")}


_DRAW = """
import sys
from ktray.distributed.termination import handle_sigterm
from ktray.miniverse import ensure_gallery
if __name__ == "__main__":
    handle_sigterm()
    try:
        ensure_gallery(sys.argv[1], images=10**7)
    except KeyboardInterrupt:
        sys.exit(4)
"""


def test_an_interrupt_ends_the_drawing_at_once(tmp_path: Path) -> None:
    (tmp_path / "draw.py").write_text(_DRAW)
    command = [sys.executable, str(tmp_path / "draw.py"), str(tmp_path / "new")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as job:
        assert job.stderr is not None
        while not list(tmp_path.glob("new/**/*.tar")):
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.1)
        job.terminate()
        # Without an end of the processes, it would draw 5,000 shards, or at least end those that were begun.
        assert job.wait(60) == 4
        assert job.stderr.read() == ""
    assert not list(tmp_path.glob("new/*"))


def test_gallery_is_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "SHARD_IMAGES", 40)
    folder = ensure_gallery(tmp_path / "new", images=100)
    shards = sorted(folder.iterdir())
    assert [shard.name for shard in shards] == [f"gallery-{i:05d}.tar" for i in range(3)]
    keys: list[str] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            assert names[0::2] == [name.replace(".txt", ".jpg") for name in names[1::2]]
            for name in names[0::2]:
                stem = name.removesuffix(".jpg")
                keys.append(stem)
                drawn = sample("gallery", int(stem))
                image_file, text_file = tar.extractfile(name), tar.extractfile(f"{stem}.txt")
                assert image_file is not None
                assert text_file is not None
                image = Image.open(io.BytesIO(image_file.read()))
                assert (image.format, image.size) == ("JPEG", (32, 32))
                # JPEG is lossy: close to the drawn picture, and to no other.
                assert np.abs(np.asarray(image, dtype=float) - drawn.image).mean() < 12
                assert text_file.read().decode() == drawn.caption
    assert keys == [f"{i:06d}" for i in range(100)]


def test_letters_layout(tasks: dict[str, Path]) -> None:
    folder = tasks["letters"]
    about = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    assert about["name"] == "letters"
    assert about["classes"] == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert about["class_names"]["K"] == "capital letter K"
    assert about["image_size"] == 32
    assert all("{}" in prompt for prompt in about["prompts"])
    for split, each in {"train": about["labels_per_class"], "val": 10, "test": 100}.items():
        assert sorted(p.name for p in (folder / split).iterdir()) == about["classes"]
        for label in about["classes"]:
            assert len(list((folder / split / label).glob("*.png"))) == each
    image = np.asarray(Image.open(folder / "test" / "C" / "00002.png"))
    assert np.array_equal(image, sample("letters-test", 2).image)


def test_digits_are_the_real_scans(tasks: dict[str, Path]) -> None:
    from sklearn.datasets import load_digits

    folder = tasks["digits"]
    counts = {split: len(list((folder / split).rglob("*.png"))) for split in ("train", "val", "test")}
    assert counts == {"train": 100, "val": 100, "test": 1597}
    scans = load_digits()
    known = {
        (255 - np.round(scan * 255 / 16)).astype(int).tobytes(): t
        for scan, t in zip(scans.images, scans.target, strict=True)
    }
    assert len(known) > 1700
    image = Image.open(next((folder / "test" / "3").glob("*.png")))
    assert (image.mode, image.size) == ("RGB", (32, 32))
    small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
    threes = [255 - scan * 255 / 16 for scan, t in zip(scans.images, scans.target, strict=True) if t == 3]
    assert min(np.abs(small - three).mean() for three in threes) < 12


def test_splits_and_gallery_share_no_image(tasks: dict[str, Path]) -> None:
    for folder in tasks.values():
        by_split = {
            split: {p.read_bytes() for p in (folder / split).rglob("*.png")} for split in ("train", "val", "test")
        }
        assert min(map(len, by_split.values())) > 20
        assert not by_split["train"] & by_split["val"]
        assert not (by_split["train"] | by_split["val"]) & by_split["test"]
    drawn = {np.asarray(Image.open(p)).tobytes() for folder in tasks.values() for p in folder.rglob("*.png")}
    streams = ("gallery", "pretrain", "generic-labelled")
    others = {sample(stream, i).image.tobytes() for stream in streams for i in range(700)}
    assert len(others) == 2100
    assert not drawn & others


def test_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_gallery(tmp_path, images=10)
    assert WORLD_VERSION in first.name
    before = _files(first)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(generate, "sample", refuse)
        assert ensure_gallery(tmp_path, images=10) == first
    assert _files(ensure_gallery(tmp_path / "elsewhere", images=10)) == before
    monkeypatch.setattr(generate, "WORLD_VERSION", "other")
    assert ensure_gallery(tmp_path, images=10) != first


def test_concurrent_callers_get_one_whole_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: ensure_gallery(tmp_path, images=60), range(4)))
    assert len(folders) == 1
    assert [p.name for p in tmp_path.iterdir()] == [folders.pop().name]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate, "_add", full)
    with pytest.raises(KtrayError, match="No space left on device"):
        ensure_gallery(tmp_path, images=10)
    assert list(tmp_path.iterdir()) == []


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KtrayError, match="store"):
        ensure_gallery(tmp_path / "file", images=10)


def test_generic_labels_are_read_and_leave_out_the_task(tmp_path: Path) -> None:
    from ktray.data.labelled.read import read_labelled

    file = ensure_generic_labels(tmp_path, "letters", images=250)
    assert ensure_generic_labels(tmp_path, "letters", images=250) == file
    found = read_labelled(str(file), seed=0)
    assert len(found.train) + len(found.val) + len(found.test) == 250
    names = {s.name for kind, subjects in SUBJECTS.items() if kind not in ("capital", "text") for s in subjects}
    assert set(found.classes) <= names
    assert len(found.classes) > 40
    rows = pq.read_table(file).to_pylist()
    image = Image.open(io.BytesIO(rows[0]["image"]))
    assert (image.format, image.size) == ("JPEG", (32, 32))
    kept = [drawn for drawn in (sample("generic-labelled", i) for i in range(60)) if drawn.subject.kind != "capital"]
    for row, drawn in zip(rows, kept, strict=False):
        assert row["label"] == drawn.subject.name
        assert np.abs(np.asarray(Image.open(io.BytesIO(row["image"])), dtype=float) - drawn.image).mean() < 12
    others = ensure_generic_labels(tmp_path, "marks", images=60)
    labels = {row["label"] for row in pq.read_table(others).to_pylist()}
    assert any(label.startswith("capital") for label in labels)
    assert not labels & {s.name for s in SUBJECTS["sign"]}
    with pytest.raises(KtrayError, match="no built-in task 'mark'"):
        ensure_generic_labels(tmp_path, "mark")


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(KtrayError, match=r"no built-in task 'leters'.*letters, digits"):
        ensure_task(tmp_path, "leters")
