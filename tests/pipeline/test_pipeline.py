"""The whole job on a small world: result, reuse, bad input, two workers, one clear line per error."""

import dataclasses
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from heard import heard
from PIL import Image
from results import check_result
from small_task import CLASSES, SMALL

import ktray
from ktray import cli
from ktray import recipe as recipes
from ktray.jobs.definitions import Job
from ktray.models.packaged import EFFICIENTNET_LITE
from ktray.models.student.classifier import build_student
from ktray.pipeline.run import run
from ktray.recipe.registries import TEACHERS
from ktray.stages.evaluate import stage as evaluate
from ktray.stages.manifests import MANIFESTS, StageManifest
from ktray.storage.store import Stage


def distil(store, *overrides, lines=None):
    return heard(lines if lines is not None else [], run, recipes.load(None, [f"store={store}", *SMALL, *overrides]))


@pytest.fixture(scope="module")
def world(zoo_world):
    return zoo_world


@pytest.fixture(scope="module")
def first(zoo_run):
    return zoo_run


def test_result_holds_the_contract_and_the_student_learned(first):
    store, _, result, _, _ = first
    on_disk = check_result("distill", store / "runs" / result["run_id"] / "result.json")
    assert on_disk == json.loads(json.dumps(result))
    assert result["metric"]["test_images"] == 45
    assert set(result["metric"]["per_class"]) == set(CLASSES)
    assert result["metric"]["test"] > 0.5  # chance is a third
    assert set(result["cost"]["flops"]) >= {
        "adapt", "index", "curate", "teach", "transfer", "finetune", "evaluate", "total",
    }  # fmt: skip
    flops = result["cost"]["flops"]
    assert flops["total"] == sum(v for k, v in flops.items() if k != "total")
    assert all(flops[s] > 0 for s in ("adapt", "index", "curate", "teach", "transfer", "finetune", "evaluate"))
    assert result["cost"]["without_cache"]["flops"] == flops["total"]
    assert result["label_budget"] == 15
    assert result["transfer_set"]["kept"] == 60


def test_manifests_hold_the_keys_that_their_types_name(first):
    store = first[0]
    common = StageManifest.__required_keys__
    found = {}
    for kind, manifest in MANIFESTS.items():
        for folder in (store / "stages" / kind).glob("*"):
            found[kind] = Stage(str(folder)).manifest().keys()
            assert manifest.__required_keys__ | common <= found[kind], kind
            assert found[kind] <= manifest.__required_keys__ | manifest.__optional_keys__ | common, kind
    # Those of test_several_teachers.py and test_suggest.py.
    assert found.keys() == MANIFESTS.keys() - {"ensemble", "suggest"}


def test_the_export_finds_its_student_and_images(first):
    from ktray.jobs.export.card import task_name
    from ktray.jobs.export.run_source import find

    store, _, result, _, _ = first
    source = find(recipes.load(None, [f"store={store}", f"export.run={result['run_id']}"]))
    task, student = source.task(), source.student()
    assert (len(task.train), len(task.val), len(task.test)) == (15, 18, 45)
    found = student.predict([Path(example.uri) for example in task.test])
    right = [one.label == task.classes[e.label] for one, e in zip(found, task.test, strict=True)]
    assert np.mean(right) == pytest.approx(result["metric"]["test"])
    assert (source.metric, task_name(source)) == ("top1", "task")


def test_flops_of_transfer_are_those_of_its_steps_and_validations(first):
    from ktray.models.flops import forward_flops, train_flops

    _, _, result, _, _ = first
    model = timm.create_model("test_resnet", num_classes=3, output_stride=16)
    steps = 60 * 32 * train_flops(model, (3, 32, 32))
    # 18 validation images, before the first step and after each twelfth of the steps (train.evals).
    validations = 18 * (1 + 12) * forward_flops(model, (3, 32, 32))
    assert result["cost"]["flops"]["transfer"] == pytest.approx(steps + validations, rel=1e-6)


def test_bad_images_are_quarantined_and_none_is_lost(first):
    store, _, result, _, zoo = first
    bad = {name for name, state in zoo.items() if state == "bad"}
    assert result["data"]["quarantined"] == len(bad)
    import pyarrow.parquet as pq

    listed = pq.read_table(store / "runs" / result["run_id"] / "quarantine.parquet").to_pylist()
    assert {Path(row["uri"]).name for row in listed} == {Path(name).name for name in bad}
    assert all(row["reason"] for row in listed)
    index = json.loads(next((store / "stages/index").glob("*/manifest.json")).read_text())
    assert index["rows"] == 120 + len(zoo) - len(bad)
    assert index["read"] == 120 + len(zoo)


def test_empty_class_is_told_and_names_survive(first):
    _, _, _, lines, _ = first
    assert any("empty class" in line for line in lines)


def test_student_loads_in_plain_timm_and_in_ktray(first, world):
    store, _, result, _, _ = first
    folder = store / "runs" / result["run_id"] / "student"
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = ktray.load_student(folder)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain(x), ours(x))
    picture = Image.open(next((world[0] / "task/test" / CLASSES[2]).iterdir()))
    assert ours.predict([picture])[0].label in CLASSES


def test_evaluation_agrees_with_the_students_own_predictions(first, world):
    store, _, result, _, _ = first
    student = ktray.load_student(store / "runs" / result["run_id"] / "student")
    right = n = 0
    for name in CLASSES:
        files = sorted((world[0] / "task/test" / name).iterdir())
        right += sum(p.label == name for p in student.predict(files))
        n += len(files)
    assert result["metric"]["test"] == pytest.approx(right / n)


def test_report_and_mlflow_tell_the_same(first):
    store, _, result, _, _ = first
    page = (store / "runs" / result["run_id"] / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "upright Ström" in page
    with sqlite3.connect(store / "mlflow.db") as db:
        metrics = dict(
            db.execute("select key, value from latest_metrics where run_uuid=?", [result["mlflow"]["run_id"]])
        )
        nested = db.execute("select count(*) from tags where key='mlflow.parentRunId'").fetchone()[0]
    assert metrics["test.top1"] == pytest.approx(result["metric"]["test"])
    assert metrics["cost.total_flops"] == pytest.approx(result["cost"]["flops"]["total"])
    assert nested >= 8


def test_the_same_recipe_again_reuses_every_stage(first):
    store, data, result, _, _ = first
    again = distil(store, *data, "train.steps=60")
    assert again["run_id"] != result["run_id"]
    assert all(stage["cached"] for stage in again["stages"])
    assert again["cost"]["flops"]["total"] == 0
    assert again["cost"]["without_cache"]["flops"] == result["cost"]["flops"]["total"]
    assert again["metric"] == result["metric"]
    # A saved recipe runs again as it is.
    saved = recipes.load(str(store / "runs" / result["run_id"] / "recipe.yaml"), [])
    assert run(saved)["metric"] == result["metric"]


def test_two_workers_learn_as_one_does_and_evaluation_is_exact(first, tmp_path):
    store, data, result, _, _ = first
    for name in ("labels", "adapt", "index", "curate", "teach"):
        shutil.copytree(store / "stages" / name, tmp_path / "stages" / name)
    two = distil(tmp_path, *data, "train.steps=60", "cluster.workers=2", "baselines.scratch=false")
    assert two["cluster"]["workers"] == 2
    assert two["metric"]["test_images"] == 45
    assert abs(two["metric"]["test"] - result["metric"]["test"]) < 0.3  # 45 images, another order of batches
    cached = {stage["name"]: stage["cached"] for stage in two["stages"]}
    assert cached["teach"]
    assert not cached["transfer"]
    # The same weights scored again, from other shards: the same logits.
    folder = next((store / "stages/evaluate").iterdir())
    rows = evaluate.load(Stage(str(folder)))
    assert len(set(rows["uri"].tolist())) == len(rows["uri"]) == 45
    assert float((rows["student"].argmax(1) == rows["label"]).mean()) == pytest.approx(result["metric"]["test"])


def test_scratch_needs_neither_teacher_nor_gallery(cluster, world, tmp_path):
    found = distil(tmp_path, f"task.data={world[0] / 'task'}", "objective.name=scratch", "train.steps=20")
    assert found["teacher"] is None
    assert "transfer_set" not in found
    assert found["cost"]["flops"]["teach"] == 0
    assert found["cost"]["flops"]["finetune"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.name=open_clip:ViT-B-33"], r"ViT-B-33.*ViT-B-32"),
        (["teacher.name=open_clip:ViT-B-32", "teacher.checkpoint=/nowhere/w.pt"], "nowhere"),
        (["student.name=mobilenetv3_smal_050"], "mobilenetv3_small_050"),
        (["student.kwargs={colour: red}"], "colour"),
        (["gallery.data=/nowhere"], "nowhere"),
        (["task.data=/nowhere"], "nowhere"),
        (["data.max_bad_fraction=0"], r"data\.max_bad_fraction"),
    ],
)
def test_mistakes_end_with_one_line(first, capsys, overrides, message):
    store, data, _, _, _ = first

    def job(recipe, debug):
        run(recipe)

    argv = [f"store={store}", *SMALL, *data, "train.steps=5", "teach.seed=9", *overrides]
    assert cli.main(Job("distill", "", job, lambda r, s: None), argv) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    import re

    assert re.search(message, err[0])
    assert "Traceback" not in err[0]


def test_one_class_is_refused_with_the_remedy(cluster, world, tmp_path, capsys):
    shutil.copytree(world[0] / "task/train" / CLASSES[0], tmp_path / "task" / CLASSES[0])
    with pytest.raises(ktray.errors.KtrayError, match="class"):
        distil(tmp_path / "store", f"task.data={tmp_path / 'task'}")


def test_the_published_teacher_without_a_network_says_what_to_do(cluster, world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for weights in EFFICIENTNET_LITE:  # as if their packages were not installed
        absent = dataclasses.replace(weights, module="no_such_package_of_weights")
        monkeypatch.setattr(TEACHERS.get(weights.name), "weights", absent)
    overrides = [f"store={tmp_path}", f"task.data={world[0] / 'task'}", f"gallery.data={world[0] / 'gallery'}"]
    found = recipes.load(None, overrides)
    with pytest.raises(ktray.errors.KtrayError, match=r"teacher\.checkpoint.*teacher\.name=miniverse"):
        run(found)


def test_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ktray.errors.KtrayError, match="store="):
        distil(tmp_path / "file")


def test_plan_counts_what_the_run_then_spends(first, world, capsys):
    from ktray.distributed.allocation import allocate
    from ktray.pipeline.plan_stages import lines
    from ktray.pipeline.resolve import resolve

    store, data, result, _, _ = first
    found = resolve(
        recipes.load(None, [f"store={store}", *SMALL, *data, "train.steps=60"]), allocate(2, 0, 1, 1, False)
    )
    planned = {line.stage: line.flops for line in lines(found)}
    spent = result["cost"]["flops"]
    assert planned["transfer"] == pytest.approx(spent["transfer"], rel=1e-6)
    assert planned["finetune"] == pytest.approx(spent["finetune"], rel=1e-6)
    assert planned["teach"] == pytest.approx(spent["teach"], rel=1e-6)
    assert planned["index"] == pytest.approx(spent["index"], rel=0.2)  # unusable images are planned for
    assert np.isclose(planned["evaluate"], spent["evaluate"], rtol=1e-6)


def test_a_run_tells_what_was_planned_and_leaves_its_speeds(first, capsys):
    store, _, result, _, _ = first
    plan, rows = result["plan"], {s["name"]: s for s in result["stages"]}
    assert {row["name"] for row in plan["stages"]} >= {"adapt", "index", "teach", "transfer", "finetune", "evaluate"}
    for row in plan["stages"]:
        own = [s for s in result["stages"] if s["name"] == row["name"]]  # LABELS runs for teacher and student
        assert row["seconds"] == pytest.approx(sum(s["wall_seconds"] for s in own))
        assert row["usd"] == pytest.approx(sum(s["usd"] for s in own))
        assert row["planned_seconds"] > 0 or row["name"] in ("curate", "labels")
    assert plan["usd"] == pytest.approx(sum(row["usd"] for row in plan["stages"]))
    (found,) = store.glob("speeds/transfer-*/*/*.json")
    measured = json.loads(found.read_text())["measured"]
    assert measured["images"] == 60 * 32
    assert measured["device_seconds"] == pytest.approx(rows["transfer"]["device_seconds"])
    assert {path.parts[-3].partition("-")[0] for path in store.glob("speeds/*/*/*.json")} >= {
        "labels", "adapt", "index", "curate", "teach", "transfer", "finetune", "hygiene", "evaluate",
    }  # fmt: skip
    (machine,) = result["cluster"]["machines"]
    assert rows["teach"]["usd"] == pytest.approx(rows["teach"]["device_seconds"] * machine["usd_per_hour"] / 3600)


def test_the_plan_of_the_same_run_has_stored_speeds_and_its_time(first):
    from ktray.accounting.device import describe_device
    from ktray.distributed.allocation import allocate
    from ktray.pipeline.estimate import PlannedDevice
    from ktray.pipeline.plan_work import PlannedWork
    from ktray.pipeline.resolve import resolve

    store, data, result, _, _ = first
    local = allocate(2, 0, 1, 1, False)
    resolved = resolve(recipes.load(None, [f"store={store}", *SMALL, *data, "train.steps=60"]), local)
    work = PlannedWork.of(resolved, local, gpus=False)
    assert not work.unknown
    found = work.on(PlannedDevice.of(resolved.recipe, describe_device()))
    assert {estimate.source for estimate in found.values()} == {"store"}
    # The runs of LABELS decode into other sizes, and training from scratch stops early. If other runs with this store
    # have measured the same stage, the plan is between them.
    alone = [row for row in result["stages"] if len(list(store.glob(f"speeds/{row['name']}-*/*/*.json"))) == 1]
    alone = [row for row in alone if row["name"] not in ("labels", "scratch")]
    assert len(alone) >= 4
    for row in alone:
        assert found[row["name"]].device_seconds == pytest.approx(row["device_seconds"], rel=0.25), row["name"]


@pytest.mark.parametrize("workers", [1, 2])
def test_agnostic_transfer_learns_and_trains_no_classifier(first, workers):
    store, data, _, _, _ = first
    lines: list[str] = []
    keys = ["objective.name=agnostic", "train.steps=61", f"seed={workers}", "baselines.scratch=false"]
    found = distil(store, *data, *keys, f"cluster.workers={workers}", lines=lines)
    assert found["metric"]["test"] > 0.5  # chance is a third
    assert found["teacher_metric"]["adapt"] == "probe"
    key = {s["name"]: s["key"] for s in found["stages"]}
    from safetensors.torch import load_file

    pretrained = load_file(str(store / "stages/transfer" / key["transfer"] / "weights.safetensors"))
    torch.manual_seed(workers)
    start = build_student("test_resnet", {"output_stride": 16}, len(CLASSES), 32).model.state_dict()
    assert torch.equal(pretrained["fc.weight"], start["fc.weight"])
    assert not torch.allclose(pretrained["conv1.0.weight"], start["conv1.0.weight"])
    # The linear probe that FINETUNE starts from stands at step 0 of its curve, well above chance.
    curve = Stage(str(store / "stages/finetune" / key["finetune"])).manifest()["curve"]
    assert curve[0]["step"] == 0
    assert curve[0]["val_top1"] > 0.4


def test_agnostic_without_finetuning_is_refused(first):
    store, data, _, _, _ = first
    with pytest.raises(ktray.errors.KtrayError, match=r"finetune\.steps"):
        distil(store, *data, "objective.name=agnostic", "finetune.steps=0")


def test_plan_tells_what_is_whole_and_writes_nothing(first):
    from ktray.pipeline.plan import show

    store, data, _, _, _ = first

    def states(*overrides):
        lines = []
        heard(lines, show, recipes.load(None, [f"store={store}", *SMALL, *data, "train.steps=60", *overrides]))
        rows = [line.split() for text in lines for line in text.splitlines()]
        return {r[0]: " ".join(r[1:3]) for r in rows if len(r) > 2 and r[0] in STAGES}

    before = sorted(store.rglob("*"))
    assert {n: s.split()[0] for n, s in states().items()} == dict.fromkeys(STAGES, "reused")
    changed = states("train.lr=0.002")
    assert changed["teach"].startswith("reused")
    assert {n for n, s in changed.items() if s == "to run"} == {"transfer", "finetune", "scratch", "evaluate"}
    assert {n for n, s in states("teach.seed=3").items() if s == "to run"} >= {"teach", "transfer", "evaluate"}
    assert sorted(store.rglob("*")) == before


STAGES = ["adapt", "index", "curate", "teach", "transfer", "finetune", "scratch", "evaluate"]
