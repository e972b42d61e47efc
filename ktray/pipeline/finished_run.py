"""A finished run with a student, which other jobs export or apply: its folder, recipe, result, models and images."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ktray import recipe as recipes
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.student.classifier import Student
from ktray.models.teacher.ensemble import EnsembleSpec
from ktray.models.teacher.spec import AdaptedSpec
from ktray.pipeline.resolve import labels_of
from ktray.pipeline.run_folder import RUNNING
from ktray.recipe.schema import Recipe
from ktray.reporting.result import FailedResult
from ktray.storage.store import Dir, Store
from ktray.tasks.base import TaskKind, task_kind
from ktray.tasks.students import load_student, marked_kinds

logger = logging.getLogger("ktray")

_NEEDED = ("recipe.yaml", "result.json", "student/config.json", "student/model.safetensors")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run that has a student.

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

    @property
    def kinds(self) -> list[TaskKind]:
        """The task kind of the recipe, and that of the stored student if its folder names one."""
        marked = marked_kinds(lambda name: self.folder.exists(f"student/{name}"))
        return [task_kind(self.recipe.task.kind), *marked]

    def student(self) -> Student:
        """The run's student, in evaluation mode.

        Raises:
            KtrayError: the files of the student are damaged.
        """
        with self.folder.local("student") as path:
            return load_student(path)

    def teacher(self) -> AdaptedSpec | EnsembleSpec:
        """The adapted teacher of the run's last phase, or the ensemble of several.

        Raises:
            KtrayError: the run has no teacher, or its stage is not in the store any more.
        """
        if not self.result.get("teacher"):
            raise KtrayError(
                f"Run '{self.run_id}' has no teacher, because objective.name={self.recipe.objective.name} needs none",
                "Use its student, or name a run of another objective.",
            )
        # An ensemble is entered after its members, and the teacher of a later phase after that of an earlier one.
        keys = [stage["key"] for stage in self.result["stages"] if stage["name"] == "adapt"]
        for name in ("ensemble", "adapt"):
            stage = self.store.stage(name, keys[-1]) if keys else None
            manifest = stage.manifest() if stage else None
            if stage and manifest and name == "ensemble":
                return EnsembleSpec(stage, tuple(self._adapted(key) for key in manifest["inputs"]["adapts"]))
            if manifest:
                return self._adapted(keys[-1])
        raise self._lost()

    def decisions(self, model: str) -> dict[str, dict[str, float]]:
        """What EVALUATE has fitted on validation for the decisions of a model of the run, such as ``teacher``
        (`ktray.tasks.base.TaskKind.fit_decisions`); empty if the store does not have it."""
        for key in [stage["key"] for stage in self.result["stages"] if stage["name"] == "evaluate"]:
            if manifest := self.store.stage("evaluate", key).manifest():
                return dict(manifest.get("decisions", {}).get(model, {}))
        return {}

    def _adapted(self, key: str) -> AdaptedSpec:
        stage = self.store.stage("adapt", key)
        manifest, form = stage.manifest(), self.kinds[0].teacher_form
        if manifest is None:
            raise self._lost()
        folder = stage.sub(manifest["directory"])
        return AdaptedSpec(folder, Preprocess.from_dict(folder.read_json(form.FILE)["preprocess"]), form)

    def _lost(self) -> KtrayError:
        return KtrayError(
            f"The adapted teacher of run '{self.run_id}' is not in '{self.store.uri}'",
            "Set store= to the store in which the run was made, or run jobs/distill.py with the run's recipe.yaml "
            "again.",
        )

    def task(self) -> LabelledSet:
        """The labelled images of the run.

        Raises:
            KtrayError: the images have moved, or they have other classes, or the files of the student are damaged.
        """
        try:
            labelled = labels_of(self.recipe)
        except KtrayError as error:
            raise KtrayError(
                f"The labelled images of run '{self.run_id}' cannot be read ({error.what})",
                "If the images have moved, set task.data to their new location.",
            ) from error
        classes = self.student().classes
        if labelled.classes != classes:
            raise KtrayError(
                f"The labelled images have other classes than the student of run '{self.run_id}' "
                f"({len(labelled.classes)}, it has {len(classes)})",
                "Set task.data to the images that the run learned from.",
            )
        return labelled


def find_run(requested: Recipe, job: str, remedy: str = "") -> FinishedRun:
    """Find the run that the key ``run`` in the section of a job names.

    Args:
        requested: the recipe of the command line, of which ``store``, the section of the job, ``task.data`` and
            ``mlflow.uri`` are used.
        job: name of the job and of its section.
        remedy: what to do if there is no such run; empty: what a user of the command line does.

    Raises:
        KtrayError: the run does not exist or has no student, or its result is damaged.
    """
    part = getattr(requested, job)
    remedy = (
        remedy or f"Set {job}.run to the id or folder of a finished run of jobs/distill.py, and store= to its store."
    )
    folder = _folder(requested.store, part.run, remedy)
    missing = [name for name in _NEEDED if not folder.exists(name)]
    if missing:
        raise KtrayError(f"'{folder.uri}' has no finished run with a student: {_why(folder, missing[0])}", remedy)
    try:
        result = folder.read_json("result.json")
        result["run_id"], result["metric"]["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise KtrayError(f"'{folder.uri}/result.json' is damaged: {error}", "Run jobs/distill.py again.") from error
    with folder.local("recipe.yaml") as path:
        recipe = recipes.load(str(path), [])
    home, _, last = folder.uri.rpartition("/")[0].rpartition("/")
    store = Store(home if last == "runs" else requested.store)
    recipe.store = store.uri
    setattr(recipe, job, part)
    recipe.mlflow.uri = requested.mlflow.uri or recipe.mlflow.uri
    if requested.task.data:
        recipe.task.data = requested.task.data
    if not part.run:
        logger.info(f"{job:<9} {result['run_id']} (the newest run with a student; {job}.run names another)")
    return FinishedRun(store, folder, recipe, result)


def _why(folder: Dir, missing: str) -> str:
    """Why a run folder lacks a file, as far as the folder says."""
    if missing != "result.json" and folder.exists("result.json"):
        try:
            result = FailedResult.model_validate(folder.read_json("result.json"))
        except ValueError:  # of a run that finished, or damaged
            return f"there is no {missing}"
        where = f" in {result.stage}" if result.stage else ""
        if result.status == "interrupted":
            return f"it was interrupted{where}; the command that started it resumes it"
        return f"it failed{where}: {result.error}"
    if folder.exists(RUNNING):
        return "it is still running, or it was killed; then the command that started it resumes it"
    return f"there is no {missing}"


def _folder(place: str, name: str | None, remedy: str) -> Dir:
    store = Store(place)
    if name and ("/" in name or not store.run(name).exists()):
        folder = Dir(name.rstrip("/"))
        if folder.exists():
            return folder
        raise KtrayError(f"There is no run '{name}' in '{store.uri}/runs', and no such folder", remedy)
    if name:
        return store.run(name)
    for run_id in reversed(store.sub("runs").children()):
        folder = store.run(run_id)
        if all(folder.exists(part) for part in _NEEDED):
            return folder
    raise KtrayError(f"No run in '{store.uri}/runs' has a student", f"Run jobs/distill.py first. {remedy}")
