"""EVALUATE: read the test split once, for the student, the scratch baseline and the teacher.

Where decisions need values that are fitted on validation, such as the thresholds of a task with sets of classes, the
models predict the validation images first.

Each test image is scored separately and the driver computes the metrics, so the result depends neither on the number of
workers nor on the division into shards. Unusable test images are quarantined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch

from ktray.data.labelled.decode import LabelReader, decode_examples
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.preprocess import Preprocess
from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import map_shards
from ktray.errors import KtrayError
from ktray.models.device import device
from ktray.models.flops import forward_flops
from ktray.models.teacher.ensemble import EnsembleSpec
from ktray.models.teacher.spec import AdaptedSpec, predict_numpy, tower_flops
from ktray.stages.base import (
    Reporter,
    RunContext,
    Runtime,
    StageResult,
    run_stage,
)
from ktray.stages.inputs import NotInKey, StageInputs
from ktray.stages.labels import shard_items
from ktray.stages.manifests import EvaluateManifest
from ktray.stages.shard_summary import ShardSummary, finish_shard, finished_shards, pairs
from ktray.stages.transfer import starting_at, student_spec
from ktray.storage.columns import Rows, read_shards, write_rows
from ktray.storage.store import Stage
from ktray.tasks.base import TaskKind, task_kind
from ktray.training.inputs import StudentSpec

STUDENT, TEACHER = "student", "teacher"
CONFUSION = ".confusion"  # suffix of the files with the student's confusion counts


@dataclass(frozen=True)
class _Prepare:
    """Decodes each image in the input geometry of every model, and reads its label."""

    transforms: dict[str, Preprocess]
    max_pixels: int
    reader: LabelReader

    def __call__(self, item: Item) -> Rows:
        examples = [tuple(e) for e in item["examples"]]
        columns, bad = decode_examples(examples, self.max_pixels, self.transforms, self.reader)
        columns["bad"] = np.array(bad, dtype=str).reshape(-1, 2)
        return columns


class _Models:
    """The loaded models."""

    def __init__(self, plan: _TestedModels) -> None:
        from ktray.training.worker import WorkerContext

        env = WorkerContext(device(), 0, 1, 1.0)
        self.plan = plan
        self.students = {name: spec.build(env, 0) for name, spec in plan.students.items()}
        self.teacher = plan.teacher.load() if plan.teacher else None
        self.flops = sum(forward_flops(m, (3, *p.size)) for m, p in self.students.values())
        if self.teacher:
            self.flops += tower_flops(self.teacher)

    @torch.inference_mode()
    def predictions(self, name: str, columns: Rows) -> np.ndarray:
        """The output of a model, (N, ...) float32."""
        batch = self.plan.batch
        if name == TEACHER and self.teacher is not None:
            return predict_numpy(self.teacher, columns[TEACHER], batch)
        model, preprocess = self.students[name]
        model.eval()
        pixels = columns[STUDENT]
        parts = []
        for at in range(0, len(pixels), batch):
            x = torch.from_numpy(pixels[at : at + batch].copy()).to(device())
            parts.append(model(preprocess.normalise(x)).float().cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, self.plan.outputs), np.float32)


@dataclass(frozen=True)
class _TestedModels:
    """Description of the models, by name; ``outputs`` is the number of classes."""

    students: dict[str, StudentSpec]
    teacher: AdaptedSpec | EnsembleSpec | None
    outputs: int
    batch: int

    @property
    def names(self) -> list[str]:
        return [*self.students, *([TEACHER] if self.teacher else [])]

    def load(self) -> _Models:
        return _Models(self)


@dataclass(frozen=True)
class _Score:
    """Predicts the images of a shard with each model, and stores the rows of the task kind.

    Attributes:
        fitted: by model, what its decisions need; None: they are not fitted yet, or need nothing.
    """

    stage: Stage
    kind: TaskKind
    model: _TestedModels
    fitted: dict[str, Any] | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (STUDENT, TEACHER) if self.model.teacher else (STUDENT,)

    def compute(self, model: _Models, columns: Rows) -> Rows:
        found = {name: model.predictions(name, columns) for name in self.model.names}
        return {**found, "flops": np.array([model.flops])}

    def finish(self, item: Item, columns: Rows, computed: Rows) -> dict[str, Any]:
        out: Rows = {"uri": columns["uri"], **self.kind.test_columns(columns)}
        for name in self.model.names:
            rows, counts = self.kind.test_rows(computed[name], columns)
            if self.fitted is not None:
                rows |= self.kind.decide(computed[name], self.fitted[name])
            out |= {f"{name}{suffix}": values for suffix, values in rows.items()}
            if name == STUDENT and counts is not None:
                self.stage.write_json(f"{item['name']}{CONFUSION}", counts)
        write_rows(self.stage, item["name"], out)
        n, bad = len(out["uri"]), pairs(columns["bad"].tolist())
        flops = float(computed["flops"][0]) * n
        return finish_shard(
            self.stage, ShardSummary(item["name"], n, len(item["examples"]), bad, images=n, flops=flops)
        )


@dataclass(frozen=True)
class EvaluateInputs(StageInputs):
    """The inputs of EVALUATE.

    Attributes:
        weights: by name of a student, the stage that trained it.
        adapt: the stage of the teacher, ADAPT or ENSEMBLE; None: the teacher is not tested.
        kind: the task kind.
        reader: how labels are read.
    """

    stage = "evaluate"
    version = 3  # 2: masks; 3: declared inputs

    task: LabelledSet
    weights: dict[str, StageResult]
    student: StudentSpec
    adapt: StageResult | None
    max_pixels: int
    kind: str
    reader: LabelReader
    teacher: Annotated[
        AdaptedSpec | EnsembleSpec | None, NotInKey("it is the result of the stage whose key is in `adapt`")
    ]
    taught_by: Annotated[str | None, NotInKey("name of the teacher of `adapt`, for measured speeds")]

    @property
    def speed(self) -> dict[str, Any]:
        return {
            "model": self.student.name,
            "size": self.student.image_size,
            "kwargs": self.student.kwargs,
            "students": len(self.weights),
            "teacher": self.taught_by,
            "teacher_size": self.teacher.preprocess.size[0] if self.teacher else 0,
            "kind": self.kind,
        }


def run(
    context: RunContext,
    weights: dict[str, StageResult],
    teacher: tuple[StageResult, AdaptedSpec | EnsembleSpec] | None,
) -> StageResult:
    """Store shards with what the task kind keeps from the predictions of each model, and ``metrics`` by model in the
    manifest.

    Args:
        weights: by name of a student, the stage that trained it.
        teacher: the stage ADAPT or ENSEMBLE with its teacher; None: no teacher is tested.
    """
    part = context.recipe.teacher
    inputs = EvaluateInputs(
        task=context.task,
        weights=weights,
        student=student_spec(context),
        adapt=teacher[0] if teacher else None,
        max_pixels=context.recipe.data.max_pixels,
        kind=context.recipe.task.kind,
        reader=context.kind.reader(context.task, whole=True),
        teacher=teacher[1] if teacher else None,
        taught_by="+".join([str(part.name), *(other.name for other in part.others)]) if teacher else None,
    )
    return run_stage(context.runtime, inputs, work)


def work(inputs: EvaluateInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> EvaluateManifest:
    classes, teacher, kind = inputs.task.classes, inputs.teacher, task_kind(inputs.kind)
    transforms = {STUDENT: inputs.student.make(bare=True).preprocess}
    if teacher:
        transforms[TEACHER] = teacher.preprocess
    students = {name: starting_at(inputs.student, trained) for name, trained in inputs.weights.items()}
    prepare = _Prepare(transforms, inputs.max_pixels, inputs.reader)
    models = _TestedModels(students, teacher, len(classes), kind.test_batch)
    heldout = shard_items("val", inputs.task.val) if kind.decides else []
    items = shard_items("test", inputs.task.test)
    finished = finished_shards(stage)
    reporter.expect(sum(len(item["examples"]) for item in heldout + items))
    reporter.shards(s.resumed() for s in finished.values())

    def score(split: list[Item], fitted: dict[str, Any] | None) -> None:
        todo = [item for item in split if item["name"] not in finished]
        scored = map_shards(todo, prepare, _Score(stage, kind, models, fitted), runtime.plan)
        reporter.shards(ShardSummary.each(scored))

    fitted: dict[str, Any] | None = None
    if kind.decides:
        score(heldout, None)
        fitted = {name: kind.fit_decisions(load(stage, "val"), name, classes) for name in models.names}
    score(items, fitted)
    metrics: dict[str, dict[str, Any]] = {}
    if items:  # without a test split, only the decisions are fitted
        rows = load(stage, reduce=kind.compact)
        if not len(rows["uri"]):
            raise KtrayError("No test image can be used", "Check the quarantine list and the test split of task.data.")
        metrics = {name: kind.test_metrics(rows, name, classes) for name in models.names}
    return {"metrics": metrics} if fitted is None else {"metrics": metrics, "decisions": fitted}


def load(stage: Stage, split: str = "test", reduce: Callable[[Rows], Rows] = lambda rows: rows) -> Rows:
    """All rows of a split: ``uri``, and the columns of the task kind for the labels and for each model.

    Args:
        reduce: applied to each shard, so that not all columns of all images are in memory.
    """
    names = [name for name in stage.names(".parquet") if name.startswith(f"{split}-")]
    shards = [reduce(rows) for rows in read_shards(stage, names)]
    return {name: np.concatenate([s[name] for s in shards]) for name in shards[0]}


def confusion(context: RunContext, stage: Stage, rows: Rows) -> np.ndarray | None:
    """Confusion counts (C, C) of the student on the test split: rows are true classes, columns are predicted classes;
    None where the task kind has no counts.

    Args:
        rows: what `load` returns, reduced by the task kind.
    """
    counts = list(stage.read_each_json(stage.names(CONFUSION)))
    return context.kind.confusion(rows, counts, context.task.classes)
