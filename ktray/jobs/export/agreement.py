"""Whether an exported file says what the student says, image by image, and how good each is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ktray.errors import KtrayError
from ktray.jobs.export.images import Batch
from ktray.models.student.classifier import Student
from ktray.tasks import classification

# Of float32 arithmetic in another order, relative to the largest logit; what is seen is a hundredth of it.
TOLERANCE = 1e-3
PYTORCH = "pytorch"


class Scorer(Protocol):
    """A written file, opened."""

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 3, height, width) uint8, as the shipped preprocessing makes them, to scores (N, C) float32."""
        ...


@dataclass
class AgreementScores:
    """Logits of several models of the same images.

    Attributes:
        logits: by model, (N, C) float32.
        labels: (N,) int64.
        levels: largest difference of a pixel between ktray's preprocessing and the shipped one, 0..255.
        differing: images that have such a difference.
    """

    logits: dict[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    levels: int = 0
    differing: int = 0


def score(student: Student, files: Mapping[str, Scorer], batches: Iterable[Batch]) -> AgreementScores:
    """Run the student on ktray's pixels and each file on those of the shipped preprocessing."""
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
    """(N, 3, height, width) uint8, also in a file, to (N, C) float32."""
    return np.concatenate([model.logits(pixels[at : at + batch]) for at in range(0, len(pixels), batch)])


def compare(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """How far two models' logits (N, C) of the same images lie apart.

    Returns:
        ``images``; ``max_difference`` of the logits; ``largest_logit`` of the reference, to judge it by;
        ``top1_equal``, the share of images with the same most probable class; ``top1_differs``, the number of others;
        ``widest_margin``, the largest distance between the reference's first two logits among those others.
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
    """Raises KtrayError: the file's logits are not those of the student, beyond rounding."""
    allowed = TOLERANCE * max(1.0, comparison["largest_logit"])
    if not comparison["max_difference"] <= allowed:  # not a number is not below it either
        raise KtrayError(
            f"{what} does not say what the PyTorch model says: its logits differ by {comparison['max_difference']:.3g} "
            f"(at most {allowed:.3g} would be rounding), top-1 on "
            f"{comparison['top1_differs']} of {comparison['images']} images",
            "It was not written. Report the student's name; its folder loads in timm as it is.",
        )


def metrics(scores: AgreementScores, classes: list[str], metric: str) -> dict[str, Any]:
    """By model, ``metric``, ``top1`` and ``per_class``, fractions (see `ktray.tasks.classification.metrics`)."""
    by_model = {name: classification.metrics(rows, scores.labels, classes) for name, rows in scores.logits.items()}
    return {
        name: {"metric": values[metric], "top1": values["top1"], "per_class": values["per_class"]}
        for name, values in by_model.items()
    }
