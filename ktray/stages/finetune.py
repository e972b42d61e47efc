"""FINETUNE: train the student on the labels. Started from random weights, this is the scratch baseline.

The weights that are best on validation are kept. The weights before finetuning are among the candidates: with few
labels, finetuning can destroy what the student learned in pretraining, and then its result is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ktray.data.views import ViewPolicy
from ktray.recipe.objective import ObjectiveConfig
from ktray.recipe.schema import FinetuneConfig, TrainConfig
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.inputs import AddedLater, StageInputs
from ktray.stages.labels import labels_of
from ktray.stages.manifests import TrainedManifest
from ktray.stages.teach.stage import TeachResult, view_policy
from ktray.stages.transfer import HOW, fit, fits_head, starting_at, strong_policy, student_spec
from ktray.stages.windows import with_windows
from ktray.storage.store import Stage
from ktray.training.inputs import StudentSpec
from ktray.training.loop import TrainerSettings
from ktray.training.programs import FinetuneSpec

BASELINE_EVALS = 15  # validations of a baseline, after the first


@dataclass(frozen=True)
class FinetuneInputs(StageInputs):
    """The inputs of FINETUNE.

    Attributes:
        kind: the task kind.
        train: how replayed images are read, and the largest gradient norm.
    """

    stage = "finetune"
    devices = "workers"
    version = 3  # 2: views keyed by image; 3: only the fields of the chosen objective

    transfer: StageResult
    targets: TeachResult
    labels: StageResult
    kind: str
    student: StudentSpec
    objective: ObjectiveConfig
    finetune: FinetuneConfig
    views: ViewPolicy
    metric: str
    seed: int
    train: Annotated[TrainConfig, HOW]

    @property
    def speed(self) -> dict[str, Any]:
        return {
            "model": self.student.name,
            "size": self.student.image_size,
            "kwargs": self.student.kwargs,
            "objective": self.objective.name,
            "batch": self.finetune.batch_size,
            "replay": self.finetune.replay,
            "precision": self.train.precision,
            "mode": self.targets.mode,
        }


def run(context: RunContext, transfer: StageResult, targets: TeachResult, labels: StageResult) -> StageResult:
    """``weights.safetensors`` of the finetuned student."""
    recipe = context.recipe
    inputs = FinetuneInputs(
        transfer=transfer,
        targets=targets,
        labels=labels,
        kind=recipe.task.kind,
        student=student_spec(context),
        objective=recipe.objective,
        finetune=recipe.finetune,
        views=view_policy(recipe.teach),
        metric=context.metric,
        seed=recipe.seed,
        train=recipe.train,
    )
    return run_stage(context.runtime, inputs, work)


def work(inputs: FinetuneInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> TrainedManifest:
    part = inputs.finetune
    settings = TrainerSettings.of(
        part,
        clip=inputs.train.clip,
        seed=inputs.seed,
        checkpoint_seconds=inputs.train.checkpoint_seconds,
        keep="best",
    )
    taught = inputs.targets.taught()
    replayed = max(1, round(part.batch_size * part.replay))
    job = FinetuneSpec(
        settings,
        starting_at(inputs.student, inputs.transfer),
        labels_of(inputs.labels, inputs.kind),
        inputs.views,
        part.batch_size,
        inputs.objective,
        with_windows(inputs.train, taught, replayed, runtime, stage),
        inputs.metric,
        runtime.store.sub("precision"),
        taught,
        part.replay,
        strong=strong_policy(inputs.train, inputs.views),
    )
    return fit(runtime, stage, reporter, job, part.steps)


@dataclass(frozen=True)
class ScratchInputs(StageInputs):
    """The inputs of the scratch baseline.

    Attributes:
        steps: replaces ``train.steps``.
        probe: whether the classifier starts as a linear head on the features of the initial weights; without steps,
            nothing else is trained.
    """

    stage = "scratch"
    devices = "workers"
    version = 3  # 2: views keyed by image; 3: declared inputs

    labels: StageResult
    kind: str
    student: StudentSpec
    steps: int
    views: ViewPolicy
    metric: str
    seed: int
    train: Annotated[TrainConfig, HOW]
    probe: Annotated[bool, AddedLater(False)]

    @property
    def speed(self) -> dict[str, Any]:
        return {
            "model": self.student.name,
            "size": self.student.image_size,
            "kwargs": self.student.kwargs,
            "batch": self.train.batch_size,
            "precision": self.train.precision,
        }


def run_scratch(context: RunContext, labels: StageResult, student: StudentSpec, *, booked: str) -> StageResult:
    """Train a student on the labels alone, with the steps and the batch size of pretraining; for an objective with
    frozen weights, only fit its head.

    Training stops when validation has not improved for a third of the evaluations, because more steps would only add
    cost.

    Args:
        student: the student with its initial weights: random, or published.
        booked: name of the stage in the ledger.
    """
    recipe = context.recipe
    frozen = recipe.objective.traits.frozen
    inputs = ScratchInputs(
        labels=labels,
        kind=recipe.task.kind,
        student=student,
        steps=0 if frozen else int(recipe.baselines.scratch_steps or recipe.train.steps or 1),
        views=view_policy(recipe.teach),
        metric=context.metric,
        seed=recipe.seed,
        train=recipe.train,
        probe=frozen or (student.published and fits_head(context)),
    )
    return run_stage(context.runtime, inputs, work_scratch, ledger_name=booked)


def work_scratch(inputs: ScratchInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> TrainedManifest:
    part = inputs.train
    settings = TrainerSettings.of(
        part, steps=inputs.steps, seed=inputs.seed, evals=BASELINE_EVALS, patience=5, keep="best"
    )
    job = FinetuneSpec(
        settings,
        inputs.student,
        labels_of(inputs.labels, inputs.kind),
        inputs.views,
        int(part.batch_size or 1),
        None,
        part,
        inputs.metric,
        runtime.store.sub("precision"),
        strong=strong_policy(part, inputs.views),
        probe=inputs.probe,
    )
    return fit(runtime, stage, reporter, job, inputs.steps)
