"""TRANSFER: pretrain the student with the objective, on the rows of TEACH."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from ktray.data.strong import StrongPolicy
from ktray.data.views import ViewPolicy
from ktray.distributed.mailbox import open_mailbox
from ktray.recipe.objective import ObjectiveConfig
from ktray.recipe.schema import TrainConfig
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.inputs import AddedLater, NotInKey, StageInputs
from ktray.stages.labels import labels_of
from ktray.stages.manifests import TrainedManifest
from ktray.stages.speed_facts import transfer_facts
from ktray.stages.teach.stage import TeachResult, view_policy
from ktray.stages.windows import with_windows
from ktray.storage.store import Stage
from ktray.training.inputs import StudentSpec
from ktray.training.loop import TrainerSettings
from ktray.training.programs import TransferSpec
from ktray.training.ray_train import train
from ktray.training.worker import TrainingSpec

WEIGHTS = "weights.safetensors"
HOW = NotInKey(
    "how often checkpoints are saved, how rows are read, whether kernels are compiled, and epochs, which steps replace",
    ("checkpoint_seconds", "epochs", "resident_bytes", "window_bytes", "compile"),
)


@dataclass(frozen=True)
class TransferInputs(StageInputs):
    """The inputs of TRANSFER.

    Attributes:
        kind: the task kind.
        start: the previous phase of pretraining, whose weights this phase starts from; None: initial weights.
        label_batch: labelled images per step, for an objective that also learns from labels; 0 for other objectives.
        views: view policy for objectives that cut views during training.
        weight: ``transfer.weight``; ``none`` for an objective without predictions of the teacher.
        probe: whether the classifier starts as a linear probe (``student.fit_head``).
    """

    stage = "transfer"
    devices = "workers"
    # 2: views keyed by image; 3: only the fields of the chosen objective; 4: ends early for a fall;
    # 5: the last weights, unless validation has fallen
    version = 5

    targets: TeachResult
    labels: StageResult
    kind: str
    student: StudentSpec
    objective: ObjectiveConfig
    start: StageResult | None
    label_batch: int
    views: ViewPolicy
    metric: str
    seed: int
    train: Annotated[TrainConfig, HOW]
    weight: Annotated[str, AddedLater("none")]
    probe: Annotated[bool, AddedLater(False)]

    @classmethod
    def of(
        cls, context: RunContext, targets: TeachResult, labels: StageResult, start: StageResult | None
    ) -> TransferInputs:
        recipe = context.recipe
        labelled = recipe.objective.traits.labelled
        predicting = "logits" in recipe.objective.traits.targets_needed
        return cls(
            targets=targets,
            labels=labels,
            kind=recipe.task.kind,
            student=student_spec(context),
            objective=recipe.objective,
            start=start,
            label_batch=recipe.finetune.batch_size if labelled else 0,
            views=view_policy(recipe.teach),
            metric=context.metric,
            seed=recipe.seed,
            train=recipe.train,
            weight=recipe.transfer.weight if predicting else "none",
            probe=start is None and fits_head(context) and recipe.objective.traits.trains_classifier,
        )

    @property
    def speed(self) -> dict[str, Any]:
        return transfer_facts(self.student, self.objective.name, self.train, self.targets.mode)


def run(
    context: RunContext, targets: TeachResult, labels: StageResult, start: StageResult | None = None
) -> StageResult:
    """Store ``weights.safetensors`` of the pretrained student; the training curve is in the manifest.

    The last weights are kept, or the best ones on validation if validation has fallen since by more than chance. If the
    objective trains no classifier, there is no validation, and the last weights are kept.
    """
    return run_stage(context.runtime, TransferInputs.of(context, targets, labels, start), work)


def work(inputs: TransferInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> TrainedManifest:
    taught = replace(inputs.targets.taught(), weight=inputs.weight)
    part = with_windows(inputs.train, taught, int(inputs.train.batch_size or 1), runtime, stage)
    settings = TrainerSettings.of(part, steps=int(part.steps or 1), seed=inputs.seed, keep="best")
    reporter.read = inputs.targets.images
    job = TransferSpec(
        settings,
        starting_at(inputs.student, inputs.start),
        taught,
        labels_of(inputs.labels, inputs.kind),
        inputs.views,
        inputs.label_batch,
        inputs.objective,
        part,
        inputs.metric,
        runtime.store.sub("precision"),
        strong_policy(part, inputs.views),
        inputs.probe,
    )
    return fit(runtime, stage, reporter, job, settings.steps)


def strong_policy(part: TrainConfig, views: ViewPolicy) -> StrongPolicy:
    """The strong augmentation of a training. Crops of views are flipped with the probability that ``views`` has."""
    a = part.augment
    hflip = views.hflip if a.crop_min < 1 else 0.0
    return StrongPolicy(a.crop_min, hflip, a.photometric, a.magnitude, a.erase)


def fits_head(context: RunContext) -> bool:
    """Whether the new classifier of the student starts as a linear probe. The recipe must be resolved."""
    student = student_spec(context)
    return context.recipe.student.fit_head is True and student.published and context.kind.linear_student


def student_spec(context: RunContext) -> StudentSpec:
    """The student of the recipe, with its initial weights."""
    return StudentSpec.of(context.recipe, len(context.task.classes))


def starting_at(student: StudentSpec, trained: StageResult | None) -> StudentSpec:
    """The student with the weights of the stage ``trained``; with its initial weights where ``trained`` is None."""
    return student if trained is None else replace(student, start=(trained.stage, WEIGHTS))


def fit(runtime: Runtime, stage: Stage, reporter: Reporter, job: TrainingSpec, steps: int) -> TrainedManifest:
    """Train a student and store its final weights in the stage."""
    reporter.expect(steps, "step")

    def keep(weights: Path) -> None:
        stage.write(WEIGHTS, weights.read_bytes())

    with open_mailbox(reporter.post) as board:
        outcome = train(
            job,
            stage,
            runtime.plan,
            board,
            max_failures=runtime.cluster.max_failures,
            on_weights=keep,
            resize_seconds=runtime.cluster.resize_seconds,
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
        "compiled": report.compiled,
        "starts": reporter.starts,
    }
