"""Classification: one class for each image.

Labels are class folders, lists or official split lists. The teacher has a linear head on its embedding, which is
computed from class names (``text``), fitted to the labels (``probe``) or trained with the tower (``finetune``). The
student is a plain timm classifier. The loss is the cross-entropy, and the metrics are top-1 accuracy and the mean
recall of classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.labelled.list_columns import ListColumns
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch_images
from ktray.errors import KtrayError
from ktray.models.flops import count_flops
from ktray.models.student.classifier import Student
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead, fit_temperature, probe_head, text_head
from ktray.models.teacher.teacher import Teacher
from ktray.objectives.matching import ClassMatching, Matching
from ktray.recipe.registries import TASKS
from ktray.recipe.schema import TaskConfig, TeacherConfig
from ktray.reporting.worst import WorstError
from ktray.storage.columns import Rows
from ktray.tasks.base import WORST, FittedHeads, HeadSettings, LabelledSplit, TaskKind, TestSet
from ktray.tasks.calibration import certainty, honesty
from ktray.tasks.weighted import Accuracy, MeanClassAccuracy, WeightedScores


class Classification(TaskKind):
    """See the docstring of the module. The model's output is logits (N, C), and targets are classes (N,) int64."""

    metrics: ClassVar[Mapping[str, str]] = {"top1": "top-1 accuracy", "mean_class_accuracy": "mean class accuracy"}
    matching: ClassVar[Matching] = ClassMatching()
    image_classes = True
    linear_student = True
    no_export = None

    def read(self, data: str, part: TaskConfig) -> LabelledSet:
        if part.labels is not None:
            raise KtrayError(
                "task.labels is the label budget of a segmentation task", "Set task.labels_per_class instead."
            )
        return read_labelled(
            data,
            splits=part.splits,
            seed=part.split_seed,
            val_fraction=part.val_fraction,
            test_fraction=part.test_fraction,
            labels_per_class=part.labels_per_class,
            layout=part.layout,
            train_list=part.train_list,
            columns=ListColumns(part.label, part.group),
        )

    def loss(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out, targets)

    def tally(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(out, targets, reduction="sum")
        return tally(out.argmax(1), targets, out.shape[1], loss)

    def scores(self, counts: np.ndarray) -> dict[str, float]:
        return scores(counts)

    def candidates(self, part: TeacherConfig, has_text: bool) -> list[str]:
        wanted: list[str] = list(part.candidates) if part.adapt == "auto" else [part.adapt]
        if wanted == ["text"] and not has_text:
            raise KtrayError(f"Teacher '{part.name}' has no text tower", "Set teacher.adapt=probe.")
        return [name for name in wanted if name != "text" or has_text]

    def fit_heads(
        self, teacher: Teacher, train: LabelledSplit, val: LabelledSplit, settings: HeadSettings
    ) -> FittedHeads:
        """Fit a head from class names, if the teacher has a text tower, and a linear probe that starts from it."""
        place = next(teacher.image_tower.parameters()).device  # fitting is fast where the teacher is
        train, val = (
            replace(split, embedding=split.embedding.to(place), targets=split.targets.to(place))
            for split in (train, val)
        )
        heads: dict[str, LinearHead] = {}
        classes, fitted = settings.classes, any(name != "text" for name in settings.wanted)

        def fit() -> None:
            if teacher.has_text and ("text" in settings.wanted or fitted):
                heads["text"] = text_head(teacher, settings.names, settings.prompts)
            if fitted:
                judge = (val.embedding, val.targets)
                start = heads.get("text")
                heads["probe"] = probe_head(train.embedding, train.targets, len(classes), val=judge, start=start)

        flops = count_flops(fit)
        teachers, val_scores = {}, {}
        for name, head in heads.items():
            temperature, val_scores[name] = self.calibrate(head(val.embedding).detach(), val.targets)
            teachers[name] = AdaptedTeacher(teacher, head, classes, temperature)
        return FittedHeads(teachers, val_scores, flops)

    def calibrate(self, out: torch.Tensor, targets: torch.Tensor) -> tuple[float, dict[str, float]]:
        temperature = fit_temperature(out, targets)
        calibrated = out / temperature
        loss = float(F.cross_entropy(calibrated, targets))
        return temperature, {**self.scores(self.tally(calibrated, targets)[:-2].cpu().numpy()), "loss": loss}

    def student_head(
        self, train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor], outputs: int
    ) -> LinearHead:
        return probe_head(*train, outputs, val=val)

    def test_rows(self, out: np.ndarray, columns: Rows) -> tuple[Rows, Any]:
        return {"": out}, None

    def compact(self, rows: Rows) -> Rows:
        """Instead of the logits of each model, its predicted class, and the probabilities of that class and of the true
        one: ``MODEL``, ``MODEL.confidence``, ``MODEL.likelihood``."""
        found: Rows = {}
        for name, values in rows.items():
            if values.ndim == 2:
                certain = certainty(values, rows["label"])
                found |= zip((name, f"{name}.confidence", f"{name}.likelihood"), certain, strict=True)
            else:
                found[name] = values
        return found

    def image_counts(self, rows: Rows, model: str) -> np.ndarray:
        predicted, true = rows[model], rows["label"].astype(np.int64)
        counts = np.zeros((len(true), 3, 1 + int(max(predicted.max(initial=0), true.max(initial=0)))), np.int64)
        image = np.arange(len(true))
        for i, classes in enumerate((true, predicted, true)):
            counts[image, i, classes] = predicted == true if i == 0 else 1
        return counts.reshape(len(true), -1)

    def weighted_scores(self, metric: str, seeds: Sequence[Rows]) -> WeightedScores:
        correct = np.stack([rows["student"] == rows["label"] for rows in seeds])
        if metric == "mean_class_accuracy":
            return MeanClassAccuracy(correct, seeds[0]["label"].astype(np.int64))
        return Accuracy(correct)

    def test_metrics(self, rows: Rows, model: str, classes: list[str]) -> dict[str, Any]:
        return metrics(rows[model], rows["label"], classes)

    def exported_metrics(self, student: Student, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        return metrics(outputs.argmax(1), labels, student.classes)

    def confusion(self, rows: Rows, counts: Sequence[Any], classes: list[str]) -> np.ndarray:
        return confusion_matrix(rows["student"], rows["label"], len(classes))

    def calibration(self, rows: Rows) -> dict[str, Any]:
        return honesty(rows["student.confidence"], rows["student"] == rows["label"], rows["student.likelihood"])

    def worst(self, tested: TestSet) -> list[WorstError]:
        """The errors in which the student was most confident."""
        rows, classes = tested.rows, tested.task.classes
        labels, predicted = rows["label"].astype(np.int64), rows["student"]
        wrong = np.flatnonzero(predicted != labels)
        wrong = wrong[np.argsort(-rows["student.confidence"][wrong], kind="stable")][:WORST]
        errors = []
        uris = [str(rows["uri"][i]) for i in wrong]
        images = fetch_images(uris, max_pixels=tested.max_pixels)
        for i, (uri, image, _) in zip(wrong.tolist(), images, strict=True):
            if image is None:
                continue
            confidence = float(rows["student.confidence"][i])
            errors.append(WorstError(image, classes[labels[i]], classes[predicted[i]], confidence, uri))
        return errors


TASKS.register("classification")(Classification())


def tally(predicted: torch.Tensor, true: torch.Tensor, num_classes: int, loss: torch.Tensor) -> torch.Tensor:
    """(3 C + 2,) float64: by class, the numbers of correct predictions, of predictions and of labels; then the loss and
    the number of labels.

    Args:
        predicted, true: (N,) int64 classes of images or of pixels.
        loss: the sum of their losses, a scalar.
    """
    counts = [torch.bincount(x, minlength=num_classes) for x in (true[predicted == true], predicted, true)]
    rows = torch.full((1,), len(true), dtype=torch.float64, device=loss.device)
    return torch.cat([*(c.double() for c in counts), loss.double()[None], rows])


def scores(counts: np.ndarray) -> dict[str, float]:
    """``top1`` and ``mean_class_accuracy`` (mean recall over the classes that occur), fractions.

    Args:
        counts: (3 C,): by class, the numbers of correct predictions, of predictions and of labels.

    Raises:
        ValueError: there are no labels.
    """
    right, _, true = np.asarray(counts, np.float64).reshape(3, -1)
    if not true.any():
        raise ValueError("no rows to score")
    return {"top1": float(right.sum() / true.sum()), "mean_class_accuracy": float(np.nanmean(recalls(right, true)))}


def recalls(right: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Recall by class (C,), NaN for a class that does not occur."""
    return np.divide(right, true, out=np.full(len(true), np.nan), where=true > 0)


def metrics(predicted: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Exact metrics over all rows.

    Args:
        predicted: (N,) int, 0..C-1.
        labels: (N,) int, 0..C-1.
        classes: C names.

    Returns:
        `scores`; ``per_class``, the recall by class name (None for a class without rows); ``n``, the number of rows.

    Raises:
        ValueError: no rows.
    """
    confusion = confusion_matrix(predicted, labels, len(classes))
    right, claimed, true = np.diag(confusion), confusion.sum(0), confusion.sum(1)
    values = scores(np.concatenate([right, claimed, true]))
    return {**values, "per_class": by_class(recalls(right, true), classes), "n": len(labels)}


def by_class(values: np.ndarray, classes: list[str]) -> dict[str, float | None]:
    """Values (C,) by class name, with None for NaN."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(classes, values, strict=True)}


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (C, C), with true classes as rows and predicted classes as columns."""
    pairs = labels.astype(np.int64) * num_classes + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
