"""Benches of ingest and training: they do what a run does, on a handful of images; no rate is asserted."""

import json
import os
import time
from pathlib import Path

import pytest

from ktray import recipe as recipes
from ktray.jobs.bench import ingest, lesson, machine, memory, reuse, startup, training, workers
from ktray.jobs.bench.mlflow import metric_name
from ktray.jobs.bench.run import quick
from ktray.storage.columns import read_rows

CASE = lesson.Case("test_resnet", 32, "miniverse", 8, 24, {"output_stride": 16})


@pytest.fixture(scope="module")
def targets(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesson")
    return folder, lesson.ensure_targets(CASE, folder, cluster)


def test_a_lesson_is_what_teach_stores(targets, cluster):
    folder, one = targets
    assert sum(rows for _, rows in one.shards) == 24
    rows = read_rows(one.stage, one.shards[0][0])
    assert rows["pixels"].shape == (24, 3, 32, 32)
    assert rows["logits"].shape == (24, lesson.CLASSES)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet") if "teach" in str(p)}
    lesson.ensure_targets(CASE, folder, cluster)
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize("variant", training.VARIANTS, ids=lambda variant: variant.name)
def test_training_goes_through_the_job_of_a_run(targets, cluster, variant):
    folder, one = targets
    waits = []
    assert training.through_ktray(one, variant, 4, cluster, folder, waits) > 0
    assert len(waits) == 1
    assert 0 <= waits[0] <= 1


def test_the_limit_and_the_peer_train_the_same_student(targets, cluster):
    _, one = targets
    assert training.bare(one, 4, cluster) > 0
    assert training.on_device(training.timm_step, one, 4, cluster) > 0


def test_ingest_reads_every_image(targets, cluster, tmp_path):
    _, one = targets
    data = ingest.encoded(one)
    assert len(data) == len({uri for uri, _ in data}) == 24
    paths = ingest.loose(data, tmp_path)
    assert [Path(path).read_bytes() for path in paths] == [content for _, content in data]
    assert ingest.by_ray(one, cluster) > 0
    assert ingest.by_loader(one, paths, 1) > 0
    assert ingest.cut(one, data) > 0
    assert ingest.decoded(one, data) > 0


def test_a_killed_worker_is_followed_by_another(targets, cluster):
    folder, one = targets
    marker = folder / "killed"
    assert workers.undisturbed(one, 4, cluster, folder) > 0
    assert not marker.exists()
    assert workers.killed(one, 4, cluster, folder) > 0
    assert marker.exists()


def test_a_start_is_told_by_part(targets, cluster, monkeypatch, capsys):
    folder, _ = targets
    monkeypatch.setattr(startup, "CASES", {startup.CASE: CASE})
    startup.main([str(folder), repr(time.time() - 5), "16"])
    parts = json.loads(capsys.readouterr().out)
    assert list(parts) == ["imports", "Ray", "first batch", "4 steps, evaluation and checkpoint"]
    assert parts["imports"] >= 5
    assert 0 < parts["first batch"] < 60


def test_a_set_is_read_as_often_as_it_takes(targets, cluster, monkeypatch, capsys):
    folder, _ = targets
    monkeypatch.setattr(memory, "CASES", {memory.CASE: CASE})
    monkeypatch.setattr(memory, "STORE_BYTES", 50_000)
    memory.main([str(folder)])
    found = json.loads(capsys.readouterr().out)
    assert found["read"] >= 10 * 50_000
    assert found["rows"] % 24 == 0
    assert found["spilled"] == 0


def test_memory_is_that_of_processes_that_were_there_all_the_time():
    samples = [(0.0, {1: 9}), (1.0, {1: 10, 2: 5}), (2.0, {1: 20, 3: 7}), (3.0, {1: 99})]
    assert memory._between(samples, 1.0, 2.0) == {1: 15.0}
    assert memory._between(samples, 5.0, 6.0) == {}
    assert os.getpid() in machine.held_by_process(os.getpid())


def test_what_stored_targets_save_is_counted_over_the_trials():
    teach, student, live = 40.0, 10.0, 20.0  # of a trial: a live teacher costs 20 where storing once costs 40
    cached = reuse.Sweep([5 + teach + student, student], [30.0, 10.0], [0.5, 0.7], teach)
    other = reuse.Sweep([5 + live + student, live + student], [20.0, 20.0], [0.6, 0.7], 0.0)
    compute, seconds = reuse.compared("a pair", cached, other)
    assert compute.ratio == pytest.approx((5 + 2 * 30) / (5 + 40 + 20))
    assert seconds.ratio == 1.0
    assert compute.facts["stored targets pay off after epochs"] == pytest.approx(40 / (20 / reuse.EPOCHS))
    assert compute.facts["difference, mean over trials"] == pytest.approx(-0.05)


@pytest.mark.parametrize("pair", reuse.PAIRS, ids=lambda pair: pair.name)
def test_recipes_of_a_sweep_differ_in_the_mode_alone(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "ensure_gallery", lambda folder: folder / "gallery")
    one, other = (reuse.recipe(pair, mode, tmp_path, tmp_path, 64).model_dump() for mode in ("cached", "live"))
    assert (one["teach"].pop("mode"), other["teach"].pop("mode")) == ("cached", "live")
    assert one == other
    assert one["train"]["steps"] == 10
    for keys in reuse.TRIALS:
        recipes.override(reuse.recipe(pair, "live", tmp_path, tmp_path, 64), keys)
    assert len({str(keys) for keys in reuse.TRIALS}) == 8


def test_the_rate_is_that_of_the_second_half():
    curve = [{"step": 0, "seconds": 1.0}, {"step": 4, "seconds": 9.0}, {"step": 8, "seconds": 11.0}]
    assert training.second_half(curve, 16) == 4 * 16 / 2.0


def test_quick_is_less_of_the_same():
    recipe = recipes.load(None, ["bench.quick=true", "bench.only=[read]"])
    small = quick(recipe).bench
    assert (small.only, small.repeats) == (["read"], 1)
    assert small.images < recipe.bench.images
    assert small.vectors < recipe.bench.vectors


def test_names_are_such_as_mlflow_takes():
    assert metric_name("timm's distillation task, x at 3 px") == "timms distillation task x at 3 px"
    assert json.dumps(metric_name("embed, open_clip:ViT-B-32")) == '"embed open_clip:ViT-B-32"'
