"""FINETUNE: the student on the labels. From random weights it is the scratch floor.

Validation chooses among the weights along the way, the starting ones included: with few labels the last
finetuning can destroy what was transferred, and then it is skipped.
"""

from __future__ import annotations

from dataclasses import asdict

from ktray.recipe.schema import ObjectiveConfig
from ktray.stages.base import Reporter, RunContext, StageResult, run_stage
from ktray.stages.labels import labels_of
from ktray.stages.manifests import TrainedManifest
from ktray.stages.teach import stage as teach_stage
from ktray.stages.transfer import fit, student_spec
from ktray.storage.store import Stage
from ktray.training.loop import TrainerSettings
from ktray.training.programs import FinetuneSpec

VERSION = 2  # 2: views keyed by image


def run(context: RunContext, transfer: StageResult, teach: teach_stage.TeachResult, labels: StageResult) -> StageResult:
    """``weights.safetensors`` of the finetuned student."""
    recipe = context.recipe
    part = recipe.finetune

    def work(stage: Stage, reporter: Reporter) -> TrainedManifest:
        settings = TrainerSettings.of(
            part,
            clip=recipe.train.clip,
            seed=recipe.seed,
            checkpoint_seconds=recipe.train.checkpoint_seconds,
            keep="best",
        )
        job = FinetuneSpec(
            settings,
            student_spec(context, transfer.stage),
            labels_of(context, labels),
            teach_stage.view_policy(context),
            part.batch_size,
            recipe.objective,
            recipe.train,
            context.metric,
            context.store.sub("precision"),
            teach.taught(),
            part.replay,
        )
        return fit(context, stage, reporter, job, part.steps)

    parts = [VERSION, transfer.key, labels.key, part.model_dump(), recipe.objective.model_dump(), recipe.seed]
    parts.append(context.metric)
    return run_stage(context, "finetune", parts, work)


def run_scratch(context: RunContext, labels: StageResult, *, booked: str) -> StageResult:
    """The student on the labels alone, with the steps and batch that pretraining would have had.

    It stops when validation has not improved for a third of the evaluations: more steps would only cost.
    """
    recipe = context.recipe
    part = recipe.train
    steps = int(recipe.baselines.scratch_steps or part.steps or 1)

    def work(stage: Stage, reporter: Reporter) -> TrainedManifest:
        settings = TrainerSettings.of(part, steps=steps, seed=recipe.seed, evals=15, patience=5, keep="best")
        job = FinetuneSpec(
            settings,
            student_spec(context),
            labels_of(context, labels),
            teach_stage.view_policy(context),
            int(part.batch_size or 1),
            ObjectiveConfig(name="scratch"),
            part,
            context.metric,
            context.store.sub("precision"),
        )
        return fit(context, stage, reporter, job, steps)

    optimising = part.model_dump(exclude={"checkpoint_seconds", "epochs", "resident_bytes", "window_bytes", "compile"})
    views = asdict(teach_stage.view_policy(context))
    parts = [VERSION, "scratch", labels.key, optimising, steps, recipe.student.model_dump(), views, recipe.seed]
    parts.append(context.metric)
    return run_stage(context, "scratch", parts, work, ledger_name=booked)
