"""``--plan``: the stages of a run, which of them the store holds already, and what the others will cost. Nothing runs.

FLOPs are counted on the real graphs of the models, on the meta device, and multiplied by the number of samples. Time
and money follow from an assumed rate (FLOP/s), so they are only as accurate as that rate; the ledger of a run has the
measured values.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ktray.accounting.device import describe_device
from ktray.accounting.prices import hourly_price
from ktray.data.captions import first_captions, tokenise
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.sources.lists import embedded_only, gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.distributed.allocation import Allocation, allocate
from ktray.errors import KtrayError
from ktray.models.features import Features, feature_dim, map_shape, trunk
from ktray.models.flops import forward_flops, on_meta, train_flops
from ktray.models.teacher.load import build_teacher
from ktray.models.teacher.teacher import TeacherSource
from ktray.objectives.base import Objective, ObjectiveContext
from ktray.pipeline.phases import needs_teacher, phases, taught
from ktray.pipeline.resolve import Resolved, resolve, resolve_gallery, transfer_images
from ktray.recipe.schema import Recipe
from ktray.retrieval.crops import Crops
from ktray.stages.teach.shards import checked_images
from ktray.storage.store import Store
from ktray.targets.jpeg import view_bytes
from ktray.targets.top_k import per_prediction
from ktray.tasks.base import task_kind
from ktray.training.inputs import StudentSpec

logger = logging.getLogger("ktray")

# Sustained FLOP/s per device in training and embedding: 35% of the dense bf16 peak of NVIDIA's data sheets.
RATES = {"H200": 346e12, "H100": 346e12, "A100": 109e12, "L40S": 127e12, "L4": 42e12, "A10G": 24e12, "T4": 23e12}
GPU_RATE = 42e12
CORE_RATE = 30e9  # one CPU core, fp32; these models reach between 10 and 60 GFLOP/s in measurements


HEAD = f"\n{'stage':<10}{'in store':<10}{'FLOPs':>12}{'device-hours':>14}{'USD':>10}{'store':>10}  what"


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
    cost = _Student(student, size)
    batch = int(recipe.train.batch_size or 1)
    scratch_steps = int(recipe.baselines.scratch_steps or recipe.train.steps or 1)
    if not recipe.objective.has_transfer_set():
        flops, what = (
            cost.train(size) * scratch_steps * batch,
            f"at most {scratch_steps} steps of {batch} labelled images",
        )
        if recipe.objective.traits.frozen:
            labelled = len(task.train) + len(task.val)
            flops, what = cost.forward(size) * labelled, f"a linear head on the features of {labelled} images"
        return [
            Line("hygiene", 0, 0, _checked(task)),
            Line("finetune", flops, 0, what),
            _evaluate(recipe, task, cost.forward(size)),
        ]
    teacher = _teacher(recipe) if any(needs_teacher(phase) for _, phase in phases(recipe)) else None
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
        tuned = cost.train(size) * f.steps * f.batch_size * (1 + replay)
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
        out[name] = Line(name, cost.train(size) * scratch_steps * batch, 0, text)
    models = cost.forward(size) * (1 + len(ran)) + (teacher.together if teacher else 0.0)
    out["evaluate"] = _evaluate(recipe, task, models)
    return list(out.values())


def _evaluate(recipe: Recipe, task: LabelledSet, models: float) -> Line:
    """EVALUATE, if all tested models together take ``models`` FLOPs for an image."""
    decided = len(task.val) if task_kind(recipe.task.kind).decides else 0
    first = f"{decided:,} validation images for thresholds, " if decided else ""
    return Line("evaluate", models * (decided + len(task.test)), 0, f"{first}{len(task.test):,} test images")


def _checked(task: LabelledSet) -> str:
    images = len(task.train) + len(task.val) + len(task.test)
    return f"{images:,} labelled images: copies in two splits, contradicted labels"


class _Student:
    """FLOPs of the student for one image, by input size; each size is counted once."""

    def __init__(self, model: nn.Module, size: int) -> None:
        self.model, self.size = model, size
        self.features = feature_dim(trunk(model))
        self.train = lru_cache(lambda side: train_flops(self.model, (3, side, side)))
        self.forward = lru_cache(lambda side: forward_flops(self.model, (3, side, side)))


@dataclass(frozen=True)
class _Teacher:
    """FLOPs for one image of the teacher's tower, and of all teachers together."""

    tower: float
    together: float
    width: int
    patch_dim: int


def _teacher(recipe: Recipe) -> _Teacher:
    t = recipe.teacher
    sources = [TeacherSource(str(t.name), t.checkpoint, t.config, t.image_size)]
    sources += [TeacherSource(o.name, o.checkpoint, o.config, o.image_size) for o in t.others]
    models = [build_teacher(source, device="meta") for source in sources]
    towers = [forward_flops(model.image_tower, (3, *model.preprocess.size)) for model in models]
    return _Teacher(towers[0], sum(towers), int(models[0].embed_dim), int(models[0].patch_dim or 0))


def _pretraining(resolved: Resolved, recipe: Recipe, cost: _Student, teacher: _Teacher | None) -> Iterator[Line]:
    task, t = resolved.task, recipe.teacher
    size, classes = int(recipe.image_size or 32), len(task.classes)
    objective: Objective = recipe.objective.build()
    traits = recipe.objective.traits
    needs = traits.targets_needed
    known = teacher if teacher and needs_teacher(recipe) else _Teacher(0.0, 0.0, 0, 0)
    tower, together, width = known.tower, known.together, known.width
    predicts = "logits" in needs
    if tower:
        labelled = len(task.train) + len(task.val)
        adapt = together * labelled
        if predicts:
            # LoRA computes the gradients of all weights as well.
            adapt += sum(3 * together * part.steps * part.batch_size for part in t.trainings().values())
        how = str(t.adapt) if predicts else "probe"
        if t.others:
            how += f" of {1 + len(t.others)} teachers"
            adapt += together * len(task.val)  # to weight the teachers
        yield Line("adapt", adapt, labelled * width * 2, f"{how} on {len(task.train)} labels")
    images = transfer_images(recipe, task)
    if recipe.transfer.source in ("generic", "retrieved", "list"):
        gallery, gallery_text = _gallery_images(resolved)
        heldout = len(task.val) + len(task.test)
        # A random draw needs no embeddings: INDEX only stores fingerprints of the gallery.
        embeds = recipe.transfer.source != "generic"
        crops = Crops(recipe.gallery.crops, recipe.gallery.crop_count).most if embeds else 1
        gallery *= crops
        embedded = tower * (gallery - _given(recipe)) if embeds else 0.0
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
    stored, teacher_flops = recipe.teach.mode == "cached", together if taught(recipe) else 0.0
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
    yield Line("transfer", per_step * steps, 0, f"{steps} steps of {batch}{labelled_text}")


def _sizes(resolved: Resolved, recipe: Recipe, cost: _Student, teacher: _Teacher | None) -> ObjectiveContext:
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


def _given(recipe: Recipe) -> int:
    """The number of gallery images that come with embeddings."""
    g = recipe.gallery
    shards = embedded_only(g.data, g.images) if g.data is not None and recipe.transfer.list is None else []
    return sum(s.count or 0 for s in shards)


def _gallery_images(resolved: Resolved) -> tuple[int, str]:
    """The number of gallery images, and the same as text that says how reliable it is.

    A tar file does not state its number of images. For local tar files it is estimated from their sizes and the images
    per byte of the first one.
    """
    if resolved.gallery_images is not None:
        return resolved.gallery_images, f"{resolved.gallery_images:,}"
    recipe, g = resolved.recipe, resolved.recipe.gallery
    shards = gallery_shards(g.data, g.column, recipe.transfer.list, g.images)
    unknown = [s for s in shards if s.count is None]
    sizes = [os.path.getsize(s.paths[0]) for s in unknown if os.path.isfile(s.paths[0])]
    if len(sizes) < len(unknown):
        return 0, "an unknown number of"
    images = sum(record.error is None for record in read_shard(unknown[0]))
    guess = images * sum(sizes) / max(1, sizes[0])
    total = round(guess) + sum(s.count or 0 for s in shards)
    return total, f"about {total:,}"


def this_machine(recipe: Recipe) -> Allocation:
    """How the recipe would use this machine."""
    device = describe_device()
    gpus = device.get("gpus") or []
    cores = max(2.0, float(device["cores"]))
    low, high = recipe.cluster.span
    nodes = low if low < high else 1  # on CPUs each worker has a node; assume that all nodes are like this one
    return allocate(
        cores * nodes, float(len(gpus)), nodes, (low, high), recipe.cluster.use_gpu, gpu_share=recipe.cluster.gpu_share
    )


def show(recipe: Recipe, until: str | None = None) -> None:
    """Print the plan for this machine, also when ``RAY_ADDRESS`` is set.

    Args:
        recipe: the recipe, resolved or not.
        until: the last stage to print; None: all stages.
    """
    local = this_machine(recipe)
    logger.info(local.line)
    resolved = resolve(recipe, local)
    for reason in resolved.reasons:
        logger.info(f"recipe    {reason}")
    rate, price, kind = machine(recipe)
    store = Store(resolved.recipe.store)
    whole, unknown = _whole(store, resolved, local)
    logger.info(HEAD)
    total = saved = 0.0
    planned = lines(resolved)
    last = next((i for i, line in enumerate(planned) if line.stage == until), len(planned) - 1)
    for line in planned[: last + 1]:
        there = whole.get(line.stage, False)
        total += line.flops
        saved += line.flops if there else 0.0
        state = "reused" if there else "to run"
        logger.info(_row(line.stage, state, line.flops, rate, price, line.store_bytes, line.what))
    logger.info(_row("total", "", total, rate, price, 0, ""))
    if saved:
        logger.info(_row("to spend", "", total - saved, rate, price, 0, "excludes the stages that are reused"))
    logger.info(f"\nat {rate / 1e12:.3g} TFLOP/s sustained on {kind} (assumed), without decoding and start-up")
    logger.info(f"store     {store.uri}; {unknown or 'complete stages in the store are reused at no cost'}")


def show_index(recipe: Recipe) -> None:
    """Print the plan for embedding the gallery. Nothing runs."""
    resolved = resolve_gallery(recipe, this_machine(recipe))
    for reason in resolved.reasons:
        logger.info(f"recipe    {reason}")
    rate, price, kind = machine(recipe)
    teacher = _teacher(resolved.recipe)
    images, images_text = _gallery_images(resolved)
    crops = Crops(recipe.gallery.crops, recipe.gallery.crop_count).most
    rows = images * crops
    logger.info(HEAD)
    what = f"{images_text} gallery images" + (f", {crops} embeddings each" if crops > 1 else "")
    logger.info(
        _row("index", "", teacher.tower * (rows - _given(recipe)), rate, price, rows * (teacher.width * 2 + 100), what)
    )
    logger.info(f"\nat {rate / 1e12:.3g} TFLOP/s sustained on {kind} (assumed), without decoding")
    logger.info("shards that are already in the index cost nothing")


def machine(recipe: Recipe) -> tuple[float, float | None, str]:
    """The assumed FLOP/s, the price in USD per hour (None: unknown), and the name of the device."""
    device = describe_device()
    gpus = device.get("gpus") or []
    name = str(gpus[0]["name"]) if gpus else ""
    rate = next((r for n, r in RATES.items() if n in name), GPU_RATE) if gpus else CORE_RATE * int(device["cores"])
    return rate, hourly_price(device, recipe.prices), name or f"{device['cores']} CPU cores"


def _whole(store: Store, resolved: Resolved, local: Allocation) -> tuple[dict[str, bool], str]:
    """By name, whether the store holds each stage completely; and, where the teacher is not on this machine, the reason
    why that is not known."""
    import huggingface_hub.constants

    from ktray.pipeline.run import whole_stages

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a plan downloads nothing
    try:
        return whole_stages(store, resolved, local), ""
    except KtrayError as error:
        return {}, f"the stages that it holds are not known: {error.what}"
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _row(stage: str, state: str, flops: float, rate: float, price: float | None, stored: float, what: str) -> str:
    hours = flops / rate / 3600
    usd = f"{hours * price:.4f}" if price is not None else "?"
    size = f"{stored / 1e6:.1f} MB" if stored else ""
    return f"{stage:<10}{state:<10}{flops:>12.3g}{hours:>14.4f}{usd:>10}{size:>10}  {what}"
