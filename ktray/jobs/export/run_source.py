"""The run that is exported: its folder, recipe, result and student."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from ktray import recipe as recipes
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.errors import KtrayError
from ktray.models.student.classifier import Student
from ktray.pipeline.resolve import labelled_task
from ktray.recipe.schema import Recipe
from ktray.storage.store import Dir, Store
from ktray.tasks.base import TaskKind, task_kind
from ktray.tasks.students import load_student, marked_kinds

logger = logging.getLogger("ktray")

_NEEDED = ("recipe.yaml", "result.json", "student/config.json", "student/model.safetensors")


@dataclass(frozen=True)
class ExportedRun:
    """A finished run of a task whose students can be exported.

    Attributes:
        store: the store with the run's stages and MLflow's local database.
        folder: the folder of the run.
        recipe: the resolved recipe of the run, with the caller's location of MLflow and of the labelled images.
        result: the content of the run's ``result.json``.
    """

    store: Store
    folder: Dir
    recipe: Recipe
    result: dict[str, Any]

    @property
    def run_id(self) -> str:
        return str(self.result["run_id"])

    @property
    def metric(self) -> str:
        """The metric by which the run's models were chosen: a key of the task's metrics."""
        return str(self.result["metric"]["name"])

    @property
    def kind(self) -> TaskKind:
        return task_kind(self.recipe.task.kind)

    def student(self) -> Student:
        """The run's student, in evaluation mode.

        Raises:
            KtrayError: the files of the student are damaged.
        """
        with self.folder.local("student") as path:
            return load_student(path)

    def task(self) -> LabelledSet:
        """The labelled images of the run.

        Raises:
            KtrayError: the images have moved, or they have other classes.
        """
        try:
            labelled = labelled_task(self.recipe, lambda key, value, why: None)[0]
        except KtrayError as error:
            raise KtrayError(
                f"The labelled images of run '{self.run_id}' cannot be read ({error.what})",
                "If the images have moved, set task.data to their new location.",
            ) from error
        with self.folder.local("student/config.json") as path:
            classes = json.loads(path.read_text(encoding="utf-8"))["pretrained_cfg"]["label_names"]
        if labelled.classes != classes:
            raise KtrayError(
                f"The labelled images have other classes than the student of run '{self.run_id}' "
                f"({len(labelled.classes)}, it has {len(classes)})",
                "Set task.data to the images that the run learned from.",
            )
        return labelled


def find(requested: Recipe) -> ExportedRun:
    """Find the run that ``export.run`` names.

    Args:
        requested: the recipe of the command line, of which ``store``, ``export``, ``task.data`` and ``mlflow.uri`` are
            used.

    Raises:
        KtrayError: the run does not exist or has no student, its result is damaged, or its task kind has no export.
    """
    folder = _folder(requested)
    missing = [name for name in _NEEDED if not folder.exists(name)]
    if missing:
        raise KtrayError(
            f"'{folder.uri}' has no finished run with a student: there is no {missing[0]}",
            "Set export.run to the id or folder of a finished run of jobs/distill.py.",
        )
    try:
        result = folder.read_json("result.json")
        result["run_id"], result["metric"]["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise KtrayError(f"'{folder.uri}/result.json' is damaged: {error}", "Run jobs/distill.py again.") from error
    with folder.local("recipe.yaml") as path:
        recipe = recipes.load(str(path), [])
    for kind in (task_kind(recipe.task.kind), *marked_kinds(lambda name: folder.exists(f"student/{name}"))):
        if kind.no_export is not None:
            what, remedy = kind.no_export
            raise KtrayError(f"Run '{result['run_id']}' {what}", remedy)
    home, _, last = folder.uri.rpartition("/")[0].rpartition("/")
    store = Store(home if last == "runs" else requested.store)
    recipe.store, recipe.export = store.uri, requested.export
    recipe.mlflow.uri = requested.mlflow.uri or recipe.mlflow.uri
    if requested.task.data:
        recipe.task.data = requested.task.data
    if not requested.export.run:
        logger.info(f"export    {result['run_id']} (the newest run with a student; export.run names another)")
    return ExportedRun(store, folder, recipe, result)


def _folder(requested: Recipe) -> Dir:
    store, name = Store(requested.store), requested.export.run
    if name and ("/" in name or not store.run(name).exists()):
        folder = Dir(name.rstrip("/"))
        if folder.exists():
            return folder
        raise KtrayError(
            f"There is no run '{name}' in '{store.uri}/runs', and no such folder",
            "Set export.run to a run's id or folder, and store= to its store.",
        )
    if name:
        return store.run(name)
    for run_id in reversed(store.sub("runs").children()):
        folder = store.run(run_id)
        if all(folder.exists(part) for part in _NEEDED):
            return folder
    raise KtrayError(
        f"No run in '{store.uri}/runs' has a student", "Run jobs/distill.py first, or set store= or export.run."
    )
