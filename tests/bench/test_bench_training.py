"""Benches of ingest and training: they do what a run does, on a handful of images; no rate is asserted."""

import json

import pytest

from ktray import recipe as recipes
from ktray.bench import ingest, lesson, training
from ktray.bench.log import metric_name
from ktray.bench.runner import quick
from ktray.rows import read_rows

CASE = lesson.Case("test_resnet", 32, "miniverse", 8, 24, {"output_stride": 16})


@pytest.fixture(scope="module")
def made(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesson")
    return folder, lesson.ensure_lesson(CASE, folder, cluster)


def test_a_lesson_is_what_teach_stores(made, cluster):
    folder, one = made
    assert sum(rows for _, rows in one.shards) == 24
    rows = read_rows(one.stage, one.shards[0][0])
    assert rows["pixels"].shape == (24, 3, 32, 32)
    assert rows["logits"].shape == (24, lesson.CLASSES)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet") if "teach" in str(p)}
    lesson.ensure_lesson(CASE, folder, cluster)
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize("way", training.WAYS, ids=lambda way: way.name)
def test_training_goes_through_the_job_of_a_run(made, cluster, way):
    folder, one = made
    waits = []
    assert training.through_ktray(one, way, 4, cluster, folder, waits) > 0
    assert len(waits) == 1
    assert 0 <= waits[0] <= 1


def test_the_limit_and_the_peer_train_the_same_student(made, cluster):
    _, one = made
    assert training.bare(one, 4, cluster) > 0
    assert training._in_worker(training._timm_step, one, 4, cluster) > 0


def test_ingest_reads_every_image(made, cluster):
    _, one = made
    data = ingest.encoded(one)
    assert len(data) == len({uri for uri, _ in data}) == 24
    assert ingest.by_ray(one, cluster) > 0
    assert ingest.by_loader(one, data, 1) > 0
    assert ingest.cut(one, data) > 0
    assert ingest.decoded(data) > 0


def test_the_rate_is_that_of_the_second_half():
    curve = [{"step": 0, "seconds": 1.0}, {"step": 4, "seconds": 9.0}, {"step": 8, "seconds": 11.0}]
    assert training._second_half(curve, 16) == 4 * 16 / 2.0


def test_quick_is_less_of_the_same():
    recipe = recipes.load(None, ["bench.quick=true", "bench.only=[read]"])
    small = quick(recipe).bench
    assert (small.only, small.repeats) == (["read"], 1)
    assert small.images < recipe.bench.images
    assert small.vectors < recipe.bench.vectors


def test_names_are_such_as_mlflow_takes():
    assert metric_name("timm's distillation task, x at 3 px") == "timms distillation task x at 3 px"
    assert json.dumps(metric_name("embed, open_clip:ViT-B-32")) == '"embed open_clip:ViT-B-32"'
