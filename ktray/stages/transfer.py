"""TRANSFER: pretrain the student under the objective, on what TEACH has stored."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ktray.distributed.mailbox import open_mailbox
from ktray.objectives import build_objective
from ktray.stages.base import Reporter, RunContext, StageResult, run_stage
from ktray.stages.labels import labels_of
from ktray.stages.manifests import TrainedManifest
from ktray.stages.teach import stage as teach_stage
from ktray.storage.store import Stage
from ktray.training.inputs import StudentSpec
from ktray.training.loop import TrainerSettings
from ktray.training.programs import TransferSpec
from ktray.training.ray_train import train
from ktray.training.worker import TrainingSpec

VERSION = 2  # 2: views keyed by image
WEIGHTS = "weights.safetensors"


def run(
    context: RunContext, teach: teach_stage.TeachResult, labels: StageResult, start: StageResult | None = None
) -> StageResult:
    """``weights.safetensors`` of the pretrained student; the curve is in the manifest.

    Args:
        start: an earlier part of the pretraining that this one goes on from.
    """
    recipe = context.recipe
    part = recipe.train
    steps = int(part.steps or 1)
    policy = teach_stage.view_policy(context)

    def work(stage: Stage, reporter: Reporter) -> TrainedManifest:
        settings = TrainerSettings.of(part, steps=steps, seed=recipe.seed, evals=5)
        reporter.read = teach.images
        job = TransferSpec(
            settings,
            student_spec(context, start.stage if start else None),
            teach.taught(),
            labels_of(context, labels),
            policy,
            recipe.finetune.batch_size,
            recipe.objective,
            part,
            context.metric,
            context.store.sub("precision"),
        )
        return fit(context, stage, reporter, job, steps)

    optimising = part.model_dump(exclude={"checkpoint_seconds", "epochs", "resident_bytes", "window_bytes", "compile"})
    objective = build_objective(recipe.objective)
    parts = [
        VERSION,
        teach.key,
        labels.key,
        recipe.objective.model_dump(exclude={"generic_share"}),
        optimising,
        recipe.student.model_dump(),
        recipe.task.kind,
        recipe.seed,
        context.metric,
        start.key if start else None,
        recipe.finetune.batch_size if objective.labelled else None,
        # Those who cut views while they train; the others' are in TEACH's key.
        asdict(policy) if objective.labelled or objective.views == "canvas" else None,
    ]
    return run_stage(context, "transfer", parts, work)


def student_spec(context: RunContext, start: Stage | None = None) -> StudentSpec:
    """The recipe's student, from its initial weights or from a stage's ``weights.safetensors``."""
    return StudentSpec.of(context.recipe, len(context.task.classes), (start, WEIGHTS) if start is not None else None)


def fit(context: RunContext, stage: Stage, reporter: Reporter, job: TrainingSpec, steps: int) -> TrainedManifest:
    """Run a student's job and keep its final weights in the stage."""
    reporter.expect(steps, "step")

    def keep(weights: Path) -> None:
        stage.write(WEIGHTS, weights.read_bytes())

    cluster = context.recipe.cluster
    with open_mailbox(reporter.post) as board:
        outcome = train(
            job,
            stage,
            context.plan,
            board,
            max_failures=cluster.max_failures,
            on_weights=keep,
            resize_seconds=cluster.resize_seconds,
        )
    state, report = outcome.state, outcome.report
    reporter.meter.add(peak_memory_bytes=report.peak_memory_bytes)
    return {
        "steps": state.step,
        "seconds": state.seconds,
        "best_step": state.best_step,
        "curve": state.curve,
        "images_per_second": state.step * report.images_per_step / max(1e-9, state.seconds),
        "flops_per_step": report.flops_per_step,
        "precision": report.autocast,
        "starts": reporter.starts,
    }
