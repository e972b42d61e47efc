"""Choose a value for each key that the recipe leaves open, from the data and the machine, and give the reason."""

from __future__ import annotations

import difflib
import io
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ktray.accounting.device import describe_device
from ktray.data.decode import formats
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.labelled.memory import kept_in, once
from ktray.data.labelled.more_labels import with_more_labels
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.base import Shard
from ktray.data.sources.fetch import fetch
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.missing_shards import missing_shards
from ktray.distributed.allocation import Allocation
from ktray.errors import KtrayError
from ktray.models.teacher.heads import DEFAULT_TEMPLATES
from ktray.pipeline.checks import cautions, require_files, task_counts, warnings
from ktray.pipeline.image_kinds import (
    batch_size,
    choose_augmentation,
    choose_baselines,
    choose_learning_rate,
    min_steps,
)
from ktray.pipeline.published import choose_start, choose_student, choose_teacher
from ktray.pipeline.teaching import choose_teaching
from ktray.recipe.choice import without_transfer_set
from ktray.recipe.places import with_absolute_places
from ktray.recipe.schema import Recipe, index_alone
from ktray.recipe.section import digest
from ktray.storage.store import STORE_MARK, Dir
from ktray.tasks.base import task_kind
from ktray.training.virtual_ranks import virtual_ranks

logger = logging.getLogger("ktray")

DEFAULT_TASK = "letters"
PAPER_TASKS = ("imagenet", "places365", "ham10k", "eurosat", "ade20k")
SAMPLE = 48


@dataclass
class Resolved:
    """A recipe in which every key has a value, and the data that was read to choose the values."""

    recipe: Recipe
    task: LabelledSet
    class_names: list[str]
    prompts: list[str]
    fingerprint: str
    canvas: float
    gallery_images: int | None
    source: LabelledSet | None
    reasons: list[str]


def _setter(recipe: Recipe, reasons: list[str]) -> Callable[[str, Any, str], None]:
    """A function that sets a key of ``recipe`` (key, value, reason) and appends the reason to ``reasons``."""

    def choose(key: str, value: Any, why: str) -> None:
        part: Any = recipe
        *path, name = key.split(".")
        for step in path:
            part = getattr(part, step)
        setattr(part, name, value)
        if why:
            text = str(value).lower() if isinstance(value, bool) else value
            reasons.append(f"{key}={f'{value:g}' if isinstance(value, float) else text} ({why})")

    return choose


def labels_of(recipe: Recipe) -> LabelledSet:
    """The labelled images of the task, before the other keys are chosen. The argument ``recipe`` is not changed."""
    recipe = with_absolute_places(recipe).model_copy(deep=True)
    return labelled_task(recipe, _setter(recipe, []))[0]


def resolve(recipe: Recipe, plan: Allocation) -> Resolved:
    """Read the labels, then choose a value for each open key. The argument ``recipe`` is not changed."""
    recipe = with_absolute_places(recipe).model_copy(deep=True)
    reasons: list[str] = []

    choose = _setter(recipe, reasons)
    require_files(recipe)
    reasons += warnings(recipe, describe_device())
    task, names, prompts = labelled_task(recipe, choose)
    reasons += [*task.notes, task_counts(task, task_kind(recipe.task.kind).image_classes)]
    if (recipe.transfer.source == "list") != (recipe.transfer.list is not None):
        raise KtrayError(
            "transfer.source=list and transfer.list=FILE must be set together, and one is missing",
            "Set both or neither.",
        )
    shards = _gallery(recipe, reasons)
    has_gallery = bool(shards) or index_alone(recipe)
    counts = [s.count for s in shards]
    gallery_images = None if None in counts or not shards else sum(c or 0 for c in counts)
    sides = _short_sides(task)
    median = int(statistics.median(sides)) if sides else 224
    on_gpu = plan.worker_gpus > 0

    choose_teacher(recipe, on_gpu, choose)
    reasons += cautions(recipe)
    if recipe.image_size is None:
        size = next((s for s in (224, 160, 128, 96, 64, 48, 32) if s <= median), 32)
        if not on_gpu and size > 128:
            choose("image_size", 128, f"median short side {median} px; larger inputs are slow without a GPU")
        else:
            choose("image_size", size, f"median short side of the labelled images is {median} px")
    size = int(recipe.image_size or 32)
    choose_student(recipe, size, on_gpu, choose)
    choose_start(recipe, choose)
    if recipe.transfer.source == "none" and recipe.objective.has_transfer_set():
        recipe.objective = without_transfer_set()
    if not recipe.objective.has_transfer_set():
        recipe.transfer.source = "none"
    name = recipe.objective.name
    traits = recipe.objective.traits
    if traits.classes and not task_kind(recipe.task.kind).image_classes:
        raise KtrayError(
            f"objective.name={name} needs one class for each image, which task.kind={recipe.task.kind} does not have",
            "Set objective.name=oriented or objective.name=agnostic.",
        )
    choose_augmentation(recipe, choose)
    choose_learning_rate(recipe, choose)
    choose_baselines(recipe, choose)
    source = _source(recipe) if "label" in traits.targets_needed else None
    if source is not None:
        gallery_images = len(source.train) + len(source.val) + len(source.test)
        if recipe.transfer.source not in ("auto", "generic"):
            raise KtrayError(
                f"objective.name={name} learns from supervised.data, not from transfer.source={recipe.transfer.source}",
                "Remove transfer.source from the recipe.",
            )
    count = recipe.gallery.crop_count
    if "grid" in (recipe.gallery.crops, recipe.transfer.query_crops) and math.isqrt(count) ** 2 != count:
        raise KtrayError(
            f"gallery.crop_count={count} is not the number of cells of a square grid",
            "Set gallery.crop_count=4, 9 or 16.",
        )
    if recipe.transfer.source == "auto":
        possible = ["retrieved", "generic", "target"] if has_gallery or source else ["target"]
        best = next((candidate for candidate in recipe.objective.sources if candidate in possible), "target")
        if "retrieved" not in possible:
            choose("transfer.source", best, "gallery.data is not set: the images of the task are the transfer set")
        elif best == "retrieved":
            choose("transfer.source", best, "there is a gallery")
        elif not traits.taught:
            choose("transfer.source", best, f"{name} has no teacher that could retrieve")
        else:
            choose("transfer.source", best, f"the best source for {name}")
    if recipe.transfer.source == "target" and "target" not in recipe.objective.sources:
        need = "captions" if "text" in traits.targets_needed else "a generic set"
        raise KtrayError(
            f"objective.name={name} needs {need}, which transfer.source=target does not provide",
            "Set gallery.data=DIR.",
        )
    if recipe.transfer.source in ("generic", "retrieved") and not has_gallery and source is None:
        raise KtrayError(f"transfer.source={recipe.transfer.source} needs a gallery", "Set gallery.data=DIR.")
    if traits.labelled and recipe.finetune.steps:
        choose("finetune.steps", 0, f"{name} learns from the labels while it is pretrained")
    if not traits.trains_classifier and not traits.labelled and not recipe.finetune.steps:
        raise KtrayError(
            f"objective.name={recipe.objective.name} leaves the student's classifier untrained, and finetune.steps=0",
            "Set finetune.steps to at least 1: finetuning trains the classifier.",
        )
    if recipe.transfer.size == "auto":
        if recipe.transfer.min_similarity is None and recipe.transfer.source == "retrieved":
            choose("transfer.min_similarity", "auto", "transfer.size=auto ends where images stop being on task")
        recipe.transfer.size = None
    classes_predicted = task_kind(recipe.task.kind).matching.exclusive
    if recipe.transfer.weight != "none" and not (classes_predicted and "logits" in traits.targets_needed):
        choose("transfer.weight", "none", f"{name} has no class predictions of the teacher to weight images by")
    if recipe.teacher.others and not (classes_predicted and "logits" in traits.targets_needed):
        choose("teacher.others", [], f"{name} has no class predictions of the teachers to average")
    if recipe.transfer.size is None and recipe.transfer.source in ("generic", "retrieved"):
        limit = 153_600 if on_gpu else 6_000
        if gallery_images is not None:
            limit = min(limit, max(1, gallery_images // 2))
        choose(
            "transfer.size", limit, "the paper's size" if limit == 153_600 else "chosen for this machine and gallery"
        )
    if recipe.transfer.size is None and recipe.transfer.source == "list" and gallery_images:
        choose("transfer.size", gallery_images, "all of the list")
    images = transfer_images(recipe, task)
    if recipe.train.batch_size is None:
        choose("train.batch_size", *batch_size(recipe, plan.least if on_gpu else 0))
    batch = int(recipe.train.batch_size or 128)
    labelled = [recipe.finetune.batch_size] if traits.labelled else []
    ranks = virtual_ranks(plan.least, plan.workers, batch, *labelled)
    each = -(-batch // ranks)
    share = "worker" if ranks == plan.workers else f"share (of {ranks}, for {plan.least} to {plan.workers} workers)"
    if each % recipe.train.accumulate or any(rows % recipe.train.accumulate for rows in labelled):
        raise KtrayError(
            f"train.accumulate={recipe.train.accumulate} does not divide the {each} images of a {share} "
            "into equal parts"
            + (f" (and the {recipe.finetune.batch_size} labelled images)" if traits.labelled else ""),
            "Set train.accumulate to a divisor of these numbers, or change train.batch_size.",
        )
    if recipe.train.accumulate > 1 and recipe.train.compile == "graphs":
        raise KtrayError(
            f"train.compile=graphs cannot add up the gradients of train.accumulate={recipe.train.accumulate} parts: "
            "each run of a CUDA graph overwrites those of the run before",
            "Set train.accumulate=1, or train.compile=true.",
        )
    if recipe.train.steps is None:
        epochs = recipe.train.epochs
        if epochs is None:
            epochs = 30.0 if on_gpu else max(2.0, min(30.0, 120_000 * (32 / size) ** 2 / max(1, images)))
            why = "as long as training helps, on a GPU" if on_gpu else "a few minutes on CPUs"
            least, kind = min_steps(recipe)
            if epochs * images < least * batch:
                epochs, why = least * batch / max(1, images), f"{kind}: at least {least} steps"
            choose("train.epochs", round(epochs, 2), why)
        choose("train.steps", max(1, round(epochs * images / batch)), f"{epochs:g} passes over {images} images")
    if recipe.train.epochs is None:
        recipe.train.epochs = round(int(recipe.train.steps or 1) * batch / max(1, images), 3)
    choose_teaching(recipe, plan, images, len(task.classes), choose)
    canvas = 1.0 if median <= size else 8 / 7
    fingerprint = digest(task.fingerprint, canvas)
    class_names = names or task.names or task.classes
    return Resolved(recipe, task, class_names, prompts, fingerprint, canvas, gallery_images, source, reasons)


def labelled_task(
    recipe: Recipe, choose: Callable[[str, Any, str], None]
) -> tuple[LabelledSet, list[str] | None, list[str]]:
    """The labelled images of the task, the class names of a built-in task (None for other tasks), and the prompts.

    Args:
        choose: sets an open key of the recipe; its arguments are the key, the value and the reason.
    """
    names: list[str] | None = None
    prompts: list[str] = list(recipe.task.prompts or DEFAULT_TEMPLATES)
    root = recipe.task.data
    if root is None:
        root, names, own_prompts = _builtin(recipe, choose)
        prompts = list(recipe.task.prompts or own_prompts)
    part, kind = recipe.task, task_kind(recipe.task.kind)
    if part.metric == "auto":
        choose("task.metric", next(iter(kind.metrics)), part.kind)
    if part.metric not in kind.metrics:
        near = difflib.get_close_matches(part.metric, kind.metrics, n=1, cutoff=0.3)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise KtrayError(
            f"task.kind={part.kind} has no metric '{part.metric}' (task.metric)",
            f"{hint}Available metrics: auto, {', '.join(kind.metrics)}.",
        )
    with kept_in(Dir(recipe.store).sub("labelled")):
        task = once(f"{root} {part.model_dump_json()}", lambda: kind.read(root, part))
        task = replace(task, notes=list(task.notes))
        return with_more_labels(task, part, kind.image_classes, kind.label_sets), names, prompts


def transfer_images(recipe: Recipe, task: LabelledSet) -> int:
    """The number of images that the transfer set will have. ``transfer.source=target`` has at most the images of the
    task."""
    own = len(task.train) + len(task.unlabeled)
    size = own if recipe.transfer.size in (None, "auto") else int(recipe.transfer.size or own)
    return min(size, own) if recipe.transfer.source == "target" else size


def resolve_gallery(recipe: Recipe, plan: Allocation) -> Resolved:
    """Resolve only what `jobs/index.py` needs from a recipe: the gallery and its encoder, without a task."""
    recipe = with_absolute_places(recipe).model_copy(deep=True)
    reasons: list[str] = []

    def choose(key: str, value: str, why: str) -> None:
        recipe.teacher.name = value
        reasons.append(f"{key}={value} ({why})")

    recipe.transfer.source, recipe.transfer.list = "retrieved", None
    if recipe.gallery.data is None:
        recipe.gallery.data = _own_gallery(recipe)
        reasons.append(f"gallery.data={recipe.gallery.data} (the built-in gallery)")
        if recipe.teacher.name is None:
            choose("teacher.name", "miniverse", "the small teacher that is part of ktray, for the built-in gallery")
    choose_teacher(recipe, plan.worker_gpus > 0, choose)
    counts = [shard.count for shard in _gallery(recipe, reasons)]
    images = None if None in counts else sum(c or 0 for c in counts)
    nothing = LabelledSet([], [], [], [])
    return Resolved(recipe, nothing, [], [], "", 1.0, images, None, reasons)


def _home(recipe: Recipe) -> Path:
    home = Path(recipe.store if "://" not in recipe.store else "ktray-store").expanduser() / "miniverse"
    if not home.exists():
        logger.info("miniverse drawing the built-in images (only once, takes a few seconds)")
        home.mkdir(parents=True)
        (home.parent / STORE_MARK).touch()
    return home


def _shared(recipe: Recipe, folder: Path) -> str:
    """A place of a folder with drawn images that all nodes can read: the folder itself for a local store, otherwise a
    copy in the store."""
    if "://" not in recipe.store:
        return str(folder)
    home = Dir(recipe.store).sub("miniverse")
    copy, whole = home.sub(folder.name), f"{folder.name}.whole"
    if not home.exists(whole):
        copy.put(folder)
        home.write(whole, b"all copied\n")
    return copy.uri


def _own_gallery(recipe: Recipe) -> str:
    from ktray.miniverse import ensure_gallery

    return _shared(recipe, ensure_gallery(_home(recipe)))


def _source(recipe: Recipe) -> LabelledSet:
    """The labelled generic set of an objective that learns from one."""
    if recipe.supervised.data is None:
        raise KtrayError(
            f"objective.name={recipe.objective.name} needs a labelled generic set, and supervised.data is not set",
            "Set supervised.data=DIR (class folders), or choose another objective.",
        )
    return read_labelled(recipe.supervised.data, seed=0)


def _builtin(recipe: Recipe, choose: Any) -> tuple[str, list[str], list[str]]:
    import json

    from ktray.miniverse import TASKS, ensure_gallery, ensure_generic_labels, ensure_task

    if recipe.task.name is None:
        choose("task.name", DEFAULT_TASK, "the built-in task")
    name = str(recipe.task.name)
    if name not in TASKS and name in PAPER_TASKS:
        raise KtrayError(
            f"Task '{name}' is a published data set, and task.data is not set",
            "Set task.data=DIR task.splits=DIR gallery.data=DIR; docs/guide/paper-tasks.md explains how to get them.",
        )
    if name not in TASKS:
        near = difflib.get_close_matches(name, list(TASKS), n=1, cutoff=0.3)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise KtrayError(
            f"No built-in task is named '{name}'",
            f"{hint}Built-in tasks: {', '.join(TASKS)}. For your own images, set task.data=DIR.",
        )
    home = _home(recipe)
    folder = ensure_task(home, name)
    facts = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    kind = facts.get("kind", recipe.task.kind)
    usual = next(iter(task_kind(kind).metrics))
    metric = facts.get("metric", usual)
    if recipe.task.kind != kind:
        choose("task.kind", kind, "from the built-in task")
    if recipe.task.metric == "auto" and metric != usual:
        choose("task.metric", metric, "from the built-in task")
    if "label" in recipe.objective.traits.targets_needed and recipe.supervised.data is None:
        recipe.supervised.data = _shared(recipe, ensure_generic_labels(home, name))
    needs_gallery = recipe.transfer.source in ("auto", "generic", "retrieved") and not index_alone(recipe)
    if recipe.gallery.data is None and needs_gallery:
        recipe.gallery.data = _shared(recipe, ensure_gallery(home, TASKS[name].gallery))
    if recipe.teacher.name is None:
        choose("teacher.name", "miniverse", "the small teacher that is part of ktray, for a built-in task")
    data = "/".join(filter(None, [_shared(recipe, folder), TASKS[name].file]))
    return data, [facts["class_names"][c] for c in facts["classes"]], facts["prompts"]


def _gallery(recipe: Recipe, notes: list[str]) -> list[Shard]:
    if recipe.transfer.source not in ("auto", "generic", "retrieved", "list"):
        return []
    g = recipe.gallery
    shards = gallery_shards(g.data, g.column, recipe.transfer.list, g.images)
    notes += missing_shards(path for shard in shards for path in shard.paths)
    return shards


def _short_sides(task: LabelledSet) -> list[int]:
    step = max(1, len(task.train) // SAMPLE)
    sides = []
    for _, data, _ in fetch([e.uri for e in task.train[::step][:SAMPLE]]):
        try:
            with Image.open(io.BytesIO(data or b""), formats=formats()) as image:
                sides.append(min(image.size))
        except Exception:  # any of Pillow's errors; the stage that decodes the image reports and counts it
            continue
    return sides
