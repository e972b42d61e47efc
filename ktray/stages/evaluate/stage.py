"""EVALUATE: read the test split, once, for the student, the scratch floor and the teacher.

Every test image is scored by itself and the counts are made on the driver, so the result depends neither on
the number of workers nor on how images were cut into shards. Unusable test images are quarantined and named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch

from ktray.data.labelled.read import LabelledSet
from ktray.data.preprocess import Preprocess
from ktray.distributed.ray_data import Item, map_shards
from ktray.errors import KtrayError
from ktray.models.flops import forward_flops
from ktray.models.teacher.spec import AdaptedSpec, device, predict_numpy, tower_flops
from ktray.stages.base import (
    Reporter,
    RunContext,
    Runtime,
    StageResult,
    finish_shard,
    finished_shards,
    resumed,
    run_stage,
)
from ktray.stages.evaluate import dense
from ktray.stages.inputs import NotInKey, StageInputs
from ktray.stages.labels import Masks, decode_examples, shard_items
from ktray.stages.transfer import starting_at, student_spec
from ktray.storage.columns import Rows, read_rows, write_rows
from ktray.storage.store import Stage
from ktray.tasks import classification, segmentation
from ktray.training.inputs import StudentSpec


@dataclass(frozen=True)
class _Prepare:
    transforms: dict[str, Preprocess]
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        columns, bad = decode_examples([tuple(e) for e in item["examples"]], self.max_pixels, self.transforms)
        columns["bad"] = np.array(bad, dtype=str).reshape(-1, 2)
        return columns


class _Score:
    def __init__(self, stage: Stage, students: dict[str, StudentSpec], teacher: AdaptedSpec | None) -> None:
        from ktray.training.worker import WorkerContext

        env = WorkerContext(device(), 0, 1, 1.0)
        self.stage = stage
        self.students = {name: spec.build(env, 0) for name, spec in students.items()}
        self.teacher = teacher.load() if teacher else None
        self.flops = sum(forward_flops(m, (3, *p.size)) for m, p in self.students.values())
        if self.teacher:
            self.flops += tower_flops(self.teacher)

    @torch.inference_mode()
    def __call__(self, item: Item, columns: Rows) -> dict[str, Any]:
        out: Rows = {"uri": columns["uri"], "label": columns["label"]}
        for name, (model, preprocess) in self.students.items():
            model.eval()
            x = torch.from_numpy(columns["student"]).to(device())
            out[name] = model(preprocess.normalise(x)).float().cpu().numpy()
        if self.teacher:
            out["teacher"] = predict_numpy(self.teacher, columns["teacher"], 256)
        write_rows(self.stage, item["name"], out)
        n = len(out["label"])
        summary = {
            "name": item["name"],
            "rows": n,
            "read": len(item["examples"]),
            "bad": columns["bad"].tolist(),
            "images": n,
            "flops": self.flops * n,
        }
        return finish_shard(self.stage, item["name"], summary)


@dataclass(frozen=True)
class _MakeScore:
    stage: Stage
    students: dict[str, StudentSpec]
    teacher: AdaptedSpec | None

    def __call__(self) -> _Score:
        return _Score(self.stage, self.students, self.teacher)


@dataclass(frozen=True)
class EvaluateInputs(StageInputs):
    """What EVALUATE reads.

    Attributes:
        weights: by student, the stage that made its weights.
        adapt: made the teacher.
        masks: how label maps are read; None where an image has one label.
    """

    stage = "evaluate"
    version = 3  # 2: masks; 3: declared inputs

    task: LabelledSet
    weights: dict[str, StageResult]
    student: StudentSpec
    adapt: StageResult | None
    max_pixels: int
    masks: Masks | None
    teacher: Annotated[AdaptedSpec | None, NotInKey("it is what ADAPT has made")]


def run(
    context: RunContext, weights: dict[str, StageResult], teacher: tuple[AdaptedSpec, StageResult] | None
) -> StageResult:
    """Shards of test logits (or counts of pixels) per model, and ``metrics`` by model in the manifest.

    Args:
        weights: by name of a student, the stage that made its weights.
        teacher: (adapted teacher, ADAPT), or None.
    """
    inputs = EvaluateInputs(
        task=context.task,
        weights=weights,
        student=student_spec(context),
        adapt=teacher[1] if teacher else None,
        max_pixels=context.recipe.data.max_pixels,
        masks=Masks.of(context),
        teacher=teacher[0] if teacher else None,
    )
    return run_stage(context.runtime, inputs, work)


def work(inputs: EvaluateInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> dict[str, Any]:
    classes, teacher, masks = inputs.task.classes, inputs.teacher, inputs.masks
    transforms = {"student": inputs.student.make(bare=True).preprocess}
    if teacher:
        transforms["teacher"] = teacher.preprocess
    items = shard_items("test", inputs.task.test)
    finished = finished_shards(stage)
    reporter.expect(len(inputs.task.test))
    reporter.shards(resumed(s) for s in finished.values())
    specs = {name: starting_at(inputs.student, made) for name, made in inputs.weights.items()}
    todo = [i for i in items if i["name"] not in finished]
    names = [*specs, *(["teacher"] if teacher else [])]
    if masks:
        prepare = dense.PrepareMasks(transforms, inputs.max_pixels, masks)
        finish = dense.MakeScore(stage, specs, teacher, len(classes))
        reporter.shards(map_shards(todo, prepare, finish, runtime.plan))
    else:
        made = _MakeScore(stage, specs, teacher)
        reporter.shards(map_shards(todo, _Prepare(transforms, inputs.max_pixels), made, runtime.plan))
    rows = load(stage)
    if not len(rows["uri"]):
        raise KtrayError("No test image can be used", "Check the quarantine list and the test split of task.data.")
    if masks:
        return {
            "metrics": {
                n: segmentation.metrics(rows[f"{n}_tp"], rows[f"{n}_fp"], rows[f"{n}_fn"], classes) for n in names
            }
        }
    return {"metrics": {n: classification.metrics(rows[n], rows["label"], classes) for n in names}}


def load(stage: Stage) -> Rows:
    """All test rows: ``uri``, ``label`` and the logits of each model; for segmentation ``uri`` and per model
    ``<name>_tp``, ``<name>_fp``, ``<name>_fn`` (N, C) pixels."""
    shards = [read_rows(stage, name) for name in stage.names(".parquet")]
    return {name: np.concatenate([s[name] for s in shards]) for name in shards[0]}
