"""Semantic segmentation: a class for every pixel.

Labels are label maps (masks). The teacher has a linear head on its patch embeddings; the student is a timm backbone
with a light segmentation head. The loss is the cross-entropy of labelled pixels at the resolution of the labels. The
metrics are the mean IoU, the pixel accuracy and the mean recall of classes; they are computed from counts that are
summed over all images first, as is usual for ADE20K and Pascal VOC. Images are resized to a model's input without
keeping the aspect ratio or cropping, so that each pixel gets a class; on test, logits are resized to the size of the
mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from ktray.data.augment import random_views
from ktray.data.labelled.decode import LabelReader, MaskReader
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.labelled.list_columns import ListColumns
from ktray.data.labelled.masked import read_masked
from ktray.data.labelled.masks import IGNORE
from ktray.data.preprocess import Preprocess
from ktray.data.views import ViewPolicy
from ktray.errors import KtrayError
from ktray.models.device import device
from ktray.models.flops import count_flops
from ktray.models.maps import map_loss, resize_map
from ktray.models.student.classifier import Student
from ktray.models.student.segmenter import Segmenter, build_segmenter
from ktray.models.student.segmenter_io import FILE, load_segmenter, save_segmenter
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.map_head import fit_map_probe, fit_map_temperature
from ktray.models.teacher.map_teacher import MapTeacher
from ktray.models.teacher.spec import tower_flops
from ktray.models.teacher.teacher import Teacher
from ktray.objectives.matching import MapMatching, Matching
from ktray.recipe.registries import TASKS
from ktray.recipe.schema import StudentConfig, TaskConfig, TeacherConfig
from ktray.reporting.heartbeat import beat
from ktray.reporting.mask_pictures import most_pixels, triptych
from ktray.reporting.worst import WorstError
from ktray.storage.columns import Rows
from ktray.tasks import classification
from ktray.tasks.base import WORST, FittedHeads, HeadSettings, LabelledSplit, TaskKind, TestSet
from ktray.tasks.weighted import MeanIoU, WeightedScores

COUNTS = ("tp", "fp", "fn")
BATCH = 64
_VALUES = 2**27  # logits at the resolution of the masks that are compared at a time: 0.5 GB, and as much for the loss


class Segmentation(TaskKind):
    """See the docstring of the module. The model's output is maps of logits (N, C, h, w), and targets are label maps
    (N, H, W) uint8, with 255 for pixels that are ignored."""

    metrics: ClassVar[Mapping[str, str]] = {"miou": "mean IoU", "mean_class_accuracy": "mean class accuracy"}
    matching: ClassVar[Matching] = MapMatching()
    teacher_form: ClassVar[type[AdaptedTeacher]] = MapTeacher
    student_file = FILE
    embed_batch = BATCH
    test_batch = 32
    worst_title = (
        "The test images with the lowest IoU, averaged over the classes of the image: the image, its mask, and the "
        "prediction of the student. White pixels are ignored."
    )
    worst_value = "IoU"
    no_export = None

    def read(self, data: str, part: TaskConfig) -> LabelledSet:
        if part.labels_per_class is not None:
            raise KtrayError(
                "task.labels_per_class cannot be used with task.kind=segmentation, because an image has many classes",
                "Set task.labels=N for N labelled images in total, or task.train_list.",
            )
        ListColumns(part.label, part.group).refuse(data, "data with masks")
        return read_masked(
            data,
            splits=part.splits,
            seed=part.split_seed,
            val_fraction=part.val_fraction,
            test_fraction=part.test_fraction,
            labels=part.labels,
            layout=part.layout,
            train_list=part.train_list,
        )

    def reader(self, task: LabelledSet, whole: bool = False) -> LabelReader:
        return MaskReader(len(task.classes), task.mask_offset, whole)

    def label_column(self, pixels: str) -> str:
        return f"{pixels}_mask"

    def random_views(
        self, images: torch.Tensor, targets: torch.Tensor, policy: ViewPolicy, keys: torch.Tensor, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return random_views(images, policy, keys, size=size, masks=targets)

    def loss(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return map_loss(out, targets)

    def tally(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # Logits at the resolution of the masks take gigabytes for a batch of images with many classes.
        each = max(1, _VALUES // (out.shape[1] * targets.shape[1] * targets.shape[2]))
        parts = zip(out.split(each), targets.split(each), strict=True)
        return torch.stack([self._tally(maps, masks) for maps, masks in parts]).sum(0)

    def _tally(self, out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        resized = resize_map(out, (targets.shape[1], targets.shape[2]))
        loss = F.cross_entropy(resized, targets.long(), reduction="sum", ignore_index=IGNORE)
        counted = targets != IGNORE
        return classification.tally(resized.argmax(1)[counted], targets[counted].long(), out.shape[1], loss)

    def scores(self, counts: np.ndarray) -> dict[str, float]:
        return scores(counts)

    def teacher_preprocess(self, preprocess: Preprocess) -> Preprocess:
        """Images are resized without keeping the aspect ratio or cropping, so that each pixel gets a class."""
        return replace(preprocess, resize_mode="squash", crop_pct=1.0)

    def head_key(self, part: TeacherConfig) -> Any:
        return part.levels

    def fit_heads(
        self, teacher: Teacher, train: LabelledSplit, val: LabelledSplit, settings: HeadSettings
    ) -> FittedHeads:
        """Fit the candidate ``probe``, a linear head on the patch embeddings of the frozen tower."""
        teacher.drop_text()
        levels, classes = settings.levels, settings.classes

        def features(blocks: Iterator[np.ndarray]) -> torch.Tensor:
            parts: list[torch.Tensor] = []
            with torch.inference_mode():
                for pixels in blocks:
                    for i in range(0, len(pixels), BATCH):
                        images = torch.from_numpy(pixels[i : i + BATCH].copy()).to(device())
                        parts.append(teacher.patch_embeddings(images, levels).half())
                        beat(f"patches of {BATCH * len(parts):,} labelled images")
            # A clone outside of inference mode, because fitting the head needs gradients.
            return torch.cat(parts).clone()

        own, heldout = (features(train.pixels()), train.targets), (features(val.pixels()), val.targets)
        fitted = []

        def fit() -> None:
            fitted.append(fit_map_probe(*own, len(classes), teacher.level_dims(levels), val=heldout))

        flops = tower_flops(teacher) * (len(train.embedding) + len(val.embedding)) + count_flops(fit)
        adapted = MapTeacher(teacher, fitted[0], classes)
        with torch.inference_mode():
            maps = torch.cat([adapted.logits_of(part.float()).cpu() for part in heldout[0].split(BATCH)])
        adapted.temperature, val_scores = self.calibrate(maps, val.targets)
        return FittedHeads({"probe": adapted}, {"probe": val_scores}, flops)

    @torch.inference_mode()
    def calibrate(self, out: torch.Tensor, targets: torch.Tensor) -> tuple[float, dict[str, float]]:
        temperature = fit_map_temperature(out, targets)
        total = torch.zeros(3 * out.shape[1] + 2, dtype=torch.float64)
        for part, mask in zip((out / temperature).split(BATCH), targets.split(BATCH), strict=True):
            total += self.tally(part.float(), mask)
        *_, loss, labelled = total.tolist()
        return temperature, {**self.scores(total[:-2].numpy()), "loss": loss / max(1.0, labelled)}

    def positions(self, size: int) -> int:
        return (size // 8) ** 2

    def student_options(self, part: StudentConfig) -> dict[str, Any]:
        return {"head": part.head}

    def build_student(
        self,
        name: str,
        kwargs: dict[str, Any],
        outputs: int,
        image_size: int,
        pretrained: bool | str = False,
        checkpoint: str | None = None,
        **options: Any,
    ) -> Segmenter:
        return build_segmenter(name, kwargs, outputs, image_size, pretrained, checkpoint, **options)

    def save_student(self, student: Student, folder: Path, classes: Sequence[str]) -> None:
        assert isinstance(student, Segmenter)
        save_segmenter(student, folder, classes)

    def load_student(self, folder: str | Path, device: str | torch.device = "cpu") -> Segmenter:
        return load_segmenter(folder, device)

    def test_rows(self, out: np.ndarray, columns: Rows) -> tuple[Rows, Any]:
        """By image and class, the numbers of true positive, false positive and false negative pixels; and the confusion
        counts of pixels."""
        shapes = columns["shape"]
        ends = np.cumsum(shapes.prod(1)).tolist()
        classes = out.shape[1]
        rows: list[Sequence[np.ndarray]] = []
        confusion = np.zeros(classes * classes, np.int64)
        for values, end, (height, width) in zip(out, ends, shapes.tolist(), strict=True):
            mask = columns["mask"][end - height * width : end].reshape(height, width)
            resized = resize_map(torch.from_numpy(values).to(device())[None], (height, width))
            predicted = resized[0].argmax(0).cpu().numpy()
            rows.append([counts[0] for counts in pixel_counts(predicted[None], mask[None], classes)])
            labelled = mask != IGNORE
            pairs = mask[labelled].astype(np.int64) * classes + predicted[labelled]
            confusion += np.bincount(pairs, minlength=classes * classes)
        counted = [[row[i] for row in rows] for i in range(len(COUNTS))]
        stacked = [np.stack(values) if values else np.zeros((0, classes), np.int64) for values in counted]
        return {f"_{name}": values for name, values in zip(COUNTS, stacked, strict=True)}, confusion.tolist()

    def test_columns(self, columns: Rows) -> Rows:
        return {}

    def image_counts(self, rows: Rows, model: str) -> np.ndarray:
        tp, fp, fn = (rows[f"{model}_{name}"] for name in COUNTS)
        return np.concatenate([tp, tp + fp, tp + fn], 1)

    def weighted_scores(self, metric: str, seeds: Sequence[Rows]) -> WeightedScores:
        if metric != "miou":
            return super().weighted_scores(metric, seeds)
        tp, fp, fn = (np.stack([rows[f"student_{name}"] for rows in seeds]) for name in COUNTS)
        return MeanIoU(tp, fp, fn)

    def test_metrics(self, rows: Rows, model: str, classes: list[str]) -> dict[str, Any]:
        tp, fp, fn = (rows[f"{model}_{name}"] for name in COUNTS)
        return metrics(tp, fp, fn, classes)

    def exported_output(self, logits: np.ndarray, columns: Rows) -> np.ndarray:
        """(N, 3, C) int64: by image and class, the numbers of true positive, false positive and false negative pixels
        at the size of the masks."""
        rows, _ = self.test_rows(logits, columns)
        return np.stack([rows[f"_{name}"] for name in COUNTS], 1)

    def exported_metrics(self, student: Student, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        return metrics(outputs[:, 0], outputs[:, 1], outputs[:, 2], student.classes)

    def confusion(self, rows: Rows, counts: Sequence[Any], classes: list[str]) -> np.ndarray:
        """Confusion counts (C, C) of pixels."""
        total = np.zeros((len(classes), len(classes)), np.int64)
        for shard_counts in counts:
            total += np.array(shard_counts, dtype=np.int64).reshape(total.shape)
        return total

    def worst(self, tested: TestSet) -> list[WorstError]:
        """The images with the lowest IoU, averaged over the classes of the image, each with its mask and the
        prediction."""
        rows, classes = tested.rows, tested.task.classes
        tp, fp, fn = (rows[f"student_{name}"].astype(np.float64) for name in COUNTS)
        union = tp + fp + fn
        iou = np.divide(tp, union, out=np.full(tp.shape, np.nan), where=union > 0)
        mean = np.array([np.nanmean(row) if np.isfinite(row).any() else 1.0 for row in iou])
        chosen = np.argsort(mean, kind="stable")[:WORST].tolist()
        by_uri = {e.uri: e for e in tested.task.test}
        examples = [by_uri[str(rows["uri"][i])] for i in chosen]
        student = tested.student()
        errors = []
        decoded = tested.reader.read([(e.uri, e.label, e.mask) for e in examples], tested.max_pixels)
        for i, example in zip(chosen, decoded, strict=True):
            if example.image is None or example.mask is None:
                continue
            predicted = student.predict([example.image])[0].mask
            names = [most_pixels(values, example.mask != IGNORE, classes) for values in (example.mask, predicted)]
            picture = triptych(example.image, example.mask, predicted, IGNORE)
            errors.append(WorstError(picture, names[0], names[1], float(mean[i]), example.uri))
        return errors


TASKS.register("segmentation")(Segmentation())


def pixel_counts(
    predicted: np.ndarray, masks: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By image and class, the numbers of true positive, false positive and false negative pixels, without ignored
    pixels.

    Args:
        predicted: (N, H, W) integers, 0..C-1; any value where the mask is ignored.
        masks: (N, H, W) integers, 0..C-1 or `IGNORE`.
        num_classes: C.

    Returns:
        tp, fp, fn: (N, C) int64.

    Raises:
        ValueError: the shapes differ, or a class is outside 0..C-1.
    """
    if predicted.shape != masks.shape or masks.ndim != 3:
        raise ValueError(f"predictions {predicted.shape} and masks {masks.shape} must both be (N, H, W)")
    n = len(masks)
    counted = masks != IGNORE
    true, claimed = masks[counted].astype(np.int64), predicted[counted].astype(np.int64)
    for name, values in (("mask", true), ("prediction", claimed)):
        if values.size and not (values.min() >= 0 and values.max() < num_classes):
            raise ValueError(
                f"a {name} has classes from {values.min()} to {values.max()}, outside 0..{num_classes - 1}"
            )
    first = np.repeat(np.arange(n) * num_classes, counted.reshape(n, -1).sum(1))
    hit = true == claimed

    def per_image(classes: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.bincount((first + classes)[where], minlength=n * num_classes).reshape(n, num_classes)

    return per_image(true, hit), per_image(claimed, ~hit), per_image(true, ~hit)


def scores(counts: np.ndarray) -> dict[str, float]:
    """The metrics of summed counts, fractions.

    Args:
        counts: (3 C,): by class, the numbers of correct, of predicted and of labelled pixels.

    Returns:
        ``miou``: mean of TP / (TP + FP + FN) over the classes that occur in the masks or in the predictions;
        ``pixel_accuracy``; ``mean_class_accuracy``: mean recall over the classes that occur in the masks.

    Raises:
        ValueError: there are no labelled pixels.
    """
    right, claimed, true = np.asarray(counts, np.float64).reshape(3, -1)
    if not true.any():
        raise ValueError("no pixels to score")
    return {
        "miou": float(np.nanmean(ious(right, claimed, true))),
        "pixel_accuracy": float(right.sum() / true.sum()),
        "mean_class_accuracy": float(np.nanmean(classification.recalls(right, true))),
    }


def ious(right: np.ndarray, claimed: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Intersection over union by class (C,), NaN for a class that does not occur."""
    union = claimed + true - right
    return np.divide(right, union, out=np.full(len(union), np.nan), where=union > 0)


def metrics(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Exact metrics over all images.

    Args:
        tp, fp, fn: (N, C) counts of `pixel_counts`.
        classes: C names.

    Returns:
        `scores`; ``per_class``, the IoU by class name (None for a class that does not occur); ``n``, the number of
        images.

    Raises:
        ValueError: no pixel counts.
    """
    right, wrong, missed = (np.asarray(x, np.int64).reshape(-1, len(classes)).sum(0) for x in (tp, fp, fn))
    counts = right, right + wrong, right + missed
    per_class = classification.by_class(ious(*counts), classes)
    n = len(np.asarray(tp).reshape(-1, len(classes)))
    return {**scores(np.concatenate(counts)), "per_class": per_class, "n": n}
