"""The student for semantic segmentation: a plain timm backbone with a small published head.

``lraspp`` is LR-ASPP (MobileNetV3, arXiv 1905.02244, section 6.4): the last map, weighted by globally pooled features,
together with an earlier and finer map. ``deeplabv3`` is atrous spatial pyramid pooling on the last map (DeepLabV3,
arXiv 1706.05587, section 3.3). Both heads are from torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.lraspp import LRASPPHead

from ktray.data.labelled.masks import MAX_CLASSES
from ktray.errors import KtrayError
from ktray.models.maps import resize_map
from ktray.models.messages import cause
from ktray.models.student.classifier import Student, build_student, sure_label
from ktray.models.student.given import AnyImage

Head = Literal["lraspp", "deeplabv3"]
# Channels of LR-ASPP, as published; DeepLabV3 always has 256.
WIDTH = 128
# The finer map of LR-ASPP has stride 8 in the paper. If it has fewer positions per side than this, a finer map is used.
_LOW_STRIDE, _LOW_SIDE = 8, 16
# The rates of DeepLabV3 are for a map with 64 positions per side (512 px at stride 8).
_RATES, _RATES_SIDE = (12, 24, 36), 64
# Number of classes that are upsampled at a time for a mask of the image's own size; limits memory.
_CLASSES_AT_ONCE = 16


class SegmenterNet(nn.Module):
    """The network of a segmentation student: (N, 3, h, w) normalised float to logits (N, C, h', w').

    The map of logits has the stride of the finest map that the head reads; see `ktray.models.maps.resize_map`.

    Args:
        backbone: a timm model without classifier.
        head: name of the head.
        num_classes: C.
        size: (height, width) of the input, in pixels; it determines the levels and the rates of the head.
        width: channels of ``lraspp``.

    Attributes:
        levels: indices of the backbone's maps that the head reads.
        shape: (C, h', w') of the logits at this size.

    Raises:
        KtrayError: the backbone has no feature maps, or fails at this size.
    """

    def __init__(self, backbone: nn.Module, head: Head, num_classes: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes, self.width = num_classes, width
        shapes = _map_shapes(backbone, size)
        high = shapes[-1]
        if head == "lraspp":
            self.levels = [_low_level(shapes, size), len(shapes) - 1]
            self.head: nn.Module = LRASPPHead(shapes[self.levels[0]][0], high[0], num_classes, width)
        else:
            self.levels = [len(shapes) - 1]
            rates = [max(1, round(rate * min(high[1:]) / _RATES_SIDE)) for rate in _RATES]
            self.head = DeepLabHead(high[0], num_classes, rates)
        self.kind = head
        self.shape = (num_classes, *shapes[self.levels[0]][1:])

    @property
    def timm_model(self) -> nn.Module:
        """The plain timm model without the head."""
        return self.backbone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        backbone: Any = self.backbone
        maps = backbone.forward_intermediates(
            x, indices=self.levels, norm=True, stop_early=True, intermediates_only=True
        )
        out: torch.Tensor = self.head({"low": maps[0], "high": maps[1]} if self.kind == "lraspp" else maps[0])
        return out


@dataclass(frozen=True)
class MaskPrediction:
    """The most probable class of every pixel of one image, at the image's own size.

    Attributes:
        mask: (H, W) uint8, indices into `classes`.
        probability: (H, W) float32, probability of this class.
        classes: class names.
    """

    mask: np.ndarray
    probability: np.ndarray
    classes: list[str]

    def shares(self) -> dict[str, float]:
        """Share of the image's pixels by class name, in descending order, without classes that do not occur."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.classes))
        return {self.classes[i]: float(counts[i] / self.mask.size) for i in np.argsort(-counts) if counts[i]}


class Segmenter(Student):
    """A segmentation model with its preprocessing and class names.

    Its ``name`` and ``kwargs`` are those of the backbone. Its ``preprocess`` resizes whole images to the model's size
    without keeping the aspect ratio, so that every pixel gets a class. Its `logits` are maps (N, C, h', w').
    """

    def predict(self, images: Sequence[AnyImage], batch: int = 16) -> list[MaskPrediction]:
        """Segment whole images, in evaluation mode; for the arguments see `Student.predict`."""
        return super().predict(images, batch)

    def served_facts(self) -> dict[str, Any]:
        return {**super().served_facts(), "maps": True}

    def answers(self, out: torch.Tensor, temperature: float, threshold: float) -> dict[str, torch.Tensor]:
        """``probabilities`` (N, C, h', w') float32 at the resolution of the logits, and ``label`` (N, height, width)
        int32 at the resolution of the input: the number of the class of each pixel, or -1 for none."""
        probabilities = (out / temperature).softmax(1)
        resized = (resize_map(out, self.preprocess.size) / temperature).softmax(1)
        return {"probabilities": probabilities, "label": sure_label(resized, threshold)}

    def decide(self, logits: torch.Tensor, sizes: Sequence[tuple[int, ...]]) -> list[MaskPrediction]:
        """A `MaskPrediction` for each image, at the image's own size."""
        predictions = []
        for logit_map, (height, width) in zip(logits, sizes, strict=True):
            predictions.append(MaskPrediction(*_decide(logit_map, (height, width)), self.classes))
        return predictions


def build_segmenter(
    name: str,
    kwargs: dict[str, Any] | None = None,
    num_classes: int = 150,
    image_size: int | None = None,
    pretrained: bool | str = False,
    checkpoint: str | None = None,
    head: Head = "lraspp",
    width: int = WIDTH,
) -> Segmenter:
    """Build a segmentation student by the timm name of its backbone.

    Args:
        name, kwargs, image_size: see `ktray.models.student.classifier.build_student`.
        num_classes: number of classes of the task, at most 255.
        pretrained, checkpoint: initial weights of the backbone; the head has random initial weights.
        head: ``lraspp`` or ``deeplabv3``.
        width: channels of ``lraspp``.

    Raises:
        KtrayError: see `build_student`; or the model has no feature maps, or there are too many classes.
    """
    if not 2 <= num_classes <= MAX_CLASSES:
        raise KtrayError(
            f"Segmentation needs 2 to {MAX_CLASSES} classes, but the task has {num_classes}", "Check task.data."
        )
    # build_student checks the name, the arguments and the weights. The classifier is then removed.
    plain = build_student(name, kwargs, 1, image_size, pretrained, checkpoint)
    backbone: Any = plain.model
    backbone.reset_classifier(0)
    preprocess = replace(plain.preprocess, resize_mode="squash", crop_pct=1.0)
    model = SegmenterNet(backbone, head, num_classes, preprocess.size, width)
    stride = max(1, preprocess.size[0] // model.shape[1])
    warnings = []
    if stride > 16 or model.shape[1] < 4:
        warnings.append(
            f"the logits of {name} with {head} form a map of {model.shape[1]}x{model.shape[2]} for "
            f"{preprocess.size[0]}x{preprocess.size[1]} px, so that outlines will be coarse; use a larger "
            "image_size, a lower stride (student.kwargs: output_stride, patch_size) or the head lraspp"
        )
    return Segmenter(model, name, plain.kwargs, preprocess, [str(i) for i in range(num_classes)], warnings)


@torch.no_grad()
def _map_shapes(backbone: Any, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(channels, rows, columns) of every feature map, from input to output."""
    model_type = type(backbone).__name__
    if not hasattr(backbone, "forward_intermediates"):
        raise KtrayError(f"{model_type} has no feature maps", "Choose another student.name.")
    was_training = backbone.training
    backbone.eval()
    first = next(backbone.parameters())
    try:
        x = torch.zeros(1, 3, *size, dtype=first.dtype, device=first.device)
        maps = backbone.forward_intermediates(x, norm=True, intermediates_only=True)
    except Exception as error:
        raise KtrayError(
            f"{model_type} cannot process images of {size[0]}x{size[1]} px: {cause(error)}",
            "Choose another image_size or student.name.",
        ) from error
    finally:
        backbone.train(was_training)
    return [(int(m.shape[1]), int(m.shape[2]), int(m.shape[3])) for m in maps]


def _low_level(shapes: list[tuple[int, int, int]], size: tuple[int, int]) -> int:
    rows = [shape[1] for shape in shapes]
    if rows[0] == rows[-1]:
        # In a plain transformer all maps have the same size; those in the middle contain more spatial detail.
        return len(shapes) // 2 - 1 if len(shapes) > 1 else 0
    fine = [i for i, side in enumerate(rows) if size[0] <= _LOW_STRIDE * side and side >= _LOW_SIDE]
    return fine[-1] if fine else rows.index(max(rows))


def _decide(logits: torch.Tensor, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The class of each pixel and its probability, from one map of logits (C, h, w) that is resized to `size`."""
    best = torch.full(size, -torch.inf, device=logits.device)
    total = torch.full(size, -torch.inf, device=logits.device)
    mask = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for at in range(0, len(logits), _CLASSES_AT_ONCE):
        part = resize_map(logits[None, at : at + _CLASSES_AT_ONCE], size)[0]
        top, best_class = part.max(0)
        mask = torch.where(top > best, (best_class + at).to(torch.uint8), mask)
        best = torch.maximum(best, top)
        total = torch.logaddexp(total, part.logsumexp(0))
    return mask.cpu().numpy(), (best - total).exp().cpu().numpy()
