"""The stages of jobs/curate.py: those up to the transfer set, and SUGGEST if the recipe asks for suggestions."""

from __future__ import annotations

from dataclasses import replace

from ktray.data.labelled.rows import three
from ktray.errors import KtrayError
from ktray.models.teacher.spec import TeacherSpec
from ktray.models.teacher.teacher import TeacherSource
from ktray.pipeline.graph import _curate
from ktray.pipeline.phases import needs_teacher, phases
from ktray.recipe.schema import Recipe, index_alone
from ktray.stages.base import RunContext, StageResult
from ktray.stages.suggest import stage as suggest
from ktray.storage.store import Dir, Store
from ktray.tasks.base import task_kind
from ktray.tasks.students import StudentInFolder, load_student, marked_kinds

_FILES = ("config.json", "model.safetensors")


def curation(context: RunContext) -> tuple[StageResult, StageResult | None]:
    """Run CURATE, for the last phase of pretraining if there are several, and SUGGEST; None without suggestions.

    Raises:
        KtrayError: the recipe asks for suggestions that cannot be made (`check`).
    """
    name, phase = phases(context.recipe)[-1]
    student = check(phase, context.task.classes)
    inner = replace(context, recipe=phase, runtime=replace(context.runtime, phase=name, read=0))
    outputs = _curate(inner)
    if not phase.curate.suggest:
        return outputs.curate, None
    assert outputs.adapt is not None  # `check` has made sure that there is a teacher
    t = phase.teacher
    encoder = outputs.encoder or TeacherSpec.of(TeacherSource(str(t.name), t.checkpoint, t.config, t.image_size))
    return outputs.curate, suggest.run(inner, outputs.adapt, encoder, outputs.index, outputs.curate, student)


def check(recipe: Recipe, classes: list[str]) -> StudentInFolder | None:
    """Check, before anything is computed, that the suggestions of the recipe can be made.

    Args:
        recipe: a resolved recipe.
        classes: the classes of the task.

    Returns:
        The student of ``curate.student``, if it is set.

    Raises:
        KtrayError: images of the task have no single class, there is no teacher, the gallery has no embeddings, or the
            student does not exist or has other classes.
    """
    part = recipe.curate
    if not part.suggest:
        return None
    if not task_kind(recipe.task.kind).image_classes:
        raise KtrayError(
            f"curate.suggest compares probabilities of one class for each image, which task.kind={recipe.task.kind} "
            "does not have",
            "Set curate.suggest=0.",
        )
    if not needs_teacher(recipe):
        raise KtrayError(
            "curate.suggest ranks images by the teacher's predictions, and this recipe has no teacher "
            f"(objective.name={recipe.objective.name}, transfer.source={recipe.transfer.source})",
            "Set objective.name=oriented for this job.",
        )
    if recipe.transfer.source == "generic" and not index_alone(recipe):
        raise KtrayError(
            "curate.suggest needs the embeddings of the gallery, which transfer.source=generic does not compute",
            "Set transfer.source=retrieved.",
        )
    return None if part.student is None else _student(recipe.store, part.student, classes)


def student_folder(store: str, name: str) -> Dir:
    """The folder ``student/`` that ``curate.student`` names.

    Args:
        store: the store that has a run of this id.
        name: id of a run, or a folder of a run or of a student.

    Raises:
        KtrayError: there is no such student.
    """
    run = Store(store).run(name) if "/" not in name else None
    places = [run] if run is not None and run.exists() else []
    places.append(Dir(name.removesuffix("/result.json")))
    for place in places:
        for folder in (place.sub("student"), place):
            if all(folder.exists(file) for file in _FILES):
                return folder
    raise KtrayError(
        f"curate.student={name} names no student: there is no {_FILES[0]} with {_FILES[1]}",
        "Set it to the id of a finished run of jobs/distill.py in the store, or to the folder of a run or student.",
    )


def _student(store: str, name: str, classes: list[str]) -> StudentInFolder:
    folder = student_folder(store, name)
    with folder.local() as path:
        found = load_student(path).classes
    other = [kind.key for kind in marked_kinds(folder.exists) if not kind.image_classes]
    if other:
        raise KtrayError(
            f"The student in '{folder.uri}' is one of task.kind={other[0]}, and the task has one class for each image",
            "Set curate.student to a student of this task.",
        )
    if found != classes:
        raise KtrayError(
            f"The student in '{folder.uri}' has other classes ({three(found)}) than the task ({three(classes)})",
            "Set curate.student to a student of this task.",
        )
    return StudentInFolder(folder)
