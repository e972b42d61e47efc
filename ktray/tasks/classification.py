"""Classification: loss on labels and metrics."""

from __future__ import annotations

from typing import Any

import numpy as np


def metrics(logits: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Exact metrics over all rows.

    Args:
        logits: (N, C) float scores, any scale.
        labels: (N,) int, 0..C-1.
        classes: C names.

    Returns:
        ``top1`` and ``mean_class_accuracy`` (mean recall over the classes that occur), fractions;
        ``per_class`` recall by class name (null for a class without rows); ``n``.
    """
    if len(logits) == 0:
        raise ValueError("no rows to score")
    predicted = logits.argmax(1)
    confusion = confusion_matrix(predicted, labels, len(classes))
    rows = confusion.sum(1)
    recall = np.divide(np.diag(confusion), rows, out=np.full(len(classes), np.nan), where=rows > 0)
    return {
        "top1": float(np.diag(confusion).sum() / len(labels)),
        "mean_class_accuracy": float(np.nanmean(recall)),
        "per_class": {name: None if np.isnan(r) else float(r) for name, r in zip(classes, recall, strict=True)},
        "n": len(labels),
    }


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) counts: rows are true classes, columns predictions."""
    pairs = labels.astype(np.int64) * num_classes + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) probabilities of (N, C) logits."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))
