"""The work of each stage of a plan: FLOPs, and bytes in the store.

FLOPs are counted on the real graphs of the models, on the meta device, and multiplied by the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ktray.data.captions import first_captions, tokenise
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.models.features import Features, feature_dim, map_shape, trunk
from ktray.models.flops import forward_flops, on_meta, train_flops
from ktray.models.teacher.load import build_teacher
from ktray.models.teacher.teacher import TeacherSource
from ktray.objectives.base import Objective, ObjectiveContext
from ktray.pipeline.phases import needs_teacher, phases, taught
from ktray.pipeline.plan_gallery import gallery_images, given_embeddings
from ktray.pipeline.resolve import Resolved, transfer_images
from ktray.recipe.schema import Recipe
from ktray.retrieval.crops import Crops
from ktray.stages.adapt.stage import TOWER_EVALS
from ktray.stages.finetune import BASELINE_EVALS
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
        flops: of the whole stage.
        store_bytes: size of the results of the stage in the store.
        what: a short description for the reader.
    """

    stage: str
    flops: float
    store_bytes: float
    what: str


def lines(resolved: Resolved) -> list[Line]:
    """The stages of the recipe. A stage that several phases run has one line with the sums."""
    recipe, task = resolved.recipe, resolved.task
    size, classes = int(recipe.image_size or 32), len(task.classes)
    spec = StudentSpec.of(recipe, classes)
    student = on_meta(lambda: spec.make(bare=True).model)
    cost = StudentCost(student, size)
    batch = int(recipe.train.batch_size or 1)
    scratch_steps = int(recipe.baselines.scratch_steps or recipe.train.steps or 1)
    validation = cost.forward(size) * len(task.val)
    if not recipe.objective.has_transfer_set():
        flops, what = (
            cost.train(size) * scratch_steps * batch + validation * (1 + BASELINE_EVALS),
            f"at most {scratch_steps} steps of {batch} labelled images",
        )
        if recipe.objective.traits.frozen:
            labelled = len(task.train) + len(task.val)
            flops, what = cost.forward(size) * labelled, f"a linear head on the features of {labelled} images"
        return [
            Line("hygiene", 0, 0, _checked(task)),
            Line("finetune", flops, 0, what),
            Line("evaluate", cost.forward(size) * len(task.test), 0, f"{len(task.test)} test images"),
        ]
    teacher = teacher_cost(recipe) if any(needs_teacher(phase) for _, phase in phases(recipe)) else None
    out: dict[str, Line] = {}
    for name, phase in phases(recipe):
        for line in _pretraining(resolved, phase, cost, teacher):
            before = out.get(line.stage)
            what = f"{line.what} ({name})" if name else line.what
            if before is not None:
                flops, stored = before.flops + line.flops, before.store_bytes + line.store_bytes
                out[line.stage] = Line(line.stage, flops, stored, f"{before.what}; {what}")
            else:
                out[line.stage] = Line(line.stage, line.flops, line.store_bytes, what)
    out["hygiene"] = Line("hygiene", teacher.tower * len(task.test) if teacher else 0, 0, _checked(task))
    f = recipe.finetune
    if f.steps:
        last = phases(recipe)[-1][1]
        replay = f.replay if last.objective.traits.replays else 0.0
        tuned = cost.train(size) * f.steps * f.batch_size * (1 + replay) + validation * (1 + f.evals)
        if teacher and last.teach.mode != "cached" and taught(last):
            tuned += teacher.together * f.steps * f.batch_size * replay
        out["finetune"] = Line(
            "finetune", tuned, 0, f"{f.steps} steps of {f.batch_size}{' and replay' if replay else ''}"
        )
    baselines = {
        "start": (recipe.baselines.start, "student from published weights, finetuned on the labels"),
        "scratch": (recipe.baselines.scratch, "student from scratch"),
    }
    ran = {name: what for name, (wanted, what) in baselines.items() if wanted}
    for name, what in ran.items():
        text = f"baseline: {what}, at most {scratch_steps} steps (stops early)"
        flops = cost.train(size) * scratch_steps * batch + validation * (1 + BASELINE_EVALS)
        out[name] = Line(name, flops, 0, text)
    models = cost.forward(size) * (1 + len(ran)) + (teacher.together if teacher else 0.0)
    out["evaluate"] = Line("evaluate", models * len(task.test), 0, f"{len(task.test):,} test images")
    return list(out.values())


def _checked(task: LabelledSet) -> str:
    images = len(task.train) + len(task.val) + len(task.test)
    return f"{images:,} labelled images: copies in two splits, contradicted labels"


class StudentCost:
    """FLOPs of the student for one image, by input size; each size is counted once."""

    def __init__(self, model: nn.Module, size: int) -> None:
        self.model, self.size = model, size
        self.features = feature_dim(trunk(model))
        self.train = lru_cache(lambda side: train_flops(self.model, (3, side, side)))
        self.forward = lru_cache(lambda side: forward_flops(self.model, (3, side, side)))


@dataclass(frozen=True)
class TeacherCost:
    """FLOPs for one image of the teacher's tower, and of all teachers together."""

    tower: float
    together: float
    width: int
    patch_dim: int


def teacher_cost(recipe: Recipe) -> TeacherCost:
    t = recipe.teacher
    sources = [TeacherSource(str(t.name), t.checkpoint, t.config, t.image_size)]
    sources += [TeacherSource(o.name, o.checkpoint, o.config, o.image_size) for o in t.others]
    models = [build_teacher(source, device="meta") for source in sources]
    towers = [forward_flops(model.image_tower, (3, *model.preprocess.size)) for model in models]
    return TeacherCost(towers[0], sum(towers), int(models[0].embed_dim), int(models[0].patch_dim or 0))


def _pretraining(resolved: Resolved, recipe: Recipe, cost: StudentCost, teacher: TeacherCost | None) -> Iterator[Line]:
    task, t = resolved.task, recipe.teacher
    size, classes = int(recipe.image_size or 32), len(task.classes)
    objective: Objective = recipe.objective.build()
    traits = recipe.objective.traits
    needs = traits.targets_needed
    known = teacher if teacher and needs_teacher(recipe) else TeacherCost(0.0, 0.0, 0, 0)
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
        how = str(t.adapt) if predicts else "probe"
        if t.others:
            how += f" of {1 + len(t.others)} teachers"
            adapt += together * len(task.val)  # to weight the teachers
        yield Line("adapt", adapt, labelled * width * 2, f"{how} on {len(task.train)} labels")
    images = transfer_images(recipe, task)
    if recipe.transfer.source in ("generic", "retrieved", "list"):
        gallery, gallery_text = gallery_images(resolved)
        heldout = len(task.val) + len(task.test)
        # A random draw needs no embeddings: INDEX only stores fingerprints of the gallery.
        embeds = recipe.transfer.source != "generic"
        crops = Crops(recipe.gallery.crops, recipe.gallery.crop_count).most if embeds else 1
        gallery *= crops
        embedded = tower * (gallery - given_embeddings(recipe)) if embeds else 0.0
        search_flops = tower * heldout + 2.0 * gallery * width * (heldout + len(task.train)) if embeds else 0.0
        yield Line(
            "index",
            embedded,
            gallery * (width * 2 * embeds + 100),
            f"{gallery_text} gallery images" + (f", {crops} embeddings each" if crops > 1 else ""),
        )
        yield Line("curate", search_flops, images * 100, f"{recipe.transfer.source}, {images:,} images")
    views = images * (1 if traits.views == "canvas" else recipe.teach.view_count)
    halves = per_prediction(classes, int(recipe.teach.top_k)) if predicts else 0
    halves += width if "embedding" in needs else 0
    if "patch_embedding" in needs and teacher:
        halves += teacher.patch_dim * map_shape(cost.model, size)[1] ** 2
    what = f"{recipe.teach.views} views of {images:,} images" if traits.views == "fixed" else f"{images:,} images"
    # A teacher that predicts maps computes its pooled embedding or its last patches in a second pass.
    passes = 1 + (predicts and bool(needs - {"logits"}) and not task_kind(recipe.task.kind).teacher_form.POOLED)
    stored, teacher_flops = recipe.teach.mode == "cached", together * passes if taught(recipe) else 0.0
    if not stored:
        what = f"a list of {images:,} images ({recipe.teach.mode}: the teacher runs during training)"
    checked = checked_images(images) * (views // max(1, images))
    size_on_disk = views * (view_bytes(size, recipe.teach.jpeg) + 2 * halves)
    yield Line("teach", teacher_flops * (views + checked) if stored else 0.0, size_on_disk if stored else 0, what)
    steps, batch = int(recipe.train.steps or 1), int(recipe.train.batch_size or 1)
    objective.setup(_sizes(resolved, recipe, cost, teacher))
    per_step = (objective.flops(cost.train, cost.forward, size) + (0.0 if stored else teacher_flops)) * batch
    labelled_text = ""
    if traits.labelled:
        per_step += cost.train(size) * recipe.finetune.batch_size
        labelled_text = f" and {recipe.finetune.batch_size} labelled"
    validated = (1 + recipe.train.evals) * len(task.val) * (traits.trains_classifier or traits.labelled)
    yield Line(
        "transfer", per_step * steps + cost.forward(size) * validated, 0, f"{steps} steps of {batch}{labelled_text}"
    )


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
