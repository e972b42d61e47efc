"""ADAPT with LoRA: an ordinary adapted teacher comes out, and an interrupted attempt repeats no finished training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from heard import heard
from safetensors.torch import load_file
from small_task import SMALL, write_task
from torch import nn

from ktray import recipe as recipes
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.load import load_teacher
from ktray.pipeline.run import run

KEYS = [
    *SMALL,
    "teacher.adapt=auto",
    "teacher.candidates=[finetune, lora]",
    "teacher.finetune.steps=1",
    "teacher.finetune.lr=1e-9",
    "teacher.finetune.head_lr=1e-9",
    "teacher.lora.steps=6",
    "teacher.lora.rank=2",
    "teacher.lora.lr=0.01",
    "teacher.lora.batch_size=16",
    "train.steps=2",
    "finetune.steps=1",
    "baselines.scratch=false",
]


def distil(folder: Path, *keys: str) -> dict[str, Any]:
    base = [f"store={folder / 'store'}", f"task.data={folder / 'task'}", *KEYS, *keys]
    return heard([], run, recipes.load(None, base))


@pytest.mark.slow
def test_lora_ends_in_an_ordinary_teacher_and_resumes(cluster: Any, tmp_path: Path) -> None:
    write_task(tmp_path / "task", train=8)
    first = distil(tmp_path, "teacher.adapt=lora")
    assert first["teacher_metric"]["adapt"] == "lora"
    (stage,) = (tmp_path / "store/stages/adapt").iterdir()
    folder = stage / "candidate-lora"
    tower = load_teacher("miniverse").image_tower
    state, base = load_file(str(folder / "tower.safetensors")), tower.state_dict()
    assert set(state) == set(base)  # nothing of LoRA is left
    changed = {name for name in base if not torch.equal(state[name], base[name])}
    # This ConvNeXt has 1 x 1 convolutions in its MLPs, and a linear projection.
    layers = {n: m for n, m in tower.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    flat = {f"{n}.weight" for n, m in layers.items() if isinstance(m, nn.Linear) or m.kernel_size == (1, 1)}
    assert changed == flat
    for name in changed:
        assert torch.linalg.matrix_rank((state[name] - base[name]).flatten(1).double(), rtol=1e-3) <= 2
    teacher = AdaptedTeacher.load(folder)
    assert teacher.temperature == json.loads((folder / "scores.json").read_text())["temperature"]
    assert not (stage / "training-lora").exists()
    assert not (stage / "train").exists()

    # An attempt that died after the training is not trained again.
    (stage / "manifest.json").unlink()
    (folder / "scores.json").write_text((folder / "scores.json").read_text())
    before = (folder / "tower.safetensors").stat().st_mtime_ns
    second = distil(tmp_path, "teacher.adapt=lora")
    assert second["teacher_metric"] == first["teacher_metric"]
    assert (folder / "tower.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_both_trainings_in_one_stage_have_checkpoints_of_their_own(cluster: Any, tmp_path: Path) -> None:
    write_task(tmp_path / "task", train=8)
    distil(tmp_path, "teacher.adapt=lora")
    (stage,) = (tmp_path / "store/stages/adapt").iterdir()
    alone = scores_of(stage)["lora"]["loss"]
    both = distil(tmp_path)
    (other,) = set((tmp_path / "store/stages/adapt").iterdir()) - {stage}
    assert {"finetune", "lora"} <= set(scores_of(other))
    assert scores_of(other)["lora"]["loss"] == pytest.approx(alone, rel=1e-4)
    assert both["teacher_metric"]["adapt"] in ("finetune", "lora")


def scores_of(stage: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((stage / "manifest.json").read_text())["scores"]
    return scores
