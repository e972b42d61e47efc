"""Multi-label classification: a set of classes for each image, which may be empty.

Labels are lists or COCO annotations. Each class is predicted by itself: the teacher has a logistic regression for each
class on its embedding (``probe``), which starts from the class names where the teacher has a text tower, or the class
names alone (``text``), or is trained with the tower (``finetune``, ``lora``). The student is a timm classifier whose
outputs are independent. The loss is the binary cross-entropy. The metrics are the mean average precision, and F1 with a
threshold for each class that is chosen on validation and stored with the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from ktray.data.labelled.decode import LabelReader, SetReader
from ktray.data.labelled.label_sets import read_label_sets
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.labelled.list_columns import ListColumns
from ktray.data.sources.fetch import fetch_images
from ktray.errors import KtrayError
from ktray.models.flops import count_flops
from ktray.models.student.classifier import Student
from ktray.models.student.tagger import FILE, Tagger, load_tagger, save_tagger
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead, text_head
from ktray.models.teacher.label_heads import fit_label_temperature, label_probe, scaled_text_head
from ktray.models.teacher.teacher import Teacher
from ktray.objectives.matching import Matching, SetMatching
from ktray.recipe.registries import TASKS
from ktray.recipe.schema import TaskConfig, TeacherConfig
from ktray.reporting.worst import WorstError
from ktray.storage.columns import Rows
from ktray.tasks.base import WORST, FittedHeads, HeadSettings, LabelledSplit, TaskKind, TestSet
from ktray.tasks.classification import by_class
from ktray.tasks.label_metrics import (
    MeanAveragePrecision,
    average_precision,
    best_thresholds,
    f1,
    mean_over_classes,
    ratio,
)
from ktray.tasks.weighted import WeightedCounts, WeightedScores

THRESHOLDS = "thresholds"
DECIDED = "_decided"  # suffix of the column with a model's decisions


class MultiLabel(TaskKind):
    """See the docstring of the module. The model's output is logits (N, C), and targets are (N, C) float32, 0 or 1."""

    metrics: ClassVar[Mapping[str, str]] = {
        "map": "mean average precision",
        "macro_f1": "macro F1",
        "micro_f1": "micro F1",
    }
    matching: ClassVar[Matching] = SetMatching()
    label_sets = True
    ranked = True
    decides = True
    linear_student = True
    student_file = FILE
    no_export = None
    worst_title = (
        "The test images whose predicted classes fit their labels least: those with the lowest Jaccard index "
        "(intersection over union of the two sets), and of these the ones with the highest loss."
    )
    worst_value = "Jaccard index"

    def read(self, data: str, part: TaskConfig) -> LabelledSet:
        unused = [name for name in ("splits", "train_list") if getattr(part, name) is not None]
        if part.layout != "auto":
            unused.append("layout")
        if unused:
            raise KtrayError(
                f"task.{unused[0]} is for images with one class each, and task.kind=multilabel has sets of classes",
                f"Remove task.{unused[0]}; a list names the splits in its column split.",
            )
        return read_label_sets(
            data,
            seed=part.split_seed,
            val_fraction=part.val_fraction,
            test_fraction=part.test_fraction,
            labels=part.labels,
            labels_per_class=part.labels_per_class,
            columns=ListColumns(part.label, part.group),
        )

    def reader(self, task: LabelledSet, whole: bool = False) -> LabelReader:
        return SetReader(num_classes=len(task.classes))

    def classes_of(self, label: Any) -> Sequence[int]:
        return list(label)

    def targets(self, stored: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(stored.astype(np.float32))

    def loss(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(out, targets)

    def tally(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(4 C + 2,) float64: by class, the average precision (NaN for a class that no image has), and the numbers of
        correct predictions, of predictions and of labels, with the thresholds that are best for these images; then the
        loss and the number of labels."""
        logits, labels = out.detach().double().cpu().numpy(), targets.cpu().numpy()
        probability = sigmoid(logits)
        decided = probability >= best_thresholds(probability, labels)
        counts = [average_precision(logits, labels)[0], *set_counts(decided, labels).sum(1)]
        loss = F.binary_cross_entropy_with_logits(out.double(), targets.double(), reduction="sum").cpu().numpy()
        whole = np.concatenate([*counts, [float(loss), targets.numel()]])
        return torch.from_numpy(whole)

    def scores(self, counts: np.ndarray) -> dict[str, float]:
        precision, *rest = np.asarray(counts, np.float64).reshape(4, -1)
        return {"map": float(mean_over_classes(precision)), **f1_scores(np.stack(rest))}

    def candidates(self, part: TeacherConfig, has_text: bool) -> list[str]:
        wanted: list[str] = list(part.candidates) if part.adapt == "auto" else [part.adapt]
        if wanted == ["text"] and not has_text:
            raise KtrayError(f"Teacher '{part.name}' has no text tower", "Set teacher.adapt=probe.")
        return [name for name in wanted if name != "text" or has_text]

    def fit_heads(
        self, teacher: Teacher, train: LabelledSplit, val: LabelledSplit, settings: HeadSettings
    ) -> FittedHeads:
        """Fit a head from class names, if the teacher has a text tower, and a logistic regression for each class that
        starts from it."""
        place = next(teacher.image_tower.parameters()).device  # fitting is fast where the teacher is
        train, val = (
            replace(split, embedding=split.embedding.to(place), targets=split.targets.to(place))
            for split in (train, val)
        )
        heads: dict[str, LinearHead] = {}
        fitted = any(name != "text" for name in settings.wanted)

        def fit() -> None:
            if teacher.has_text:
                head = text_head(teacher, settings.names, settings.prompts)
                heads["text"] = scaled_text_head(head, train.embedding, train.targets)
            if fitted:
                judge = (val.embedding, val.targets)
                heads["probe"] = label_probe(train.embedding, train.targets, val=judge, start=heads.get("text"))

        flops = count_flops(fit)
        teachers, val_scores = {}, {}
        for name, head in heads.items():
            temperature, val_scores[name] = self.calibrate(head(val.embedding).detach(), val.targets)
            teachers[name] = AdaptedTeacher(teacher, head, settings.classes, temperature)
        return FittedHeads(teachers, val_scores, flops)

    def calibrate(self, out: torch.Tensor, targets: torch.Tensor) -> tuple[float, dict[str, float]]:
        temperature = fit_label_temperature(out, targets)
        calibrated = out / temperature
        *counts, loss, labels = self.tally(calibrated, targets).tolist()
        return temperature, {**self.scores(np.array(counts)), "loss": loss / max(1.0, labels)}

    def build_student(
        self,
        name: str,
        kwargs: dict[str, Any],
        outputs: int,
        image_size: int,
        pretrained: bool | str = False,
        checkpoint: str | None = None,
        **options: Any,
    ) -> Tagger:
        return Tagger.of(super().build_student(name, kwargs, outputs, image_size, pretrained, checkpoint))

    def student_head(
        self, train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor], outputs: int
    ) -> LinearHead:
        return label_probe(*train, val=val)

    def save_student(self, student: Student, folder: Path, classes: Sequence[str]) -> None:
        assert isinstance(student, Tagger)
        save_tagger(student, folder, classes)

    def load_student(self, folder: str | Path, device: str | torch.device = "cpu") -> Tagger:
        return load_tagger(folder, device)

    def test_rows(self, out: np.ndarray, columns: Rows) -> tuple[Rows, Any]:
        return {"": out}, None

    def fit_decisions(self, rows: Rows, model: str, classes: list[str]) -> dict[str, dict[str, float]]:
        values = best_thresholds(sigmoid(rows[model]), rows["label"])
        return {THRESHOLDS: dict(zip(classes, values.tolist(), strict=True))}

    def decide(self, out: np.ndarray, fitted: dict[str, dict[str, float]]) -> Rows:
        return {DECIDED: (sigmoid(out) >= np.array(list(fitted[THRESHOLDS].values()))).astype(np.uint8)}

    def with_decisions(self, student: Student, fitted: dict[str, dict[str, float]]) -> Tagger:
        return Tagger.of(student, list(fitted[THRESHOLDS].values()))

    def image_counts(self, rows: Rows, model: str) -> np.ndarray:
        """By class, the numbers of correct predictions, of predictions and of labels, for `f1_scores`."""
        return np.concatenate(list(set_counts(rows[f"{model}{DECIDED}"], rows["label"])), axis=1)

    def test_metrics(self, rows: Rows, model: str, classes: list[str]) -> dict[str, Any]:
        return metrics(rows[model], rows[f"{model}{DECIDED}"], rows["label"], classes)

    def exported_metrics(self, student: Student, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        assert isinstance(student, Tagger)
        return metrics(outputs, sigmoid(outputs) >= np.array(student.thresholds), labels, student.classes)

    def weighted_scores(self, metric: str, seeds: Sequence[Rows]) -> WeightedScores:
        if metric == "map":
            return MeanAveragePrecision(np.stack([rows["student"] for rows in seeds]), seeds[0]["label"])
        counts = np.stack([self.image_counts(rows, "student") for rows in seeds])
        return WeightedCounts(counts.astype(np.float64), lambda total: f1_scores(total.reshape(3, -1)), metric)

    def worst(self, tested: TestSet) -> list[WorstError]:
        rows, classes = tested.rows, np.array(tested.task.classes, dtype=object)
        labels, decided = rows["label"].astype(bool), rows[f"student{DECIDED}"].astype(bool)
        union = (labels | decided).sum(1)
        jaccard = np.where(union > 0, (labels & decided).sum(1) / np.maximum(1, union), 1.0)
        loss = np.logaddexp(0, np.where(labels, -rows["student"], rows["student"])).mean(1)
        order = [i for i in np.lexsort((-loss, jaccard)).tolist() if jaccard[i] < 1][:WORST]
        uris = [str(rows["uri"][i]) for i in order]
        errors = []
        for i, (uri, image, _) in zip(order, fetch_images(uris, max_pixels=tested.max_pixels), strict=True):
            if image is not None:
                true, predicted = (", ".join(classes[one[i]]) or "none" for one in (labels, decided))
                errors.append(WorstError(image, true, predicted, float(jaccard[i]), uri))
        return errors


TASKS.register("multilabel")(MultiLabel())


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) float64 of logits (N, C)."""
    return np.asarray(np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64))))


def set_counts(decided: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(3, N, C) int64: by image and class, whether it is predicted rightly, is predicted, and is labelled."""
    claimed, true = np.asarray(decided) > 0, np.asarray(labels) > 0
    return np.stack([claimed & true, claimed, true]).astype(np.int64)


def f1_scores(counts: np.ndarray) -> dict[str, float]:
    """``macro_f1``, the mean over the classes that are labelled or predicted, and ``micro_f1``, of the counts of all
    classes together. Both are 0 if nothing is labelled and nothing predicted.

    Args:
        counts: (3, C): by class, the numbers of correct predictions, of predictions and of labels.
    """
    right, claimed, true = counts
    micro = f1(right.sum()[None], claimed.sum()[None], true.sum()[None])
    return {"macro_f1": float(mean_over_classes(f1(right, claimed, true))), "micro_f1": float(mean_over_classes(micro))}


def metrics(logits: np.ndarray, decided: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Exact metrics over all images.

    Args:
        logits: (N, C) float scores, any scale.
        decided: (N, C), whether a class is predicted.
        labels: (N, C), 0 or 1.
        classes: C names.

    Returns:
        ``map`` and `f1_scores`; ``per_class``, the average precision by class name (None for a class that no image
        has); ``details``, by class name its ``f1``, ``precision``, ``recall`` and the number of ``images`` that have
        it; ``n``, the number of images.
    """
    precisions = average_precision(logits, labels)[0]
    right, claimed, true = counts = set_counts(decided, labels).sum(1)
    figures = {
        "f1": by_class(f1(right, claimed, true), classes),
        "precision": by_class(ratio(right, claimed), classes),
        "recall": by_class(ratio(right, true), classes),
        "images": dict(zip(classes, true.tolist(), strict=True)),
    }
    return {
        "map": float(mean_over_classes(precisions)),
        **f1_scores(counts),
        "per_class": by_class(precisions, classes),
        "details": {name: {figure: values[name] for figure, values in figures.items()} for name in classes},
        "n": len(labels),
    }
