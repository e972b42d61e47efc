"""The training of low-rank products: what is saved, resumed by name, and merged, in the loop that workers run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from small_task import picture
from torch import nn

from ktray.data.views import ViewPolicy
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import load_teacher
from ktray.recipe.teacher import TeacherLoraConfig
from ktray.storage.columns import write_rows
from ktray.storage.store import Dir
from ktray.tasks.base import task_kind
from ktray.training.adapt_program import AdaptSpec
from ktray.training.inputs import Labels
from ktray.training.loop import Trainer, TrainerCallbacks, TrainerSettings
from ktray.training.worker import WorkerContext


def test_products_and_head_are_trained_and_merged(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    size = load_teacher("miniverse").preprocess.size[0]
    for split, count in (("train", 24), ("val", 9)):
        label = np.arange(count) % 3
        pixels = np.stack([np.asarray(picture(k, rng, size, size)).transpose(2, 0, 1) for k in label])
        write_rows(
            Dir(str(tmp_path / "labels")),
            f"{split}-00000.parquet",
            {"canvas": pixels, "pixels": pixels, "label": label.astype(np.int64)},
        )
    base = load_teacher("miniverse")
    start = AdaptedTeacher(base, LinearHead(torch.zeros(3, base.embed_dim)), ["a", "b", "c"])
    start.save(tmp_path / "start")
    part = TeacherLoraConfig(steps=12, batch_size=12, rank=2, lr=0.01, head_lr=0.1, ema=0.0)
    settings = TrainerSettings.of(part, warmup=0.1, clip=1.0, seed=3, evals=2, keep="best")
    labels = Labels(Dir(str(tmp_path / "labels")), task_kind("classification"))
    job = AdaptSpec(settings, Dir(str(tmp_path / "start")), labels, ViewPolicy(), part, "top1")
    program = job.build(WorkerContext(torch.device("cpu"), 0, 1, 1.0))
    saved: list[Path] = []
    names = iter(range(100))

    def folder() -> Path:
        path = tmp_path / f"checkpoint-{next(names)}"
        path.mkdir()
        return path

    def save(path: Path | None, metrics: object, last: bool) -> None:
        assert path is not None
        saved.append(path)

    curve = Trainer(program, settings, TrainerCallbacks(save, lambda message: None, folder)).run().curve
    trained = program.model
    assert isinstance(trained, AdaptedTeacher)
    frozen = {n for n, p in trained.named_parameters() if not p.requires_grad}
    original = load_teacher("miniverse").image_tower.state_dict()
    for name in frozen:
        place = name.removeprefix("image_tower.").replace("parametrizations.", "").replace(".original", "")
        assert torch.equal(trained.state_dict()[name], original[place]), name
    assert curve[-1]["val_top1"] > 0.5  # chance is a third, and the head was zero

    fresh = AdaptedTeacher.load(tmp_path / "start")
    job.prepare(fresh)
    fresh.load_state_dict(load_file(str(saved[-1] / "weights.safetensors")))
    pixels, _ = labels.load("val", "pixels")
    with torch.inference_mode():
        before = fresh.logits(pixels)
    job.complete(fresh)
    fresh.save(tmp_path / "done")
    with torch.inference_mode():
        assert torch.equal(fresh.logits(pixels), before)
        assert torch.equal(AdaptedTeacher.load(tmp_path / "done").logits(pixels), before)
        assert not torch.allclose(AdaptedTeacher.load(tmp_path / "start").embed(pixels), fresh.embed(pixels))
    changed = {n for n, v in fresh.image_tower.state_dict().items() if not torch.equal(v, original[n])}
    # This ConvNeXt has 1 x 1 convolutions in its MLPs, and a linear projection.
    layers = {n: m for n, m in base.image_tower.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    flat = {f"{n}.weight" for n, m in layers.items() if isinstance(m, nn.Linear) or m.kernel_size == (1, 1)}
    assert changed == flat
    for name in changed:
        difference = (fresh.image_tower.state_dict()[name] - original[name]).flatten(1).double()
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2
