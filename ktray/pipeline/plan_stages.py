"""The work of each stage of a plan: FLOPs, memory traffic, images, and bytes in the store.

FLOPs and traffic are counted on the real graphs of the models, on the meta device, and multiplied by the number of
samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from ktray.data.captions import first_captions, tokenise
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.models.features import Features, feature_dim, map_shape, trunk
from ktray.models.flops import forward_flops, on_meta, train_flops
from ktray.models.teacher.load import build_teacher
from ktray.models.teacher.teacher import TeacherSource
from ktray.models.traffic import forward_traffic, train_traffic
from ktray.objectives.base import Objective, ObjectiveContext
from ktray.pipeline.phases import needs_teacher, phases, taught
from ktray.pipeline.plan_gallery import gallery_images, given_embeddings
from ktray.pipeline.resolve import Resolved, transfer_images
from ktray.recipe.schema import Recipe
from ktray.retrieval.crops import Crops
from ktray.stages.adapt.stage import TOWER_EVALS
from ktray.stages.finetune import BASELINE_EVALS
from ktray.stages.suggest.stage import MOST_READ
from ktray.stages.teach.shards import checked_images
from ktray.targets.jpeg import view_bytes
from ktray.targets.top_k import per_prediction
from ktray.tasks.base import task_kind
from ktray.training.inputs import StudentSpec


@dataclass(frozen=True)
class Line:
    """One stage of a plan.

    Attributes:
        stage: name of the stage in the ledger.
        flops: of the whole stage; the values that it reads and writes if `TRAFFIC` is counted.
        store_bytes: size of the results of the stage in the store.
        what: a short description for the reader.
        images: number of images that the stage processes, as the ledger counts them; 0: it is not known.
    """

    stage: str
    flops: float
    store_bytes: float
    what: str
    images: float = 0.0


@dataclass(frozen=True)
class Counted:
    """What is counted for an image: by a training step, and by a forward pass, of a model for an input shape."""

    train: Callable[[nn.Module, tuple[int, ...]], float]
    forward: Callable[[nn.Module, tuple[int, ...]], float]


FLOPS = Counted(train_flops, forward_flops)
TRAFFIC = Counted(train_traffic, forward_traffic)


def lines(resolved: Resolved, counted: Counted = FLOPS) -> list[Line]:
    """The stages of the recipe. A stage that several phases run has one line with the sums."""
    recipe, task = resolved.recipe, resolved.task
    size, classes = int(recipe.image_size or 32), len(task.classes)
    spec = StudentSpec.of(recipe, classes)
    student = on_meta(lambda: spec.make(bare=True).model)
    cost = StudentCost(student, size, counted)
    batch = int(recipe.train.batch_size or 1)
    scratch_steps = int(recipe.baselines.scratch_steps or recipe.train.steps or 1)
    validation = cost.forward(size) * len(task.val)
    linear = task_kind(recipe.task.kind).linear_student
    if not recipe.objective.has_transfer_set():
        flops, what = (
            cost.train(size) * scratch_steps * batch + validation * _validations(scratch_steps, BASELINE_EVALS),
            f"at most {scratch_steps} steps of {batch} labelled images",
        )
        if recipe.objective.traits.frozen:
            labelled = len(task.train) + len(task.val)
            flops, what = cost.forward(size) * labelled, f"a linear head on the features of {labelled} images"
        worked = 0 if recipe.objective.traits.frozen else scratch_steps * batch
        return [
            _labels(task, 1),
            _hygiene(task, 0.0),
            Line("finetune", flops, 0, what, worked),
            _evaluate(recipe, task, cost.forward(size)),
        ]
    teacher = teacher_cost(recipe, counted) if any(needs_teacher(phase) for _, phase in phases(recipe)) else None
    out = {"labels": _labels(task, 1 + (1 + len(recipe.teacher.others) if teacher else 0))}
    for name, phase in phases(recipe):
        for line in _pretraining(resolved, phase, cost, teacher):
            before = out.get(line.stage)
            what = f"{line.what} ({name})" if name else line.what
            if before is not None:
                flops, stored = before.flops + line.flops, before.store_bytes + line.store_bytes
                images = before.images + line.images
                out[line.stage] = Line(line.stage, flops, stored, f"{before.what}; {what}", images)
            else:
                out[line.stage] = replace(line, what=what)
    out["hygiene"] = _hygiene(task, teacher.tower if teacher else 0.0)
    f = recipe.finetune
    if f.steps:
        last = phases(recipe)[-1][1]
        replay = f.replay if last.objective.traits.replays else 0.0
        tuned = cost.train(size) * f.steps * f.batch_size * (1 + replay) + validation * _validations(f.steps, f.evals)
        if linear and not last.objective.traits.trains_classifier:
            tuned += _probe(task, cost, size)
        if teacher and last.teach.mode != "cached" and taught(last):
            tuned += teacher.together * f.steps * f.batch_size * replay
        text = f"{f.steps} steps of {f.batch_size}{' and replay' if replay else ''}"
        out["finetune"] = Line("finetune", tuned, 0, text, f.steps * (f.batch_size + round(f.batch_size * replay)))
    baselines = {
        "start": (recipe.baselines.start, "student from published weights, finetuned on the labels"),
        "scratch": (recipe.baselines.scratch, "student from scratch"),
    }
    ran = {name: what for name, (wanted, what) in baselines.items() if wanted}
    for name, what in ran.items():
        text = f"baseline: {what}, at most {scratch_steps} steps (stops early)"
        flops = cost.train(size) * scratch_steps * batch + validation * _validations(scratch_steps, BASELINE_EVALS)
        flops += _probe(task, cost, size) if name == "start" and recipe.student.fit_head is True else 0.0
        out[name] = Line(name, flops, 0, text, scratch_steps * batch)
    models = cost.forward(size) * (1 + len(ran)) + (teacher.together if teacher else 0.0)
    out["evaluate"] = _evaluate(recipe, task, models)
    return list(out.values())


def suggest_line(resolved: Resolved) -> Line:
    """SUGGEST of jobs/curate.py. The student of ``curate.student`` is counted as the one of the recipe."""
    recipe, task = resolved.recipe, resolved.task
    own = recipe.transfer.source == "target"
    images = len(task.unlabeled) if own else gallery_images(resolved)[0]
    # Training images are embedded with their mirror images; without a gallery, held-out ones too, and the candidates.
    embedded = 2 * len(task.train) + own * (images + 2 * (len(task.val) + len(task.test)))
    flops, read = teacher_cost(recipe).tower * embedded, 0
    if recipe.curate.student is not None:
        size, spec = int(recipe.image_size or 32), StudentSpec.of(recipe, len(task.classes))
        read = min(images, MOST_READ)
        flops += forward_flops(on_meta(lambda: spec.make(bare=True).model), (3, size, size)) * read
    text = f"{recipe.curate.suggest:,} of {images:,} images to label"
    return Line("suggest", flops, 100.0 * recipe.curate.suggest, text, embedded + read)


def models_text(resolved: Resolved) -> str:
    """The size of the student, and how much less it computes for an image than the teacher."""
    recipe, size = resolved.recipe, int(resolved.recipe.image_size or 32)
    spec = StudentSpec.of(recipe, len(resolved.task.classes))
    student = on_meta(lambda: spec.make(bare=True).model)
    flops = forward_flops(student, (3, size, size))
    parameters = sum(p.numel() for p in student.parameters())
    text = (
        f"{recipe.student.name} at {size} px: {parameters / 1e6:.3g} M parameters, {flops / 1e9:.3g} GFLOP for an image"
    )
    if any(needs_teacher(phase) for _, phase in phases(recipe)):
        tower = teacher_cost(recipe).tower
        times = f", {tower / flops:.2g} times as much" if tower > flops else ""
        text += f"; the teacher {recipe.teacher.name} takes {tower / 1e9:.3g} GFLOP{times}"
    return text


def traffic_of(resolved: Resolved) -> dict[str, float]:
    """By stage, its memory traffic in values."""
    return {line.stage: line.flops for line in lines(resolved, TRAFFIC)}


def _validations(steps: int, evals: int) -> int:
    """The number of validations in a training; an uneven last interval, which adds one, is left out: equal budgets
    (`ktray.jobs.compare.equal_budget`) rely on a cost that grows evenly with the steps."""
    return 1 + min(steps, evals)


def _probe(task: LabelledSet, cost: StudentCost, size: int) -> float:
    """FLOPs of a classifier that starts as a linear probe of the student's features; those of the probe are few."""
    return cost.forward(size) * (len(task.train) + len(task.val))


def _evaluate(recipe: Recipe, task: LabelledSet, models: float) -> Line:
    """EVALUATE, if all tested models together take ``models`` FLOPs for an image."""
    decided = len(task.val) if task_kind(recipe.task.kind).decides else 0
    what = [f"{decided:,} validation images for thresholds"] if decided else []
    what.append(f"{len(task.test):,} test images" if task.test else "no test split")
    images = decided + len(task.test)
    return Line("evaluate", models * images, 0, ", ".join(what), images)


def _labels(task: LabelledSet, models: int) -> Line:
    """LABELS, which decodes the labelled images for each model, without FLOPs."""
    images = len(task.train) + len(task.val)
    return Line("labels", 0, 0, f"{images:,} labelled images, decoded for each model ({models})", models * images)


def _hygiene(task: LabelledSet, tower: float) -> Line:
    """HYGIENE, if the teacher's tower takes ``tower`` FLOPs for an image. ADAPT has embedded all but the test split."""
    images = len(task.train) + len(task.val) + len(task.test)
    text = f"{images:,} labelled images: copies in two splits, contradicted labels"
    return Line("hygiene", tower * len(task.test), 0, text, images)


class StudentCost:
    """What is counted of the student for one image, by input size; each size is counted once."""

    def __init__(self, model: nn.Module, size: int, counted: Counted) -> None:
        self.model, self.size, self.counted = model, size, counted
        self.features = feature_dim(trunk(model))
        self.train = lru_cache(lambda side: counted.train(self.model, (3, side, side)))
        self.forward = lru_cache(lambda side: counted.forward(self.model, (3, side, side)))


@dataclass(frozen=True)
class TeacherCost:
    """What is counted for one image of the teacher's tower, of the towers of all teachers together, and of their linear
    heads for each class."""

    tower: float
    together: float
    heads: float
    width: int
    patch_dim: int


def teacher_cost(recipe: Recipe, counted: Counted = FLOPS) -> TeacherCost:
    t = recipe.teacher
    others = [TeacherSource(o.name, o.checkpoint, o.config, o.image_size) for o in t.others]
    return _costs((TeacherSource(str(t.name), t.checkpoint, t.config, t.image_size), *others), counted)


@lru_cache(maxsize=16)  # a comparison plans many runs with the same teachers
def _costs(sources: tuple[TeacherSource, ...], counted: Counted) -> TeacherCost:
    models = [build_teacher(source, device="meta") for source in sources]
    towers = [counted.forward(model.image_tower, (3, *model.preprocess.size)) for model in models]
    heads = 2.0 * sum(model.embed_dim for model in models)
    return TeacherCost(towers[0], sum(towers), heads, int(models[0].embed_dim), int(models[0].patch_dim or 0))


def _pretraining(resolved: Resolved, recipe: Recipe, cost: StudentCost, teacher: TeacherCost | None) -> Iterator[Line]:
    task, t = resolved.task, recipe.teacher
    size, classes = int(recipe.image_size or 32), len(task.classes)
    objective: Objective = recipe.objective.build()
    traits = recipe.objective.traits
    needs = traits.targets_needed
    known = teacher if teacher and needs_teacher(recipe) else TeacherCost(0.0, 0.0, 0.0, 0, 0)
    tower, together, width = known.tower, known.together, known.width
    predicts = "logits" in needs
    if tower:
        labelled = len(task.train) + len(task.val)
        adapt = together * labelled
        if predicts:
            # LoRA computes the gradients of all weights as well.
            trained = sum(
                3 * part.steps * part.batch_size + (2 + TOWER_EVALS) * len(task.val) for part in t.trainings().values()
            )
            adapt += together * trained
            labelled += sum(part.steps * part.batch_size + len(task.val) for part in t.trainings().values())
        how = str(t.adapt) if predicts else "probe"
        if t.others:
            how += f" of {1 + len(t.others)} teachers"
            adapt += together * len(task.val)  # to weight the teachers
        size_of_embeddings = (len(task.train) + len(task.val)) * width * 2
        yield Line("adapt", adapt, size_of_embeddings, f"{how} on {len(task.train)} labels", labelled)
    images = transfer_images(recipe, task)
    if recipe.transfer.source in ("generic", "retrieved", "list"):
        gallery, gallery_text = gallery_images(resolved)
        images = min(images, gallery) if gallery else images
        heldout = len(task.val) + len(task.test)
        # A random draw needs no embeddings: INDEX only stores fingerprints of the gallery.
        embeds = recipe.transfer.source != "generic"
        crops = Crops(recipe.gallery.crops, recipe.gallery.crop_count).most if embeds else 1
        gallery *= crops
        embedded = tower * (gallery - given_embeddings(recipe)) if embeds else 0.0
        products = 2.0 * (heldout + len(task.train)) if cost.counted is FLOPS else 1.0
        search_flops = tower * heldout + products * gallery * width if embeds else 0.0
        yield Line(
            "index",
            embedded,
            gallery * (width * 2 * embeds + 100),
            f"{gallery_text} gallery images" + (f", {crops} embeddings each" if crops > 1 else ""),
            gallery,
        )
        yield Line("curate", search_flops, images * 100, f"{recipe.transfer.source}, {images:,} images", gallery)
    else:
        yield Line("curate", 0, images * 100, f"{recipe.transfer.source}, {images:,} images", images)
    views = images * (1 if traits.views == "canvas" else recipe.teach.view_count)
    halves = per_prediction(classes, int(recipe.teach.top_k)) if predicts else 0
    halves += width if "embedding" in needs else 0
    if "patch_embedding" in needs and teacher:
        halves += teacher.patch_dim * map_shape(cost.model, size)[1] ** 2
    what = f"{recipe.teach.views} views of {images:,} images" if traits.views == "fixed" else f"{images:,} images"
    # A teacher that predicts maps computes its pooled embedding or its last patches in a second pass.
    pooled = task_kind(recipe.task.kind).teacher_form.POOLED
    passes = 1 + (predicts and not pooled and bool(needs & {"embedding", "patch_embedding"}))
    outputs = together * passes + (known.heads * classes if predicts and pooled else 0.0)
    stored, teacher_flops = recipe.teach.mode == "cached", outputs if taught(recipe) else 0.0
    if not stored:
        what = f"a list of {images:,} images ({recipe.teach.mode}: the teacher runs during training)"
    checked = checked_images(images) * (views // max(1, images))
    size_on_disk = views * (view_bytes(size, recipe.teach.jpeg) + 2 * halves)
    taught_flops, kept = (teacher_flops * (views + checked), size_on_disk) if stored else (0.0, 0.0)
    yield Line("teach", taught_flops, kept, what, views if stored else 0.0)
    steps, batch = int(recipe.train.steps or 1), int(recipe.train.batch_size or 1)
    objective.setup(_sizes(resolved, recipe, cost, teacher))
    per_step = (objective.flops(cost.train, cost.forward, size) + (0.0 if stored else teacher_flops)) * batch
    labelled_text = ""
    if traits.labelled:
        per_step += cost.train(size) * recipe.finetune.batch_size
        labelled_text = f" and {recipe.finetune.batch_size} labelled"
    validated = _validations(steps, recipe.train.evals) * len(task.val) * (traits.trains_classifier or traits.labelled)
    rows = batch + (recipe.finetune.batch_size if traits.labelled else 0)
    flops = per_step * steps + cost.forward(size) * validated
    flops += _probe(task, cost, size) if recipe.student.fit_head is True and traits.trains_classifier else 0.0
    yield Line("transfer", flops, 0, f"{steps} steps of {batch}{labelled_text}", steps * rows)


def _sizes(resolved: Resolved, recipe: Recipe, cost: StudentCost, teacher: TeacherCost | None) -> ObjectiveContext:
    size = int(recipe.image_size or 32)
    vocabulary, text_length = 2, 1
    if "text" in recipe.objective.traits.targets_needed and recipe.gallery.data is not None:
        tokens, vocabulary = tokenise(first_captions(recipe.gallery.data, recipe.gallery.column))
        text_length = tokens.shape[1]
    return ObjectiveContext(
        num_classes=len(resolved.task.classes),
        student_dim=cost.features,
        teacher_dim=teacher.width if teacher else None,
        teacher_patch_dim=teacher.patch_dim if teacher else None,
        seed=0,
        student=Features(cost.model),
        image_size=size,
        # The size for all captions is known only after reading them; a lookup in a text tower's table costs no FLOPs.
        vocabulary=vocabulary,
        text_length=text_length,
        source_classes=len(resolved.source.classes) if resolved.source else 0,
        student_map_dim=cost.features,
        teacher_sample=torch.zeros(1, teacher.width) if teacher else None,
    )
