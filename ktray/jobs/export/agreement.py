"""Whether the predictions of an exported file agree with those of the student, and the accuracy of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ktray.errors import KtrayError
from ktray.jobs.export.comparison import Comparison
from ktray.jobs.export.images import Batch
from ktray.models.student.classifier import Student
from ktray.tasks.base import TaskKind

# Rounding of float32 arithmetic in another order, relative to the largest logit; observed values are a hundredth of it.
TOLERANCE = 1e-3
# Share of the decisions (classes of images, sets, or pixels) that rounding may change at ties and at thresholds.
TIES = 0.01
PYTORCH = "pytorch"


class Scorer(Protocol):
    """An open exported file."""

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Compute scores (N, ...) float32 of pixels (N, 3, height, width) uint8 from the shipped preprocessing."""
        ...


@runtime_checkable
class Answering(Protocol):
    """An open exported file that returns probabilities and decisions instead of logits."""

    def answers(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name, as `Student.answers`, of pixels (N, 3, height, width) uint8."""
        ...

    def expected(self, student: Student, logits: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the same outputs in PyTorch from the student's logits (N, ...)."""
        ...

    def as_logits(self, probabilities: np.ndarray) -> np.ndarray:
        """Logits (N, ...) float32 that have these probabilities."""
        ...


@dataclass
class AgreementScores:
    """Outputs of several models for the same images.

    Attributes:
        outputs: by model, what the task kind keeps of its logits (`TaskKind.exported_output`), by default the logits
            (N, C) float32 themselves.
        compared: by file, the comparison of its logits, or of its probabilities, with the student's.
        labels: the column ``label`` of the task kind's reader for N images.
        levels: largest difference of a pixel value between ktray's preprocessing and the shipped one, 0..255.
        differing: number of images with such a difference.
    """

    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    levels: int = 0
    differing: int = 0


def score(student: Student, kind: TaskKind, files: Mapping[str, Scorer], batches: Iterable[Batch]) -> AgreementScores:
    """Run the student on pixels of ktray's preprocessing, and each file on pixels of the shipped preprocessing."""
    scores = AgreementScores()
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (PYTORCH, *files)}
    comparisons = {name: Comparison() for name in files}
    labels = []
    for batch in batches:
        gap = np.abs(batch.pixels.astype(np.int16) - batch.shipped).reshape(len(batch.labels), -1).max(1)
        scores.levels = max(scores.levels, int(gap.max()))
        scores.differing += int((gap > 0).sum())
        labels.append(batch.labels)
        with torch.inference_mode():
            reference = student.logits(torch.from_numpy(batch.pixels)).numpy()
        rows[PYTORCH].append(kind.exported_output(reference, batch.columns))
        for name, model in files.items():
            out = _compared(comparisons[name], student, model, batch.shipped, reference)
            rows[name].append(kind.exported_output(out, batch.columns))
    scores.outputs = {name: np.concatenate(parts) for name, parts in rows.items()}
    scores.compared = {name: comparison.facts() for name, comparison in comparisons.items()}
    scores.labels = np.concatenate(labels)
    return scores


def _compared(
    comparison: Comparison, student: Student, model: Scorer, pixels: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """Compare a file with the student's logits of the same images; returns the file's logits."""
    if not isinstance(model, Answering):
        out = model.logits(pixels)
        comparison.add(reference, out)
        return out
    found, expected = model.answers(pixels), model.expected(student, reference)
    comparison.add(expected["probabilities"], found["probabilities"])
    for name in expected:
        if name != "probabilities":
            comparison.decided(expected[name], found[name])
    return model.as_logits(found["probabilities"])


def outputs(kind: TaskKind, model: Scorer, batches: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]) -> np.ndarray:
    """Compute what the task kind keeps of a file's logits.

    Args:
        batches: pixels (N, 3, height, width) uint8 and the columns of the task kind's reader.
    """
    return np.concatenate([kind.exported_output(model.logits(pixels), columns) for pixels, columns in batches])


def logits(model: Scorer, pixels: np.ndarray, batch: int = 64) -> np.ndarray:
    """Compute logits (N, ...) float32 of pixels (N, 3, height, width) uint8, which may be a memory-mapped file."""
    return np.concatenate([model.logits(pixels[at : at + batch]) for at in range(0, len(pixels), batch)])


def compare(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Compare the logits (N, C) or maps of logits (N, C, h, w) of two models for the same images; see `Comparison`."""
    comparison = Comparison()
    comparison.add(reference, other)
    return comparison.facts()


def require(comparison: dict[str, Any], what: str) -> None:
    """Raise `KtrayError` if the file's outputs differ from those of the student by more than rounding.

    Args:
        comparison: see `Comparison.facts`.
        what: name of the file.
    """
    allowed = TOLERANCE * max(1.0, comparison["largest_logit"])
    if not comparison["max_difference"] <= allowed:  # NaN is not below the limit either
        raise KtrayError(
            f"{what} does not agree with the PyTorch model: its outputs differ by {comparison['max_difference']:.3g} "
            f"(rounding explains at most {allowed:.3g}), and it predicts another class for "
            f"{comparison['top1_differs']} of {comparison['images']} images",
            "The file was not written. Report the name of the student; its folder can be loaded in timm.",
        )
    if comparison.get("decisions_differ", 0) > TIES * comparison.get("decisions", 0):
        raise KtrayError(
            f"{what} does not agree with the PyTorch model: its probabilities are right, but "
            f"{comparison['decisions_differ']:,} of {comparison['decisions']:,} decisions differ",
            "The file was not written. Report the name of the student; export.graph=logits has no decisions.",
        )


def metrics(scores: AgreementScores, kind: TaskKind, student: Student, metric: str) -> dict[str, Any]:
    """Return the metric of the task as ``metric``, all metrics of the task kind, and ``per_class``, by model."""
    by_model = {name: kind.exported_metrics(student, rows, scores.labels) for name, rows in scores.outputs.items()}
    return {
        name: {"metric": values[metric], **{n: values[n] for n in kind.metrics}, "per_class": values["per_class"]}
        for name, values in by_model.items()
    }
