"""TRANSFER: pretrain the student by matching what the teacher predicted for the same views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ktray.board import watch
from ktray.stages import teach as teach_stage
from ktray.stages.base import Context, Done, Reporter, run_stage
from ktray.store import Stage
from ktray.training.jobs import Labels, StudentSpec, TransferJob
from ktray.training.loop import Settings
from ktray.training.shell import Job, train

VERSION = 1
WEIGHTS = "weights.safetensors"


def run(context: Context, teach: Done, labels: Done) -> Done:
    """``weights.safetensors`` of the pretrained student; the curve is in the manifest."""
    recipe = context.recipe
    part = recipe.train
    steps = int(part.steps or 1)

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        settings = Settings(
            steps=steps,
            lr=part.lr,
            weight_decay=part.weight_decay,
            warmup=part.warmup,
            ema=part.ema,
            clip=part.clip,
            seed=recipe.seed,
            evals=5,
            checkpoint_seconds=part.checkpoint_seconds,
        )
        job = TransferJob(
            settings,
            student_spec(context),
            teach_stage.cache(teach),
            Labels(labels.stage),
            recipe.objective,
            part,
            context.store.sub("precision"),
        )
        return fit(context, stage, reporter, job, steps)

    objective = recipe.objective.model_dump()
    optimising = part.model_dump(exclude={"checkpoint_seconds", "epochs", "resident_bytes", "window_bytes", "compile"})
    parts = [VERSION, teach.key, labels.key, objective, optimising, recipe.student.model_dump(), recipe.seed]
    return run_stage(context, "transfer", parts, work)


def student_spec(context: Context, start: Stage | None = None) -> StudentSpec:
    """The recipe's student, from its initial weights or from a stage's ``weights.safetensors``."""
    part = context.recipe.student
    return StudentSpec(
        str(part.name),
        dict(part.kwargs),
        len(context.task.classes),
        int(context.recipe.image_size or 0),
        part.pretrained,
        part.checkpoint,
        (start, WEIGHTS) if start is not None else None,
    )


def fit(context: Context, stage: Stage, reporter: Reporter, job: Job, steps: int) -> dict[str, Any]:
    """Run a student's job and keep its final weights in the stage."""
    reporter.expect(steps, "step")

    def keep(weights: Path) -> None:
        stage.write(WEIGHTS, weights.read_bytes())

    with watch(reporter.post) as board:
        outcome = train(
            job, stage, context.plan, board, max_failures=context.recipe.cluster.max_failures, on_weights=keep
        )
    reporter.meter.add(peak_memory_bytes=int(outcome.report["peak_memory_bytes"]))
    state = outcome.state
    return {
        "steps": state["step"],
        "seconds": state["seconds"],
        "best_step": state["best_step"],
        "curve": state["curve"],
        "images_per_second": state["step"] * outcome.report["images_per_step"] / max(1e-9, state["seconds"]),
        "flops_per_step": outcome.report["flops_per_step"],
        "precision": outcome.report["autocast"],
    }
