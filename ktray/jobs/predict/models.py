"""The model of a run that predicts: its student or its adapted teacher, and what it computes for an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.features import trunk
from ktray.models.flops import forward_flops
from ktray.models.student.classifier import Student
from ktray.models.student.tagger import DEFAULT_THRESHOLD, Tagger
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.spec import tower_flops
from ktray.models.teacher.teacher import fitting_batch, products_on
from ktray.models.traffic import forward_traffic
from ktray.pipeline.finished_run import FinishedRun
from ktray.tasks.students import StudentInFolder

BATCH = 256
Classifier = Student | AdaptedTeacher


class LoadsClassifier(Protocol):
    """A picklable description of a student or of an adapted teacher."""

    def load(self) -> Classifier: ...


@dataclass(frozen=True)
class ChosenModel:
    """The model that predicts.

    Attributes:
        name: name of the model.
        identity: hash of the weights, or key of the stage that has them.
        classes: names in the order of the outputs.
        preprocess: the preprocessing of the model.
        source: a picklable description that loads the model.
        width: width of its embeddings.
        flops: FLOPs for one image.
        thresholds: for a task with sets of classes, the probabilities from which an image has a class, in the order of
            the outputs; None: an image has one class.
    """

    name: str
    identity: str
    classes: list[str]
    preprocess: Preprocess
    source: LoadsClassifier
    width: int
    flops: float
    thresholds: tuple[float, ...] | None = None


def choose(run: FinishedRun, which: str, on_gpu: bool) -> ChosenModel:
    """The model of a run that ``predict.model`` names.

    Args:
        which: ``student`` or ``teacher``.
        on_gpu: whether it will run on GPUs, where teachers compute in bfloat16.

    Raises:
        KtrayError: the run does not predict classes of images, or it has no teacher.
    """
    for kind in run.kinds:
        if not (kind.image_classes or kind.label_sets):
            raise KtrayError(
                f"Run '{run.run_id}' has task.kind={kind.key}, and jobs/predict.py can only predict classes of images",
                "Load the student with ktray.load_student(FOLDER) and call its method predict.",
            )
    if which == "student":
        source, student = StudentInFolder(run.folder.sub("student")), run.student()
        flops, width = flops_of(student), student.feature_dim
        own = tuple(student.thresholds) if isinstance(student, Tagger) else None
        return ChosenModel(
            student.name, source.identity(), student.classes, student.preprocess, source, width, flops, own
        )
    spec = run.teacher()
    teacher = spec.load()
    identity = f"{spec.directory.uri.rpartition('/stages/')[2]}-{products_on(on_gpu)}"
    name, width = str(run.result["teacher"]), int(teacher.embed_dim)
    thresholds = None
    if run.kind.label_sets:
        fitted = run.decisions("teacher").get("thresholds", {})
        thresholds = tuple(fitted.get(label, DEFAULT_THRESHOLD) for label in teacher.classes)
    return ChosenModel(name, identity, teacher.classes, spec.preprocess, spec, width, flops_of(teacher), thresholds)


def traffic_of_image(model: ChosenModel) -> float:
    """Values that the model reads and writes for one image (`ktray.models.traffic`). It is loaded for this."""
    loaded = model.source.load()
    tower = loaded.image_tower if isinstance(loaded, AdaptedTeacher) else loaded.model
    return forward_traffic(tower, (3, *model.preprocess.size))


def flops_of(model: Classifier) -> float:
    """FLOPs of the model for one image."""
    if isinstance(model, AdaptedTeacher):
        return tower_flops(model)
    return forward_flops(model.model, (3, *model.preprocess.size))


@torch.inference_mode()
def predict(
    model: Classifier, pixels: np.ndarray, embedding: bool, sets: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """The class probabilities (N, C) of images (N, 3, H, W) uint8, and their embeddings (N, D) float32, not normalised,
    if these are wanted. A teacher's probabilities are those of its calibrated logits. N may be 0.

    Args:
        sets: whether each class has a probability of its own. They are float64 then, as those that the thresholds were
            chosen with; else float32.
    """
    where = next(model.parameters()).device
    size = fitting_batch(model.preprocess, where, BATCH)
    probabilities: list[np.ndarray] = []
    embeddings: list[np.ndarray] = []
    for at in range(0, len(pixels), size):
        batch = torch.from_numpy(np.ascontiguousarray(pixels[at : at + size])).to(where)
        logits, features = _outputs(model, batch, embedding)
        found = logits.double().sigmoid() if sets else logits.float().softmax(1)
        probabilities.append(found.cpu().numpy())
        if features is not None:
            embeddings.append(features.float().cpu().numpy())
    none = np.zeros((0, len(model.classes)), np.float32)
    width = int(model.embed_dim if isinstance(model, AdaptedTeacher) else model.feature_dim)
    return (
        np.concatenate(probabilities) if probabilities else none,
        (np.concatenate(embeddings) if embeddings else np.zeros((0, width), np.float32)) if embedding else None,
    )


def _outputs(model: Classifier, batch: torch.Tensor, embedding: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(model, AdaptedTeacher):
        embedded = model.embed(batch)
        return model.logits(batch, embedded), embedded
    if not embedding:
        return model.logits(batch), None
    network = trunk(model.model)
    features = network.forward_features(model.preprocess.normalise(batch))
    return network.forward_head(features), network.forward_head(features, pre_logits=True)
