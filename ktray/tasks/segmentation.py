"""Semantic segmentation: loss on label maps, counts of pixels per image, and metrics of any set of images from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ktray.data.labelled.masks import IGNORE


def pixel_counts(
    predicted: np.ndarray, masks: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels per image and class that are right, wrongly claimed and missed; those to be ignored count nowhere.

    Args:
        predicted: (N, H, W) integers, 0..C-1 (anything where the mask is to be ignored).
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
    true, found = masks[counted].astype(np.int64), predicted[counted].astype(np.int64)
    for name, values in (("mask", true), ("prediction", found)):
        if values.size and not (values.min() >= 0 and values.max() < num_classes):
            raise ValueError(f"a {name} holds class {values.min()} or {values.max()}, outside 0..{num_classes - 1}")
    first = np.repeat(np.arange(n) * num_classes, counted.reshape(n, -1).sum(1))
    hit = true == found

    def per_image(classes: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.bincount((first + classes)[where], minlength=n * num_classes).reshape(n, num_classes)

    return per_image(true, hit), per_image(found, ~hit), per_image(true, ~hit)


def metrics(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Exact metrics over all images, from counts that are summed first, as is usual for ADE20K and Pascal VOC.

    Args:
        tp, fp, fn: (N, C) counts of `pixel_counts`.
        classes: C names.

    Returns:
        ``miou``: mean of TP / (TP + FP + FN) over the classes that occur in the masks or in the predictions; one that
        occurs in neither is left out. ``pixel_accuracy``; ``mean_class_accuracy`` (mean recall over the classes that
        occur in the masks); fractions. ``per_class`` IoU by class name (null for a class that is left out); ``n``
        images.

    Raises:
        ValueError: no pixel counts.
    """
    right, claimed, missed = (np.asarray(x, np.int64).reshape(-1, len(classes)).sum(0) for x in (tp, fp, fn))
    true, union = right + missed, right + claimed + missed
    if not true.any():
        raise ValueError("no pixels to score")
    iou = np.divide(right, union, out=np.full(len(classes), np.nan), where=union > 0)
    recall = np.divide(right, true, out=np.full(len(classes), np.nan), where=true > 0)
    return {
        "miou": float(np.nanmean(iou)),
        "pixel_accuracy": float(right.sum() / true.sum()),
        "mean_class_accuracy": float(np.nanmean(recall)),
        "per_class": {name: None if np.isnan(x) else float(x) for name, x in zip(classes, iou, strict=True)},
        "n": len(np.asarray(tp).reshape(-1, len(classes))),
    }
