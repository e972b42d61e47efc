"""Choose published weights for a recipe: the teacher for a user's own data, and the start of the student.

The model hub is asked only where the recipe leaves the choice open: ``teacher.name=null``, ``student.pretrained=auto``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ktray.errors import KtrayError
from ktray.recipe.registries import TEACHERS
from ktray.recipe.schema import Recipe
from ktray.tasks.base import task_kind

# Residual networks accept an output stride, which leaves a feature map to pool over when the images are small.
SMALL_STUDENT, SMALL_STUDENT_GPU = "test_resnet", "resnet18"
SMALL_STUDENT_KWARGS: dict[str, Any] = {"output_stride": 8}
# Students for larger images, by device. Without a hub, the packaged student, which starts from ImageNet weights, is
# better by far than a smaller one with random weights (docs/measured/photographs.md).
STUDENT, PACKAGED_STUDENT, STUDENT_GPU = "mobilenetv3_small_050", "tf_efficientnet_lite0", "fastvit_s12"
CPU_TEACHER_SIDE = 160  # pixels; the packaged teachers accept any size, and read twice as many images as at 224 px
PUBLISHED_TEACHER = "open_clip:ViT-B-16/datacomp_xl_s13b_b90k"
PUBLISHED_TEACHER_GPU = "open_clip:ViT-L-14/datacomp_xl_s13b_b90k"

Choose = Callable[[str, Any, str], None]  # key, value, and the reason that is printed; empty: nothing is printed


def choose_teacher(recipe: Recipe, on_gpu: bool, choose: Choose) -> None:
    """Choose ``teacher.name`` for own data, if it is open: a published CLIP if its weights can be had, or else the
    largest teacher for photographs that is installed. Without either, it is the CLIP, whose download will fail.

    Args:
        choose: sets an open key of the recipe; its arguments are the key, the value and the reason.

    Raises:
        KtrayError: weights are given without an architecture.
    """
    from ktray.models import hub  # slow to import
    from ktray.models.teacher.families.base import family_of, model_of

    if recipe.teacher.name is not None:
        return
    if recipe.teacher.checkpoint:
        raise KtrayError(
            "teacher.checkpoint is set but teacher.name is not",
            "Set teacher.name to the architecture, for example teacher.name=open_clip:ViT-B-16.",
        )
    name = PUBLISHED_TEACHER_GPU if on_gpu else PUBLISHED_TEACHER
    files = family_of(name).hub_files(model_of(name))
    how = hub.available(*files) if files else ""
    if how:
        choose("teacher.name", name, f"a published model for your own data; {how}")
        return
    reads_text = recipe.teacher.adapt == "text" or recipe.transfer.queries != "images"
    sizes = {n: f.offline_size("") for n, f in TEACHERS if f.has_text or not reads_text}
    largest = max(sizes, key=lambda n: sizes[n], default="")
    if largest and sizes[largest]:
        choose("teacher.name", largest, f"trained on photographs and installed here; the hub of {name} does not answer")
        if recipe.teacher.image_size is None and not on_gpu:
            choose("teacher.image_size", CPU_TEACHER_SIDE, "twice as fast as 224 px, because there is no GPU")
        if recipe.teacher.adapt == "auto" and not on_gpu:
            choose(
                "teacher.adapt", "probe", "finetuning a teacher takes long without a GPU, and a probe distils as well"
            )
        return
    choose("teacher.name", name, "a published model for your own data, downloaded from its hub")


def choose_student(recipe: Recipe, size: int, on_gpu: bool, choose: Choose) -> None:
    """Choose ``student.name``, if it is open, by the size of the images and the device.

    Args:
        size: side of the student's input, pixels.
        choose: see `choose_teacher`.
    """
    from ktray.models import hub  # slow to import
    from ktray.models.packaged import packaged
    from ktray.models.teacher.families import timm

    part = recipe.student
    if part.name is not None:
        return
    if size <= 64:
        part.kwargs = {**SMALL_STUDENT_KWARGS, **part.kwargs}
        name = SMALL_STUDENT_GPU if on_gpu else SMALL_STUDENT
        choose("student.name", name, f"a small residual network for images of {size} px")
        return
    if on_gpu:
        choose("student.name", STUDENT_GPU, "the paper's student, because there is a GPU")
        return
    package, files = packaged(PACKAGED_STUDENT), timm.hub_files(STUDENT)
    may_start = (
        recipe.task.data is not None and part.pretrained in (True, "auto") and not (part.kwargs or part.checkpoint)
    )
    if may_start and package and package.find() and not (files and hub.available(*files)):
        why = f"fast on CPUs; its published weights are installed, and the hub of {STUDENT} does not answer"
        choose("student.name", PACKAGED_STUDENT, why)
    else:
        choose("student.name", STUDENT, "fast on CPUs")


def choose_start(recipe: Recipe, choose: Choose) -> None:
    """Choose ``student.pretrained`` and ``student.fit_head``, if they are ``auto``: true if published weights of the
    student can be had.

    Built-in tasks start from random weights: their images are drawn, and their published results started so. So do
    students with ``student.kwargs``, because these can change the layers.

    Args:
        recipe: a recipe with a student.
        choose: see `choose_teacher`.
    """
    part = recipe.student
    if part.pretrained == "auto":
        _choose_pretrained(recipe, choose)
    if part.fit_head == "auto":
        part.fit_head = False
        if (part.pretrained or part.checkpoint) and task_kind(recipe.task.kind).linear_student:
            choose("student.fit_head", True, "a linear probe of the published features, instead of random weights")


def _choose_pretrained(recipe: Recipe, choose: Choose) -> None:
    from ktray.models.snapshots import is_snapshot

    part = recipe.student
    if is_snapshot(str(part.name)) and not part.checkpoint:
        choose("student.pretrained", True, "the weights of its repository or folder")
        return
    if recipe.task.data is None or part.checkpoint:
        part.pretrained = False
        return
    if part.kwargs:
        choose("student.pretrained", False, "published weights do not fit a student with student.kwargs")
        return
    from ktray.models import hub  # slow to import
    from ktray.models.packaged import packaged
    from ktray.models.student.classifier import HUB, published_source
    from ktray.models.teacher.families import timm

    name = str(part.name)
    source = published_source(name)
    files = timm.hub_files(name)
    if source != HUB:
        choose("student.pretrained", True, f"{source} is installed here, with ImageNet weights for this student")
    elif files and (how := hub.available(*files)):
        choose("student.pretrained", True, f"published weights for this student; {how}")
    elif files:
        package = packaged(name)
        remedy = f"; to install them: {package.command}" if package else ""
        choose("student.pretrained", False, f"the hub of its published weights does not answer{remedy}")
    else:
        choose("student.pretrained", False, "there are no published weights for this student")
