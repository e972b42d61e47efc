"""Validation during training: exact counts over all ranks, and the score that chooses among weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ktray.data.labelled.masks import IGNORE
from ktray.models.maps import resize_map
from ktray.training.worker import WorkerContext

Evaluate = Callable[[nn.Module], tuple[float, dict[str, float]]]


def class_scores(right: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
    """``top1`` and ``mean_class_accuracy`` (over the classes that occur) of counts by class, (C,) each."""
    seen = rows > 0
    return {
        "top1": float(right.sum() / rows.sum()),
        "mean_class_accuracy": float((right[seen] / rows[seen]).mean()),
    }


def score(found: dict[str, float], metric: str, loss: float) -> float:
    """What models are ranked by: the metric, and among equals the lower loss."""
    return found[metric] - 1e-5 * min(loss, 50.0)


def pixel_scores(right: torch.Tensor, claimed: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
    """``miou``, ``pixel_accuracy`` and ``mean_class_accuracy`` of pixels by class that are right, predicted and true,
    (C,) each; as `ktray.tasks.segmentation.metrics`."""
    union = claimed + rows - right
    seen = union > 0
    return {
        "miou": float((right[seen] / union[seen]).mean()),
        "pixel_accuracy": float(right.sum() / rows.sum()),
        "mean_class_accuracy": class_scores(right, rows)["mean_class_accuracy"],
    }


def evaluator(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    predict: Any,
    env: WorkerContext,
    classes: int,
    metric: str,
    batch: int = 256,
) -> Evaluate:
    """model -> (score, {"val_loss", "val_<metric>"...}) over all rows, which the ranks share.

    Counts are summed as integers, so accuracy does not depend on the number of ranks.

    Args:
        pixels: (N, 3, H, W) uint8, all of validation on every rank.
        labels: (N,) int64 classes, or (N, H, W) uint8 label maps, for which `pixel_scores` are made.
        predict: (model, pixels on the device) -> logits (n, C) or (n, C, h, w).
        metric: of `class_scores` or `pixel_scores`; what the score is.
    """
    mine = slice(env.rank, None, env.world)
    pixels, labels = pixels[mine], labels[mine]

    dense = labels.ndim == 3

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> tuple[float, dict[str, float]]:
        model.eval()
        sums = torch.zeros(3 * classes + 1, dtype=torch.float64, device=env.device)
        for at in range(0, len(labels), batch):
            x, y = pixels[at : at + batch].to(env.device), labels[at : at + batch].to(env.device)
            logits = predict(model, x).float()
            if dense:
                logits = resize_map(logits, (y.shape[1], y.shape[2]))
                sums[-1] += F.cross_entropy(logits, y.long(), reduction="sum", ignore_index=IGNORE)
                found, true = logits.argmax(1)[y != IGNORE], y[y != IGNORE].long()
            else:
                sums[-1] += F.cross_entropy(logits, y, reduction="sum")
                found, true = logits.argmax(1), y
            for i, counted in enumerate((true[found == true], found, true)):
                sums[i * classes : (i + 1) * classes] += torch.bincount(counted, minlength=classes)
        if env.world > 1:
            dist.all_reduce(sums)
        right, claimed, rows = sums[:-1].cpu().view(3, classes)
        scores = pixel_scores(right, claimed, rows) if dense else class_scores(right, rows)
        loss = float(sums[-1] / rows.sum())
        return score(scores, metric, loss), {**{f"val_{k}": v for k, v in scores.items()}, "val_loss": loss}

    return evaluate
