"""What a student predicts for the candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ktray.data.preprocess import Preprocess
from ktray.data.sources.fetch import fetch_images
from ktray.distributed.device_work import Item
from ktray.models.flops import forward_flops
from ktray.models.student.classifier import Student
from ktray.stages.base import Reporter, Runtime
from ktray.stages.curate.heldout import compute_images, finish_images
from ktray.storage.columns import Rows
from ktray.storage.store import Stage
from ktray.tasks.students import StudentInFolder

BATCH = 256


def student_probabilities(
    uris: list[str],
    source: StudentInFolder,
    preprocess: Preprocess,
    max_pixels: int,
    runtime: Runtime,
    folder: Stage,
    reporter: Reporter,
) -> dict[str, np.ndarray]:
    """By uri, the class probabilities (C,) float32 of the student; images that cannot be decoded are left out.

    Args:
        uris: at least one image.
        folder: where the shards are stored, so that a repeated attempt does not predict them again.
    """
    prepare = _Pixels(preprocess, max_pixels)
    rows = compute_images(runtime, folder, uris, prepare, _Classify(source, folder), reporter)
    return dict(zip(rows["uri"].astype(str).tolist(), rows["probabilities"], strict=True))


@dataclass(frozen=True)
class _Pixels:
    preprocess: Preprocess
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        uris, pixels = [], []
        for uri, image, _ in fetch_images(item["uris"], max_pixels=self.max_pixels):
            if image is not None:
                uris.append(uri)
                pixels.append(self.preprocess.eval_transform(image))
        empty = np.zeros((0, 3, *self.preprocess.size), np.uint8)
        return {"uri": np.array(uris, dtype=str), "pixels": np.stack(pixels) if pixels else empty}


@dataclass(frozen=True)
class _Classify:
    source: StudentInFolder
    folder: Stage

    reads: ClassVar[tuple[str, ...]] = ("pixels",)

    @property
    def model(self) -> StudentInFolder:
        return self.source

    @torch.inference_mode()
    def compute(self, model: Student, columns: Rows) -> Rows:
        pixels, place = columns["pixels"], next(model.parameters()).device
        parts = [np.zeros((0, len(model.classes)), np.float32)]
        for at in range(0, len(pixels), BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(pixels[at : at + BATCH])).to(place)
            parts.append(model.logits(batch).softmax(1).cpu().numpy())
        flops = forward_flops(model.model, (3, *model.preprocess.size)) * len(pixels)
        return {"probabilities": np.concatenate(parts), "flops": np.array([flops])}

    def finish(self, item: Item, columns: Rows, computed: Rows) -> dict[str, Any]:
        rows = {"uri": columns["uri"], "probabilities": computed["probabilities"]}
        return finish_images(self.folder, item, rows, float(computed["flops"][0]))
