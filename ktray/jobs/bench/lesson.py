"""A transfer set of photo-like JPEGs, a teacher and a student, as in TEACH and TRANSFER, to measure training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktray.data.decode import MAX_PIXELS
from ktray.data.sources.listing import list_shards
from ktray.data.sources.shards import read_shard
from ktray.data.views import ViewPolicy
from ktray.distributed.allocation import Allocation
from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import map_shards
from ktray.jobs.bench.embedding import encoder
from ktray.miniverse.photos import ensure_tars
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.spec import AdaptedSpec
from ktray.recipe.choice import default_objective
from ktray.recipe.schema import TaskConfig, TrainConfig
from ktray.stages.teach.shards import ListImages, WithTeacher
from ktray.storage.columns import write_rows
from ktray.storage.store import Dir, Stage, Store
from ktray.targets.make_views import MakeViews
from ktray.targets.predict import Predict
from ktray.tasks.base import task_kind
from ktray.training.inputs import Labels, StudentSpec, TargetSet
from ktray.training.loop import TrainerSettings
from ktray.training.programs import TransferSpec

CLASSES = 20
KIND = task_kind(TaskConfig().kind)
SHARD = 128


@dataclass(frozen=True)
class Case:
    """A student and a teacher with their sizes.

    Attributes:
        images: number of images in the transfer set.
        batch: number of images in a step.
        large: whether the teacher takes most of the time of a step in which it runs.
    """

    student: str
    size: int
    teacher: str
    batch: int
    images: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    large: bool = False

    @property
    def name(self) -> str:
        return f"{self.student} at {self.size} px"


CASES = {
    "mobilenetv3_small_050": Case("mobilenetv3_small_050", 224, "timm:vit_small_patch16_224", 32, 768, large=True),
    "miniverse": Case("mobilenetv3_small_050", 32, "miniverse", 128, 3072),
}


# A quick bench has this many times fewer images and steps.
FEWER = 4


def less(case: Case) -> Case:
    """Return the case with a part of its images."""
    return replace(case, images=case.images // FEWER)


@dataclass(frozen=True)
class BenchTargets:
    """The stored and listed rows of a case."""

    case: Case
    home: Dir
    stage: Stage
    shards: tuple[tuple[str, int], ...]
    cut: MakeViews
    predict: Predict
    jpeg: int | None = None

    def target_set(self, mode: str) -> TargetSet:
        """Return the transfer set in a mode of ``teach.mode``."""
        size = self.cut.size if mode == "live" else self.case.size
        cut, predict = (None, None) if mode == "cached" else (self.cut, self.predict)
        row, jpeg = 3 * size**2 + 2 * CLASSES + 16, mode == "cached" and self.jpeg is not None
        return TargetSet(self.stage, self.shards, row, ("logits",), mode, cut, predict, jpeg=jpeg)

    @property
    def student(self) -> StudentSpec:
        return StudentSpec(KIND, self.case.student, self.case.kwargs, CLASSES, self.case.size)

    def job(self, mode: str, steps: int, part: TrainConfig) -> TransferSpec:
        """Return TRANSFER's job. It is evaluated twice on eight images, at half of the steps and at the end, so that
        its curve contains the seconds of the second half."""
        return TransferSpec(
            TrainerSettings(steps, 1e-3, 0.05, 0.1, 0.99, 1.0, 0, evals=2, checkpoint_seconds=1e6),
            self.student,
            self.target_set(mode),
            Labels(self.home.sub("labels"), KIND),
            ViewPolicy(),
            0,
            default_objective(),
            part,
            "top1",
            self.home.sub("precision"),
        )


def ensure_targets(case: Case, folder: Path, plan: Allocation, jpeg: int | None = None) -> BenchTargets:
    """Return the case's transfer set under ``folder``; if it does not exist, TEACH's own code writes it.

    Args:
        jpeg: JPEG quality of the stored views; None: raw pixels.
    """
    spec = encoder(case.teacher, folder)
    home = folder / f"lesson-{case.student}-{case.size}"
    if not (home / "adapted").exists():
        teacher = spec.tower().cpu()
        torch.manual_seed(0)
        head = LinearHead(torch.randn(CLASSES, teacher.embed_dim))
        AdaptedTeacher(teacher, head, [f"class {i}" for i in range(CLASSES)], 0.1).save(home / "adapted")
    view = max(case.size, *spec.preprocess.size)
    cut = MakeViews(ViewPolicy(), 1, 0, view, MAX_PIXELS, None)
    predict = Predict(AdaptedSpec(Dir(str(home / "adapted")), spec.preprocess), ("logits",), case.size, 0)
    shards = list_shards(ensure_tars(folder / "photos", case.images))
    uris = [record.uri for shard in shards for record in read_shard(shard)][: case.images]
    stage = Store(str(home)).stage("teach" if jpeg is None else f"teach-jpeg-{jpeg}", f"{case.images:016d}")
    items: list[Item] = [
        {"name": f"{first // SHARD:05d}.parquet", "uris": uris[first : first + SHARD], "beside": {}}
        for first in range(0, len(uris), SHARD)
    ]
    rows = {item["name"]: ListImages(stage, 1)(item) for item in items}
    todo = [item for item in items if not stage.exists(f"{item['name']}.json")]
    for _ in map_shards(todo, cut, WithTeacher(stage, predict, jpeg), plan):
        pass
    labels = Dir(str(home / "labels"))
    write_rows(
        labels,
        "val-00000.parquet",
        {"pixels": np.zeros((8, 3, case.size, case.size), np.uint8), "label": np.arange(8)},
    )
    return BenchTargets(case, Dir(str(home)), stage, tuple(rows.items()), cut, predict, jpeg)
