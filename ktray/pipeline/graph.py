"""The stages in order, and the results that each passes to the next."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ktray.data.preprocess import Preprocess
from ktray.models.features import map_shape
from ktray.models.teacher.ensemble import EnsembleSpec
from ktray.models.teacher.spec import AdaptedSpec, TeacherSpec
from ktray.models.teacher.teacher import TeacherSource
from ktray.pipeline.phases import needs_teacher, phases, taught
from ktray.pipeline.select import SCRATCH, START, Candidate, baseline, best, distilled, models_to_test
from ktray.recipe.schema import index_alone
from ktray.stages import ensemble, finetune, hygiene, labels, transfer
from ktray.stages.adapt import stage as adapt
from ktray.stages.base import RunContext, StageResult
from ktray.stages.curate import stage as curate
from ktray.stages.evaluate import stage as evaluate
from ktray.stages.index import stage as index
from ktray.stages.teach import stage as teach
from ktray.training.inputs import StudentSpec

logger = logging.getLogger("ktray")
TaughtBy = tuple[StageResult, AdaptedSpec | EnsembleSpec]


@dataclass
class StageOutputs:
    """The stages of one run; None where the recipe has no such stage. ``evaluate`` is None in a trial and without a
    test split.

    Attributes:
        candidates: the students that the run can deliver, the distilled ones first.
        student: the delivered one.
        teacher: the stage of the teacher whose predictions are tested: ADAPT, or ENSEMBLE for several teachers.
    """

    labels: StageResult
    evaluate: StageResult | None
    candidates: list[Candidate]
    student: Candidate
    adapt: StageResult | None = None
    teacher: StageResult | None = None
    index: StageResult | None = None
    curate: StageResult | None = None
    teach: teach.TeachResult | None = None
    transfer: StageResult | None = None
    finetune: StageResult | None = None
    hygiene: StageResult | None = None


def stages(context: RunContext, trial: bool = False) -> StageOutputs:
    """Run the stages; a stage that the store holds completely is reused. A trial does not run EVALUATE."""
    recipe, size = context.recipe, int(context.recipe.image_size or 0)
    student = transfer.student_spec(context).make()
    for warning in student.warnings:
        logger.info(f"student   {warning}")
    if not recipe.objective.has_transfer_set():
        decoded = labels.run(context, student.preprocess)
        checked = None if trial else hygiene.run(context, None, None)
        trained = finetune.run_scratch(context, decoded, transfer.student_spec(context), booked="finetune")
        only = baseline(START if transfer.student_spec(context).published else SCRATCH, trained, context.metric)
        tested = evaluate.run(context, {evaluate.STUDENT: trained}, None) if _is_tested(context, trial) else None
        return StageOutputs(decoded, tested, [only], only, hygiene=checked)
    start: PhaseOutputs | None = None
    *_, (last, _) = phases(recipe)
    for name, phase in phases(recipe):
        inner = replace(context, recipe=phase, runtime=replace(context.runtime, phase=name, read=0))
        reads_map = phase.objective.traits.reads == "map"
        map_side = map_shape(student.model, size)[1] if reads_map else 0
        # A trial does not read the test split.
        start = _pretrain(inner, student.preprocess, map_side, start, check=name == last and not trial)
        context.runtime.read += inner.runtime.read
    assert start is not None  # there is at least one phase
    decoded, transferred = start.labels, start.transfer
    finetuned = finetune.run(context, transferred, start.teach, decoded) if recipe.finetune.steps else None
    candidates = distilled(transferred, finetuned, context.metric)
    for name, initial in [] if trial else _baselines(context):
        trained = finetune.run_scratch(context, decoded, initial, booked=name)
        candidates.append(baseline(name, trained, context.metric))
    chosen = best(candidates)
    evaluated = None
    if _is_tested(context, trial):
        evaluated = evaluate.run(context, models_to_test(candidates, chosen), start.teacher)
    return StageOutputs(
        labels=decoded,
        evaluate=evaluated,
        candidates=candidates,
        student=chosen,
        adapt=start.adapt,
        teacher=start.teacher[0] if start.teacher else None,
        index=start.index,
        curate=start.curate,
        teach=start.teach,
        transfer=transferred,
        finetune=finetuned,
        hygiene=start.hygiene,
    )


def _is_tested(context: RunContext, trial: bool) -> bool:
    """Whether EVALUATE runs. A trial does not read the test split. Small data may have none; then EVALUATE is needed
    only where it fits the decisions of the student on validation."""
    return bool(context.task.test or context.kind.decides) and not trial


def _baselines(context: RunContext) -> list[tuple[str, StudentSpec]]:
    """The baselines that the recipe asks for, each with its initial weights."""
    part, student = context.recipe.baselines, transfer.student_spec(context)
    wanted = [(START, student)] if part.start and student.published else []
    return [*wanted, (SCRATCH, student.from_scratch())] if part.scratch else wanted


@dataclass
class PhaseOutputs:
    """The stages of one phase of pretraining; ``teacher`` is the adapted teacher or the ensemble, with its stage."""

    labels: StageResult
    adapt: StageResult | None
    teacher: TaughtBy | None
    index: StageResult | None
    curate: StageResult
    teach: teach.TeachResult
    transfer: StageResult
    hygiene: StageResult | None


@dataclass
class TransferSetOutputs:
    """The stages up to the transfer set; ``encoder`` is the frozen teacher, ``spec`` the adapted teacher."""

    adapt: StageResult | None
    encoder: TeacherSpec | None
    spec: AdaptedSpec | None
    index: StageResult | None
    curate: StageResult


def _curate(context: RunContext) -> TransferSetOutputs:
    recipe, t = context.recipe, context.recipe.teacher
    spec = adapted = model = indexed = None
    if needs_teacher(recipe):
        spec = TeacherSpec.of(TeacherSource(str(t.name), t.checkpoint, t.config, t.image_size))
        adapted = adapt.run(context, spec)
        model = adapt.adapted(context, adapted, spec)
    # A random draw needs no embeddings from the teacher.
    encoder = spec if recipe.transfer.source in ("retrieved", "list") or index_alone(recipe) else None
    if context.source is not None:
        indexed = index.run_labelled(context, context.source)
    elif recipe.transfer.source in ("generic", "retrieved", "list"):
        indexed = index.run(context, encoder)
    return TransferSetOutputs(adapted, spec, model, indexed, curate.run(context, encoder, adapted, indexed))


def _teacher(context: RunContext, curated: TransferSetOutputs) -> TaughtBy | None:
    """The teacher of the student with its stage: the adapted teacher, or the ensemble with ``teacher.others``."""
    if not (curated.adapt and curated.spec):
        return None
    part = context.recipe.teacher
    if not part.others:
        return curated.adapt, curated.spec
    stages, specs = [curated.adapt], [curated.spec]
    for other in part.others:
        recipe = context.recipe.model_copy(update={"teacher": part.model_copy(update=dict(other))})
        spec = TeacherSpec.of(TeacherSource(other.name, other.checkpoint, other.config, other.image_size))
        stages.append(adapt.run(replace(context, recipe=recipe), spec))
        specs.append(adapt.adapted(context, stages[-1], spec))
    return ensemble.run(context, stages, specs, [str(part.name), *(other.name for other in part.others)])


def _pretrain(
    context: RunContext, student: Preprocess, map_side: int, start: PhaseOutputs | None, check: bool
) -> PhaseOutputs:
    curated = _curate(context)
    checked = hygiene.run(context, curated.adapt, curated.encoder) if check else None
    teacher = _teacher(context, curated)
    done, spec = teacher if teacher and taught(context.recipe) else (None, None)
    targets = teach.run(context, curated.curate, done, spec, student, map_side)
    decoded = labels.run(context, student)
    transferred = transfer.run(context, targets, decoded, start.transfer if start else None)
    return PhaseOutputs(decoded, curated.adapt, teacher, curated.index, curated.curate, targets, transferred, checked)
