"""What training reads: neither workers, nor shards, nor restarts change which views an image gets."""

from collections import Counter

import numpy as np
import pytest
import torch

from ktray.data.augment import random_views
from ktray.data.views import ViewPolicy
from ktray.recipe.schema import TrainConfig
from ktray.storage.columns import write_rows
from ktray.storage.store import Dir
from ktray.tasks.base import task_kind
from ktray.training import inputs
from ktray.training.inputs import Labels, TargetSet
from ktray.training.worker import WorkerContext

ROWS, SIDE, SEED = 30, 16, 5
POLICY = ViewPolicy(scale=(0.3, 1.0), hflip=0.5, brightness=0.3, contrast=0.3, saturation=0.3)


def env(rank=0, world=1):
    return WorkerContext(torch.device("cpu"), rank, world, 1.0)


def pictures():
    return np.random.default_rng(0).integers(0, 256, (ROWS, 3, SIDE, SIDE), dtype=np.uint8)


def cache(folder, cuts, order):
    """The same rows, cut into shards at ``cuts``, in another order."""
    directory = Dir(str(folder))
    pixels, ids = pictures()[order], np.arange(ROWS, dtype=np.int64)[order] + 1000
    shards = []
    for number, (first, last) in enumerate(zip([0, *cuts], [*cuts, ROWS], strict=True)):
        name = f"{number:05d}.parquet"
        write_rows(directory, name, {"pixels": pixels[first:last], "view_id": ids[first:last]})
        shards.append((name, last - first))
    return TargetSet(directory, tuple(shards), 3 * SIDE**2, ())


def crops(cache, world, starts, window_bytes=1 << 30):
    """Every (image, visit) and its crops, of two epochs, over all ranks; training stops and restarts at ``starts``."""
    part = TrainConfig(resident_bytes=0 if window_bytes < 1 << 30 else 1 << 30, window_bytes=window_bytes)
    found: dict[tuple[int, int], bytes] = {}
    count: Counter[int] = Counter()
    batch = 5
    steps = 2 * ROWS // (batch * world)
    seen = []
    for rank in range(world):
        for first, last in zip([0, *starts], [*starts, steps], strict=True):
            for step, rows in enumerate(cache.batches(part, env(rank, world), batch, SEED, first, last), first):
                seen.append((step, rank, rows))
    # In another epoch, an image may belong to another rank.
    for _, _, rows in sorted(seen, key=lambda entry: entry[:2]):
        views = random_views(rows["pixels"], POLICY, rows["view_key"], salt=1)
        for pixels, view in zip(rows["pixels"].numpy(), views.numpy(), strict=True):
            image = int((pictures() == pixels).all((1, 2, 3)).argmax())
            found[image, count[image]] = view.tobytes()
            count[image] += 1
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return crops(cache(tmp_path_factory.mktemp("one"), [], np.arange(ROWS)), 1, [])


def test_two_visits_of_an_image_differ(reference):
    assert set(reference) == {(image, visit) for image in range(ROWS) for visit in (0, 1)}
    assert all(reference[image, 0] != reference[image, 1] for image in range(ROWS))


@pytest.mark.parametrize(
    ("cuts", "shuffled", "world", "starts", "window_bytes"),
    [
        ([10, 20], False, 1, [], 1 << 30),
        ([7], True, 1, [3, 8], 1 << 30),
        ([10, 20], True, 2, [1], 1 << 30),
        ([6, 12, 18, 24], False, 3, [], 1 << 30),
        ([3, 6, 9, 12, 15, 18, 21, 24, 27], True, 2, [2, 5], 1 << 30),
        ([10, 20], True, 2, [2], 8 * 3 * SIDE**2),
    ],
)
def test_order_of_workers_shards_and_restarts_does_not_matter(
    tmp_path, reference, cluster, cuts, shuffled, world, starts, window_bytes
):
    order = np.random.default_rng(1).permutation(ROWS) if shuffled else np.arange(ROWS)
    assert crops(cache(tmp_path, cuts, order), world, starts, window_bytes) == reference


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_labelled_images_beyond_the_memory_are_mapped_and_give_the_same_batches(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("KTRAY_CACHE", str(tmp_path / "copies"))
    directory, rng = Dir(str(tmp_path / "labels")), np.random.default_rng(3)
    for number, rows in enumerate(np.array_split(np.arange(ROWS), 4)):
        columns = {"canvas": pictures()[rows], "label": rows.astype(np.int64)}
        columns["canvas_mask"] = rng.integers(0, 3, (len(rows), SIDE, SIDE), dtype=np.uint8)
        write_rows(directory, f"train-{number:05d}.parquet", columns)

    def batches(version):
        labels = Labels(directory, task_kind(kind), version)
        return [
            {name: value.numpy() for name, value in rows.items()}
            for rows in labels.batches(env(), 7, POLICY, SIDE, SEED, 0, 9)
        ]

    reference = batches("")
    monkeypatch.setattr(inputs, "_RESIDENT", 4000)
    for _ in range(2):
        for found, expected in zip(batches("1"), reference, strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value)
        directory.delete("train-00000.parquet")  # the second time, only the mapped files are read
    assert len(list((tmp_path / "copies").rglob("*.npy"))) == 2


@pytest.mark.parametrize("world", [1, 2, 3])
def test_labelled_images_get_the_same_views_by_any_number_of_workers(tmp_path, world):
    columns = {"canvas": pictures(), "label": np.arange(ROWS, dtype=np.int64)}
    write_rows(Dir(str(tmp_path)), "train-00000.parquet", columns)
    labels = Labels(Dir(str(tmp_path)), task_kind("classification"))

    def views(world):
        found = {}
        count: Counter[int] = Counter()
        for rank in range(world):
            batches = labels.batches(env(rank, world), 5, POLICY, SIDE, SEED, 0, 2 * ROWS // (5 * world))
            for rows in batches:
                for label, view in zip(rows["label"].tolist(), rows["images"].numpy(), strict=True):
                    found[label, count[label]] = view.tobytes()
                    count[label] += 1
        return found

    assert len(views(1)) == 2 * ROWS
    assert views(world) == views(1)
