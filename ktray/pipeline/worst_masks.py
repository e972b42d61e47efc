"""Test images that a segmentation student gets worst, beside their masks, for the report."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np
import torch

from ktray.data.labelled.masks import IGNORE
from ktray.models.student.segmenter import DenseStudent
from ktray.reporting.report import WorstError
from ktray.stages.base import RunContext
from ktray.stages.evaluate import stage as evaluate
from ktray.stages.labels import Masks, read_examples
from ktray.stages.transfer import starting_at, student_spec
from ktray.training.worker import WorkerContext

if TYPE_CHECKING:
    from ktray.pipeline.graph import StageOutputs

WORST = 24
# Longer side of a picture in the report, pixels.
SIDE = 256


def worst_masks(context: RunContext, made: StageOutputs) -> list[WorstError]:
    """The images with the lowest IoU (mean over the classes in an image): image, truth, prediction, side by side."""
    assert made.evaluate is not None  # a trial has no report
    rows = evaluate.load(made.evaluate.stage)
    tp, fp, fn = (rows[f"student_{name}"].astype(np.float64) for name in ("tp", "fp", "fn"))
    union = tp + fp + fn
    iou = np.divide(tp, union, out=np.full(tp.shape, np.nan), where=union > 0)
    mean = np.array([np.nanmean(row) if np.isfinite(row).any() else 1.0 for row in iou])
    chosen = np.argsort(mean, kind="stable")[:WORST].tolist()
    spec = starting_at(student_spec(context), made.student)
    model, _ = spec.build(WorkerContext(torch.device("cpu"), 0, 1, 1.0), 0)
    student = spec.make(bare=True)
    assert isinstance(student, DenseStudent)
    student.model.load_state_dict(model.state_dict())
    masks = Masks.of(context)
    by_uri = {e.uri: e for e in context.task.test}
    examples = [by_uri[str(rows["uri"][i])] for i in chosen]
    listed = [(e.uri, e.label, e.mask) for e in examples]
    found = []
    for i, (uri, _, image, mask, _) in zip(
        chosen, read_examples(listed, context.recipe.data.max_pixels, masks), strict=True
    ):
        if image is None or mask is None:
            continue
        predicted = student.predict([image])[0].mask
        names = [_most(values, mask, context.task.classes) for values in (mask, predicted)]
        found.append(WorstError(triptych(image, mask, predicted), names[0], names[1], float(mean[i]), uri))
    return found


def triptych(image: np.ndarray, mask: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Image, mask and prediction beside each other: (H, W, 3), (H, W), (H, W) uint8 to (H', 3 W' + gaps, 3) uint8."""
    step = max(1, -(-max(mask.shape) // SIDE))
    parts = [image[::step, ::step], _paint(mask[::step, ::step]), _paint(predicted[::step, ::step])]
    gap = np.full((parts[0].shape[0], 2, 3), 255, np.uint8)
    return np.concatenate([parts[0], gap, parts[1], gap, parts[2]], axis=1)


def _paint(mask: np.ndarray) -> np.ndarray:
    """A colour a class; white where there is none."""
    # Steps of the golden ratio keep the hues of neighbouring numbers far apart.
    hues = [colorsys.hsv_to_rgb((0.1 + i * 0.618034) % 1.0, 0.65, 0.85 if i % 2 else 0.6) for i in range(256)]
    palette = np.round(255 * np.array(hues)).astype(np.uint8)
    palette[0], palette[IGNORE] = (40, 44, 52), (255, 255, 255)
    return np.asarray(palette[mask])


def _most(values: np.ndarray, mask: np.ndarray, classes: list[str]) -> str:
    """Up to three classes of most pixels, the first one (commonly what is behind) last."""
    counts = np.bincount(values[mask != IGNORE], minlength=len(classes))
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    order.sort(key=lambda i: i == 0)
    return ", ".join(classes[i] for i in order[:3]) or "none"
