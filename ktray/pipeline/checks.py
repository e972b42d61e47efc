"""Checks of a recipe before anything is paid: files that do not exist, names that name nothing, disks that are full."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ktray.accounting.prices import price_table
from ktray.data import filesystem
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.errors import KtrayError
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.storage.store import Dir
from ktray.tasks.base import task_kind

_FEW_GB = 2.0
_SHOWN = 8


def require_files(recipe: Recipe) -> None:
    """Check that the files of weights and configs exist.

    Raises:
        KtrayError: one does not; the message has the nearest name in its folder.
    """
    for key, path in _files(recipe):
        place = filesystem.normalise(path)
        try:
            found = filesystem.stat(place)
        except OSError as error:
            raise KtrayError(
                f"{key}={path} cannot be read: {filesystem.why(error)}", "Check its permissions."
            ) from error
        if found is None:
            raise KtrayError(f"There is no file '{path}' ({key})", filesystem.missing(place))


def _files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    teacher, student = recipe.teacher, recipe.student
    others = [("teacher.others", other) for other in teacher.others]
    # Files of a teacher without a name are refused for another reason, when the teacher is chosen.
    parts = [*([("teacher", teacher)] if teacher.name else []), *others, ("student", student)]
    for prefix, part in parts:
        for name in ("checkpoint", "config"):
            if path := getattr(part, name, None):
                yield f"{prefix}.{name}", path


def task_counts(task: LabelledSet, image_classes: bool) -> str:
    """The labelled images in words: the classes by name and the numbers of images by split, as a sentence.

    Args:
        image_classes: whether each image has one class, so that the images of a class can be counted.
    """
    splits = {"training": task.train, "validation": task.val, "test": task.test}
    text = ", ".join(f"{len(images):,} {name}" for name, images in splits.items()) + " images"
    shown = ", ".join(task.classes[:_SHOWN]) + (", ..." if len(task.classes) > _SHOWN else "")
    text = f"{len(task.classes)} classes ({shown}): {text}" if task.classes else text
    if not image_classes or not task.classes:
        return text
    least_and_most = []
    for name, images in splits.items():
        each = Counter(example.label for example in images)
        if images:
            numbers = sorted({each[i] for i in range(len(task.classes))})
            span = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
            least_and_most.append(f"{span} {name}")
    return f"{text}; of each class {', '.join(least_and_most)}"


def require_test_split(task: LabelledSet, why: str) -> None:
    """Raises KtrayError if the data has no test split, for jobs that need one."""
    if not task.test:
        raise KtrayError(
            f"There is no test image, and {why}",
            "Add a test split, or more images: with three or more in a class, one is split off for testing.",
        )


def warnings(recipe: Recipe, device: Mapping[str, Any]) -> list[str]:
    """What is probably not meant, as sentences: prices for devices that do not exist here, and a full disk.

    Args:
        device: the result of `ktray.accounting.device.describe_device`.
    """
    return [*_prices(recipe, device), *_disk(recipe)]


def cautions(recipe: Recipe) -> list[str]:
    """What is assumed of the teachers, as sentences."""
    if not recipe.teacher.checkpoint:
        return []
    from ktray.models.teacher.families.base import TeacherSource, family_of  # slow to import

    part = recipe.teacher
    source = TeacherSource(str(part.name), part.checkpoint, part.config, part.image_size)
    text = family_of(source.name).caution(source)
    return [text] if text else []


def exportable(recipe: Recipe, classes: int) -> list[str]:
    """What stands in the way of an export of the student, as sentences.

    Tracing takes seconds, so the store remembers which students can be exported, by version of torch and timm.

    Args:
        recipe: a resolved recipe.
        classes: number of classes of the task.
    """
    from ktray.training.inputs import StudentSpec  # slow to import

    spec = StudentSpec.of(recipe, classes)
    model = [recipe.task.kind, spec.name, spec.kwargs, classes, spec.image_size, spec.options]
    problem = _problem(recipe.store, json.dumps(model, sort_keys=True))
    if not problem:
        return []
    return [
        f"WARNING: student '{spec.name}' cannot be exported by jobs/export.py: torch cannot trace it "
        f"({problem}). Its folder can be loaded in timm; choose another student.name for ONNX."
    ]


def _problem(store: str, model: str) -> str:
    place = Dir(store).sub("exportable")
    facts = {"model": json.loads(model), "torch": version("torch"), "timm": version("timm")}
    name = f"{digest(facts)}.json"
    with contextlib.suppress(Exception):  # nothing is stored, or it is damaged
        if place.read_json(name) == facts:
            return ""
    problem = _export_problem(model)
    if not problem:  # a problem may be one of the machine, such as little memory, and is looked at again
        with contextlib.suppress(Exception):  # a plan may look at a store that it cannot write
            place.write_json(name, facts)
    return problem


@functools.lru_cache(maxsize=64)
def _export_problem(model: str) -> str:
    from ktray.models.flops import on_meta
    from ktray.models.student.exportable import export_problem
    from ktray.training.inputs import StudentSpec

    kind, name, kwargs, classes, size, options = json.loads(model)
    spec = StudentSpec(task_kind(kind), name, kwargs, classes, size, options=options)
    return export_problem(on_meta(lambda: spec.make(bare=True).model), (size, size))


def _prices(recipe: Recipe, device: Mapping[str, Any]) -> Iterator[str]:
    table = price_table()
    known = {"cpu_core", *table["accelerators"], *table["instances"], str(device.get("instance") or "")}
    names = [str(gpu["name"]).lower() for gpu in device.get("gpus") or []]
    for name in recipe.prices:
        if name in known or any(name.lower() in gpu for gpu in names):
            continue
        near = difflib.get_close_matches(name, known - {""}, n=1, cutoff=0.6)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        yield f"WARNING: prices.{name} names no device of ktray's table or of this machine.{hint}"


def _disk(recipe: Recipe) -> Iterator[str]:
    if "://" in recipe.store:
        return
    place = Path(recipe.store).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < _FEW_GB * 1e9:
        yield f"WARNING: the disk of the store has {free / 1e9:.1f} GB left ({place}); the stages may not fit."
