"""Whether the predictions of an exported file agree with those of the student, and the accuracy of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ktray.errors import KtrayError
from ktray.jobs.export.images import Batch
from ktray.models.student.classifier import Student
from ktray.tasks.base import TaskKind

# Rounding of float32 arithmetic in another order, relative to the largest logit; observed values are a hundredth of it.
TOLERANCE = 1e-3
PYTORCH = "pytorch"


class Scorer(Protocol):
    """An open exported file."""

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Compute scores (N, C) float32 of pixels (N, 3, height, width) uint8 from the shipped preprocessing."""
        ...


@dataclass
class AgreementScores:
    """Logits of several models for the same images.

    Attributes:
        logits: (N, C) float32, by model.
        labels: the column ``label`` of the task kind's reader for N images.
        levels: largest difference of a pixel value between ktray's preprocessing and the shipped one, 0..255.
        differing: number of images with such a difference.
    """

    logits: dict[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    levels: int = 0
    differing: int = 0


def score(student: Student, files: Mapping[str, Scorer], batches: Iterable[Batch]) -> AgreementScores:
    """Run the student on pixels of ktray's preprocessing, and each file on pixels of the shipped preprocessing."""
    scores = AgreementScores()
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (PYTORCH, *files)}
    labels = []
    for batch in batches:
        gap = np.abs(batch.pixels.astype(np.int16) - batch.shipped).reshape(len(batch.labels), -1).max(1)
        scores.levels = max(scores.levels, int(gap.max()))
        scores.differing += int((gap > 0).sum())
        labels.append(batch.labels)
        with torch.inference_mode():
            rows[PYTORCH].append(student.logits(torch.from_numpy(batch.pixels)).numpy())
        for name, model in files.items():
            rows[name].append(model.logits(batch.shipped))
    scores.logits = {name: np.concatenate(parts) for name, parts in rows.items()}
    scores.labels = np.concatenate(labels)
    return scores


def logits(model: Scorer, pixels: np.ndarray, batch: int = 64) -> np.ndarray:
    """Compute logits (N, C) float32 of pixels (N, 3, height, width) uint8, which may be a memory-mapped file."""
    return np.concatenate([model.logits(pixels[at : at + batch]) for at in range(0, len(pixels), batch)])


def compare(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Compare the logits (N, C) of two models for the same images.

    Returns:
        ``images``; ``max_difference`` of the logits; ``largest_logit`` of the reference, as a scale for it;
        ``top1_equal``, the share of images with the same most probable class; ``top1_differs``, the number of the other
        images; ``widest_margin``, the largest distance between the reference's two largest logits among these.
    """
    same = reference.argmax(1) == other.argmax(1)
    top = np.sort(reference[~same], axis=1)[:, -2:]
    return {
        "images": len(reference),
        "max_difference": float(np.abs(reference - other).max()),
        "largest_logit": float(np.abs(reference).max()),
        "top1_equal": float(same.mean()),
        "top1_differs": int((~same).sum()),
        "widest_margin": float((top[:, 1] - top[:, 0]).max()) if len(top) else 0.0,
    }


def require(comparison: dict[str, Any], what: str) -> None:
    """Raise `KtrayError` if the file's logits differ from those of the student by more than rounding.

    Args:
        comparison: see `compare`.
        what: name of the file.
    """
    allowed = TOLERANCE * max(1.0, comparison["largest_logit"])
    if not comparison["max_difference"] <= allowed:  # NaN is not below the limit either
        raise KtrayError(
            f"{what} does not agree with the PyTorch model: its logits differ by {comparison['max_difference']:.3g} "
            f"(rounding explains at most {allowed:.3g}), and it predicts another class for "
            f"{comparison['top1_differs']} of {comparison['images']} images",
            "The file was not written. Report the name of the student; its folder can be loaded in timm.",
        )


def metrics(scores: AgreementScores, kind: TaskKind, student: Student, metric: str) -> dict[str, Any]:
    """Return the metric of the task as ``metric``, all metrics of the task kind, and ``per_class``, by model."""
    by_model = {name: kind.exported_metrics(student, rows, scores.labels) for name, rows in scores.logits.items()}
    return {
        name: {"metric": values[metric], **{n: values[n] for n in kind.metrics}, "per_class": values["per_class"]}
        for name, values in by_model.items()
    }
