"""``--plan``: what a run would do, what is there already, and what the rest will cost. Nothing is run.

FLOPs are counted on the models' real graphs on the meta device, times the samples that will be processed.
Time and money divide them by a stated rate, so they are no better than that rate; the ledger tells the truth.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from ktray.accounting.device import describe_device
from ktray.accounting.prices import hourly_price
from ktray.data.captions import first_captions, tokenise
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
from ktray.training.inputs import StudentSpec

logger = logging.getLogger("ktray")

# Sustained FLOP/s per device in training and embedding: 35% of the dense bf16 peak of NVIDIA's data sheets.
RATES = {"H200": 346e12, "H100": 346e12, "A100": 109e12, "L40S": 127e12, "L4": 42e12, "A10G": 24e12, "T4": 23e12}
GPU_RATE = 42e12
CORE_RATE = 30e9  # one CPU core, fp32; measured figures lie between 10 and 60 GFLOP/s for these models


HEAD = f"\n{'stage':<10}{'in store':<10}{'FLOPs':>12}{'device-hours':>14}{'USD':>10}{'store':>10}  what"


@dataclass(frozen=True)
class Line:
    """One stage of a plan. ``flops``, ``store_bytes`` are totals; ``seconds`` are device-seconds."""

    stage: str
    flops: float
    store_bytes: float
    what: str


def lines(found: Resolved) -> list[Line]:
    """The stages that the recipe will go through; those of several phases are added up."""
    recipe, task = found.recipe, found.task
    size, classes = int(recipe.image_size or 32), len(task.classes)
    spec = StudentSpec.of(recipe, classes)
    student = on_meta(lambda: spec.make(bare=True).model)
    cost = _Student(student, size)
    batch = int(recipe.train.batch_size or 1)
    floor = int(recipe.baselines.scratch_steps or recipe.train.steps or 1)
    if not recipe.objective.has_transfer_set():
        return [
            Line("finetune", cost.train(size) * floor * batch, 0, f"at most {floor} steps of {batch} labelled images"),
            Line("evaluate", cost.forward(size) * len(task.test), 0, f"{len(task.test)} test images"),
        ]
    teacher = _teacher(recipe) if any(needs_teacher(phase) for _, phase in phases(recipe)) else None
    out: dict[str, Line] = {}
    for name, phase in phases(recipe):
        for line in _pretraining(found, phase, cost, teacher):
            before = out.get(line.stage)
            what = f"{line.what} ({name})" if name else line.what
            if before is not None:
                flops, stored = before.flops + line.flops, before.store_bytes + line.store_bytes
                out[line.stage] = Line(line.stage, flops, stored, f"{before.what}; {what}")
            else:
                out[line.stage] = Line(line.stage, line.flops, line.store_bytes, what)
    f = recipe.finetune
    if f.steps:
        last = phases(recipe)[-1][1]
        replay = f.replay if last.objective.traits.replays else 0.0
        tuned = cost.train(size) * f.steps * f.batch_size * (1 + replay)
        if teacher and last.teach.mode != "cached" and taught(last):
            tuned += teacher.tower * f.steps * f.batch_size * replay
        out["finetune"] = Line(
            "finetune", tuned, 0, f"{f.steps} steps of {f.batch_size}{' and replay' if replay else ''}"
        )
    if recipe.baselines.scratch:
        what = f"the floor, at most {floor} steps (stops early)"
        out["scratch"] = Line("scratch", cost.train(size) * floor * batch, 0, what)
    models = cost.forward(size) * (2 if recipe.baselines.scratch else 1) + (teacher.tower if teacher else 0.0)
    out["evaluate"] = Line("evaluate", models * len(task.test), 0, f"{len(task.test):,} test images")
    return list(out.values())


class _Student:
    """FLOPs of a student's image by input size, each counted once."""

    def __init__(self, model: nn.Module, size: int) -> None:
        self.model, self.size = model, size
        self.features = feature_dim(trunk(model))
        self.train = lru_cache(lambda side: train_flops(self.model, (3, side, side)))
        self.forward = lru_cache(lambda side: forward_flops(self.model, (3, side, side)))


@dataclass(frozen=True)
class _Teacher:
    tower: float
    width: int
    patch_dim: int


def _teacher(recipe: Recipe) -> _Teacher:
    t = recipe.teacher
    model = build_teacher(TeacherSource(str(t.name), t.checkpoint, t.config, t.image_size), device="meta")
    tower = forward_flops(model.image_tower, (3, *model.preprocess.size))
    return _Teacher(tower, int(model.embed_dim), int(model.patch_dim or 0))


def _pretraining(found: Resolved, recipe: Recipe, cost: _Student, teacher: _Teacher | None) -> Iterator[Line]:
    task, t = found.task, recipe.teacher
    size, classes = int(recipe.image_size or 32), len(task.classes)
    objective: Objective = recipe.objective.build()
    traits = recipe.objective.traits
    needs = traits.targets_needed
    tower, width = (teacher.tower, teacher.width) if teacher and needs_teacher(recipe) else (0.0, 0)
    predicts = "logits" in needs
    if tower:
        labelled = len(task.train) + len(task.val)
        adapt = tower * labelled
        if predicts and (t.adapt == "finetune" or (t.adapt == "auto" and "finetune" in t.candidates)):
            adapt += 3 * tower * t.finetune.steps * t.finetune.batch_size
        how = t.adapt if predicts else "probe"
        yield Line("adapt", adapt, labelled * width * 2, f"{how} on {len(task.train)} labels")
    images = transfer_images(recipe, task)
    if recipe.transfer.source in ("generic", "retrieved", "list"):
        gallery, known = _gallery_images(found)
        held = len(task.val) + len(task.test)
        # A random draw asks the teacher for nothing: the gallery is fingerprinted, not embedded.
        looked = recipe.transfer.source != "generic"
        crops = Crops(recipe.gallery.crops, recipe.gallery.crop_count).most if looked else 1
        gallery *= crops
        embedded = tower * (gallery - _given(recipe)) if looked else 0.0
        found_by = tower * held + 2.0 * gallery * width * (held + len(task.train)) if looked else 0.0
        yield Line(
            "index",
            embedded,
            gallery * (width * 2 * looked + 100),
            f"{known} gallery images" + (f", {crops} rows each" if crops > 1 else ""),
        )
        yield Line("curate", found_by, images * 100, f"{recipe.transfer.source}, {images:,} images")
    views = images * (1 if traits.views == "canvas" else recipe.teach.views)
    halves = per_prediction(classes, int(recipe.teach.top_k)) if predicts else 0
    halves += width if "embedding" in needs else 0
    if "patch_embedding" in needs and teacher:
        halves += teacher.patch_dim * map_shape(cost.model, size)[1] ** 2
    what = f"{recipe.teach.views} views of {images:,} images" if traits.views == "fixed" else f"{images:,} images"
    stored, asked = recipe.teach.mode == "cached", tower if taught(recipe) else 0.0
    if not stored:
        what = f"a list of {images:,} images ({recipe.teach.mode}: the teacher works while the student trains)"
    checked = checked_images(images) * (views // max(1, images))
    size_on_disk = views * (view_bytes(size, recipe.teach.jpeg) + 2 * halves)
    yield Line("teach", asked * (views + checked) if stored else 0.0, size_on_disk if stored else 0, what)
    steps, batch = int(recipe.train.steps or 1), int(recipe.train.batch_size or 1)
    objective.setup(_sizes(found, recipe, cost, teacher))
    per_step = (objective.flops(cost.train, cost.forward, size) + (0.0 if stored else asked)) * batch
    beside = ""
    if traits.labelled:
        per_step += cost.train(size) * recipe.finetune.batch_size
        beside = f" and {recipe.finetune.batch_size} labelled"
    yield Line("transfer", per_step * steps, 0, f"{steps} steps of {batch}{beside}")


def _sizes(found: Resolved, recipe: Recipe, cost: _Student, teacher: _Teacher | None) -> ObjectiveContext:
    size = int(recipe.image_size or 32)
    vocabulary, text_length = 2, 1
    if "text" in recipe.objective.traits.targets_needed and recipe.gallery.data is not None:
        tokens, vocabulary = tokenise(first_captions(recipe.gallery.data, recipe.gallery.column))
        text_length = tokens.shape[1]
    return ObjectiveContext(
        num_classes=len(found.task.classes),
        student_dim=cost.features,
        teacher_dim=teacher.width if teacher else None,
        teacher_patch_dim=teacher.patch_dim if teacher else None,
        seed=0,
        student=Features(cost.model),
        image_size=size,
        # Those of all captions are known when they have been read; a text tower's table costs no FLOPs.
        vocabulary=vocabulary,
        text_length=text_length,
        source_classes=len(found.source.classes) if found.source else 0,
        student_map_dim=cost.features,
    )


def _given(recipe: Recipe) -> int:
    """Gallery images whose embeddings others have made."""
    g = recipe.gallery
    shards = embedded_only(g.data, g.images) if g.data is not None and recipe.transfer.list is None else []
    return sum(s.count or 0 for s in shards)


def _gallery_images(found: Resolved) -> tuple[int, str]:
    """How many, and how sure that is. Tars do not tell: local ones are judged by the first one's images a byte."""
    if found.gallery_images is not None:
        return found.gallery_images, f"{found.gallery_images:,}"
    recipe, g = found.recipe, found.recipe.gallery
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
    nodes = low if low < high else 1  # on CPUs such workers have a node each; as many like this one
    return allocate(cores * nodes, float(len(gpus)), nodes, (low, high), recipe.cluster.use_gpu)


def show(recipe: Recipe, until: str | None = None) -> None:
    """Print the plan of this machine, to the end or ``until`` a stage; with ``RAY_ADDRESS`` set it is still this
    machine that is described."""
    local = this_machine(recipe)
    logger.info(local.line)
    found = resolve(recipe, local)
    for reason in found.reasons:
        logger.info(f"recipe    {reason}")
    rate, price, kind = machine(recipe)
    store = Store(found.recipe.store)
    whole, unknown = _whole(store, found, local)
    logger.info(HEAD)
    total = saved = 0.0
    planned = lines(found)
    last = next((i for i, line in enumerate(planned) if line.stage == until), len(planned) - 1)
    for line in planned[: last + 1]:
        there = whole.get(line.stage, False)
        total += line.flops
        saved += line.flops if there else 0.0
        state = "reused" if there else "to make"
        logger.info(_row(line.stage, state, line.flops, rate, price, line.store_bytes, line.what))
    logger.info(_row("total", "", total, rate, price, 0, ""))
    if saved:
        logger.info(_row("to spend", "", total - saved, rate, price, 0, "without the stages that are reused"))
    logger.info(f"\nat {rate / 1e12:.3g} TFLOP/s sustained on {kind} (assumed); decoding and start-up come on top")
    logger.info(f"store     {store.uri}; {unknown or 'stages that it holds whole are reused at no cost'}")


def show_index(recipe: Recipe) -> None:
    """Print what embedding the gallery takes; nothing is run."""
    found = resolve_gallery(recipe, this_machine(recipe))
    for reason in found.reasons:
        logger.info(f"recipe    {reason}")
    rate, price, kind = machine(recipe)
    teacher = _teacher(found.recipe)
    images, known = _gallery_images(found)
    crops = Crops(recipe.gallery.crops, recipe.gallery.crop_count).most
    rows = images * crops
    logger.info(HEAD)
    what = f"{known} gallery images" + (f", {crops} rows each" if crops > 1 else "")
    logger.info(
        _row("index", "", teacher.tower * (rows - _given(recipe)), rate, price, rows * (teacher.width * 2 + 100), what)
    )
    logger.info(f"\nat {rate / 1e12:.3g} TFLOP/s sustained on {kind} (assumed); decoding comes on top")
    logger.info("shards that the index holds already cost nothing")


def machine(recipe: Recipe) -> tuple[float, float | None, str]:
    """FLOP/s that are assumed, USD an hour, and what the machine is."""
    device = describe_device()
    gpus = device.get("gpus") or []
    name = str(gpus[0]["name"]) if gpus else ""
    rate = next((r for n, r in RATES.items() if n in name), GPU_RATE) if gpus else CORE_RATE * int(device["cores"])
    return rate, hourly_price(device, recipe.prices), name or f"{device['cores']} CPU cores"


def _whole(store: Store, found: Resolved, local: Allocation) -> tuple[dict[str, bool], str]:
    """Which stages are whole, by name; and why that is not known, where the teacher is not on this machine."""
    import huggingface_hub.constants

    from ktray.pipeline.run import whole_stages

    was = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a plan downloads nothing
    try:
        return whole_stages(store, found, local), ""
    except KtrayError as error:
        return {}, f"what it holds of this run is not known: {error.what}"
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = was


def _row(stage: str, state: str, flops: float, rate: float, price: float | None, stored: float, what: str) -> str:
    hours = flops / rate / 3600
    usd = f"{hours * price:.4f}" if price is not None else "?"
    size = f"{stored / 1e6:.1f} MB" if stored else ""
    return f"{stage:<10}{state:<10}{flops:>12.3g}{hours:>14.4f}{usd:>10}{size:>10}  {what}"
