"""Benchmarks measure what they say, on a few images and vectors; no rate is asserted."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from heard import heard
from PIL import Image
from results import check_result

from ktray import recipe as recipes
from ktray.accounting.device import describe_device, device_name
from ktray.data.preprocess import Preprocess
from ktray.data.sources.listing import list_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError
from ktray.jobs.bench import embedding, machine, reading, rows, searching
from ktray.jobs.bench.run import bench, keep_speed
from ktray.miniverse import photos as pictures
from ktray.retrieval import faiss_index
from ktray.stages.speed import measured_speeds
from ktray.stages.speed_facts import index_facts
from ktray.storage.store import Store

HALF = Preprocess(size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)


def test_the_ratio_is_the_median_of_the_turns():
    row = rows.BenchRow("work", "images/s", "bare", [100.0, 200.0, 50.0], [90.0, 100.0, 49.0])
    assert row.ratio == 0.9
    assert rows.markdown([row]).splitlines()[-1] == "| work | bare: 100 images/s | 90 images/s | 90% | 50% to 98% |"
    assert row.to_dict()["ratio"] == 0.9


def test_turns_alternate_after_one_that_is_not_counted():
    told = []
    limit, reached = rows.in_turns(lambda: told.append("limit") or 2.0, lambda: told.append("ours") or 1.0, 2)
    assert told == ["ours", "limit", "ours", "limit", "ours"]
    assert (limit, reached) == ([2.0, 2.0], [1.0, 1.0])

    rows.in_turns(lambda: told.append("limit") or 2.0, lambda: told.append("cold") or 1.0, 1, warm=False)
    assert told[5:] == ["limit", "cold"]


def test_pictures_are_as_large_as_photographs():
    data = pictures.jpeg(3)
    assert Image.open(io.BytesIO(data)).size == (500, 375)
    assert 45_000 < len(data) < 75_000
    assert pictures.jpeg(3) == data
    assert pictures.jpeg(4) != data


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return list_shards(pictures.ensure_tars(tmp_path_factory.mktemp("photos"), 24, a_tar=10))


def test_tars_hold_what_was_asked_for_and_stay(photos):
    assert [sum(1 for _ in read_shard(shard)) for shard in photos] == [10, 10, 4]
    path = Path(photos[0].paths[0])
    before = path.stat().st_mtime_ns
    pictures.ensure_tars(path.parent, 24, a_tar=10)
    assert path.stat().st_mtime_ns == before


def test_reading_reads_every_image(photos, cluster, monkeypatch):
    assert reading.bare(photos, HALF, 2) > 0
    began = time.perf_counter()
    rate = reading.through_ray(photos, HALF, cluster)
    assert 24 / rate <= time.perf_counter() - began


def test_embedding_writes_every_image_and_leaves_nothing(photos, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "SECONDS", 0.05)
    spec = embedding.encoder("timm:test_vit", tmp_path)
    weights = list(tmp_path.glob("*.safetensors"))
    assert embedding.encoder("timm:test_vit", tmp_path).fingerprint == spec.fingerprint
    row = embedding.embedding(photos, 24, spec, cluster, 1, 1, tmp_path)
    assert row.facts["dimensions"] == 64
    assert row.facts["flops_per_image"] > 1e6
    assert len(row.limit) == len(row.reached) == 1
    assert list(tmp_path.iterdir()) == weights


def test_searching_finds_what_brute_force_finds(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(searching, "PART_ROWS", 1000)
    monkeypatch.setattr(searching, "DIMENSIONS", 64)
    monkeypatch.setattr(faiss_index, "CODES", (8,))  # an OPQ rotation for 64 takes a minute
    monkeypatch.setattr(searching, "QUERIES", 20)
    monkeypatch.setattr(searching, "K", 10)
    gallery = searching.synthetic(tmp_path, 3500, cluster)
    everything = np.concatenate([block.embedding() for block in gallery.blocks()]).astype(np.float64)
    assert everything.shape == (3500, searching.DIMENSIONS)
    assert np.allclose(np.linalg.norm(everything, axis=1), 1, atol=1e-3)
    cosine = everything[:50] @ everything.T
    assert (np.sort(cosine, axis=1)[:, -10] > 0.3).all()  # neighbours are nearer than chance
    exact, compressed = searching.searching(tmp_path, 3500, cluster, 1, 1)
    assert exact.limit[0] > 0
    assert compressed.reached[0] > 0
    assert [row.name for row in searching.searching(tmp_path, 3500, cluster, 1, 1, True)] == [exact.name]
    assert 0.9 <= compressed.facts["recall_at_10"] <= 1
    assert compressed.facts["bytes_per_row"] >= 8


def test_peak_memory_counts_children(tmp_path):
    import subprocess
    import sys

    with machine.peak_memory(every=0.05) as alone:
        time.sleep(0.3)
    with machine.peak_memory(every=0.05) as both:
        code = "x = bytearray(300_000_000); import time; time.sleep(1)"
        subprocess.run([sys.executable, "-c", code], check=True)
    assert alone.bytes > 10_000_000
    assert both.bytes - alone.bytes > 250_000_000


def test_peak_memory_of_work_shorter_than_a_turn_is_known():
    with machine.peak_memory(every=3600) as peak:
        held = np.ones(300_000_000, np.uint8)
    assert peak.bytes > held.nbytes


def test_busy_cores_are_those_of_proc_stat(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 1000 5 0 0 0 0 0\ncpu0 1\n")

    def later(seconds):
        stat.write_text(f"cpu  {100 + machine._TICKS} 0 50 1100 5 0 0 0 0 0\n")

    clock = iter([0.0, 2.0])
    monkeypatch.setattr(machine.time, "sleep", later)
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    assert machine.busy_cores(2.0, stat) == 0.5
    assert machine.busy_cores(2.0, tmp_path / "none") is None


def test_the_job_leaves_a_table_and_a_result(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "SECONDS", 0.05)
    recipe = recipes.load(
        None,
        [
            f"store={tmp_path}",
            "bench.only=[embed]",
            "bench.encoders=[timm:test_vit]",
            "bench.images=8",
            "bench.repeats=2",
        ],
    )
    lines = []
    result = heard(lines, bench, recipe)
    folder = Path(result["folder"])
    assert {**check_result("bench", folder / "result.json"), "folder": str(folder)} == json.loads(json.dumps(result))
    row = result["rows"][0]
    assert min(row["reached"]) / max(row["limit"]) <= row["ratio"] <= max(row["reached"]) / min(row["limit"])
    assert "| embed, timm:test_vit | bare encoder:" in (folder / "bench.md").read_text()
    assert result["peak_memory_bytes"] > 0
    (kept,) = tmp_path.glob("speeds/index-*/*/*.bench.json")
    found = json.loads(kept.read_text())
    assert (found["facts"]["model"], found["facts"]["size"], found["facts"]["crops"]) == ("timm:test_vit", 160, None)
    rate = found["measured"]["images"] / found["measured"]["device_seconds"]
    assert rate == pytest.approx(np.median(row["reached"]))


def test_a_plan_finds_what_the_bench_measured(cluster, tmp_path):
    spec = embedding.encoder("timm:test_vit", tmp_path)
    own = {"stage": "index", **index_facts(spec, None)}
    row = rows.BenchRow(
        "embed", "images/s", "bare", [100.0] * 3, [50.0, 20.0, 40.0], stage=rows.StageSpeed(own, 80, 2.0)
    )
    assert "stage" not in row.to_dict()
    keep_speed(Store(str(tmp_path)), row, gpu=False)
    device = device_name(describe_device(), False)
    found = measured_speeds(Store(str(tmp_path))).known({**own, "device": device})
    assert (found.source, found.per_image) == ("bench", pytest.approx(2.0 / 40.0))
    keep_speed(Store(str(tmp_path)), rows.BenchRow("read", "images/s", "bare", [1.0], [1.0]), gpu=False)
    assert len(list(tmp_path.glob("speeds/*/*/*.json"))) == 1


def test_a_bench_needs_a_local_store():
    with pytest.raises(KtrayError, match="measures this machine"):
        bench(recipes.load(None, ["store=s3://nobody/nothing?endpoint_override=http://127.0.0.1:9"]))
