"""A run with two teachers: the student's targets are the weighted mean of their predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heard import heard
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.ensemble import EnsembleSpec, mix
from ktray.pipeline.finished_run import find_run
from ktray.pipeline.plan_stages import lines
from ktray.pipeline.resolve import resolve
from ktray.pipeline.run import run
from ktray.stages.manifests import MANIFESTS, StageManifest
from ktray.storage.columns import read_rows
from ktray.storage.store import Dir

OTHERS = "teacher.others=[{name: efficientnet-lite0, image_size: 48}]"
SHORT = ["train.steps=2", "finetune.steps=0", "baselines.scratch=false"]


@pytest.mark.slow
def test_a_student_learns_the_mean_of_two_teachers(cluster: Any, tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    store = tmp_path / "store"
    # The student's images are as large as the views, so that the stored pixels are what the teachers have seen.
    keys = [f"store={store}", f"task.data={tmp_path / 'task'}", *SMALL, *SHORT, OTHERS, "image_size=48"]
    result = heard([], run, recipes.load(None, keys))

    members = result["teacher_metric"]["members"]
    assert [m["teacher"] for m in members] == ["miniverse", "efficientnet-lite0"]
    assert sum(m["weight"] for m in members) == pytest.approx(1)
    (ensemble,) = (store / "stages/ensemble").iterdir()
    facts, manifest = (json.loads((ensemble / name).read_text()) for name in ("ensemble.json", "manifest.json"))
    assert result["teacher_metric"]["val"] == manifest["val"]
    kind = MANIFESTS["ensemble"]
    assert kind.__required_keys__ | StageManifest.__required_keys__ == manifest.keys()  # type: ignore[attr-defined]
    assert 0 <= result["teacher_metric"]["test"] <= 1

    # The stored targets are those of the mean, each teacher at its own size.
    (teach,) = (store / "stages/teach").iterdir()
    shard = json.loads((teach / "manifest.json").read_text())["shards"][0][0]
    rows = read_rows(Dir(str(teach)), shard, ["logits", "pixels"])
    assert json.loads((teach / "manifest.json").read_text())["view_size"] == 48
    towers = {}
    for stage in (store / "stages/adapt").iterdir():
        inputs = json.loads((stage / "manifest.json").read_text())
        teacher = AdaptedTeacher.load(stage / inputs["directory"])
        towers[teacher.source.name] = teacher
    pixels = torch.from_numpy(rows["pixels"].copy())
    logits = [towers[m["teacher"]].logits(pixels).detach() for m in members]
    expected = mix(logits, facts["weights"]) / facts["temperature"]
    stored = torch.from_numpy(rows["logits"].astype(np.float32)).softmax(1)
    torch.testing.assert_close(stored, expected.softmax(1), atol=2e-3, rtol=0)
    assert all(float((stored - one.softmax(1)).abs().max()) > 4e-3 for one in logits)

    # Another job finds it again.
    found = find_run(recipes.load(None, [f"store={store}", f"predict.run={result['run_id']}"]), "predict").teacher()
    assert isinstance(found, EnsembleSpec)
    assert [member.load().source.name for member in found.members] == [m["teacher"] for m in members]
    assert found.directory.uri == str(ensemble)

    # A second run reuses all of it.
    again = heard([], run, recipes.load(None, keys))
    assert again["teacher_metric"] == result["teacher_metric"]


def test_the_plan_counts_every_teacher(cluster: Any, tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    write_gallery(tmp_path / "gallery")
    keys = [
        f"task.data={tmp_path / 'task'}",
        f"gallery.data={tmp_path / 'gallery'}",
        *SMALL,
        *SHORT,
        "teach.mode=cached",
    ]

    def flops(*more: str) -> dict[str, float]:
        return {line.stage: line.flops for line in lines(resolve(recipes.load(None, [*keys, *more]), cluster))}

    one, other, both = flops(), flops("teacher.name=efficientnet-lite0", "teacher.image_size=48"), flops(OTHERS)
    assert both["teach"] == one["teach"] + other["teach"]
    assert both["index"] == one["index"]  # teacher.name alone retrieves
    assert both["adapt"] > one["adapt"] + other["adapt"]
    assert both["transfer"] == one["transfer"]


def test_an_objective_without_predictions_has_one_teacher(cluster: Any, tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    recipe = recipes.load(None, [f"task.data={tmp_path / 'task'}", *SMALL, OTHERS, "objective.name=agnostic"])
    resolved = resolve(recipe, cluster)
    assert resolved.recipe.teacher.others == []
    assert any("teacher.others" in reason for reason in resolved.reasons)


def test_others_may_be_names_alone() -> None:
    recipe = recipes.load(None, ["teacher.others=[miniverse, {name: efficientnet-lite0, image_size: 96}]"])
    assert [(other.name, other.image_size) for other in recipe.teacher.others] == [
        ("miniverse", None),
        ("efficientnet-lite0", 96),
    ]
    assert [other.name for other in recipes.load(None, ["teacher.others=miniverse"]).teacher.others] == ["miniverse"]
