"""EVALUATE for segmentation: pixels by image and class that each model gets right, claims wrongly and misses.

Logits are resized to the mask's own size, whatever size a model works at, as is usual for ADE20K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ktray.data.labelled.masks import IGNORE
from ktray.data.preprocess import Preprocess
from ktray.distributed.ray_data import Item
from ktray.models.flops import forward_flops
from ktray.models.maps import resize_map
from ktray.models.teacher.spec import AdaptedSpec, device, predict_numpy, tower_flops
from ktray.stages.base import finish_shard
from ktray.stages.labels import Masks, read_examples
from ktray.stages.shard_summary import ShardSummary
from ktray.storage.columns import Rows, write_rows
from ktray.storage.store import Stage
from ktray.tasks.segmentation import pixel_counts
from ktray.training.inputs import StudentSpec

COUNTS = ("tp", "fp", "fn")
BATCH = 32


@dataclass(frozen=True)
class PrepareMasks:
    """Each image in the geometry of every model, and its mask at full size (flat, as sizes differ)."""

    transforms: dict[str, Preprocess]
    max_pixels: int
    masks: Masks

    def __call__(self, item: Item) -> Rows:
        uris: list[str] = []
        pixels: dict[str, list[np.ndarray]] = {name: [] for name in self.transforms}
        flat, shapes, bad = [], [], []
        for uri, _, image, mask, reason in read_examples(
            [tuple(e) for e in item["examples"]], self.max_pixels, self.masks
        ):
            if image is None or mask is None:
                bad.append((uri, reason))
                continue
            uris.append(uri)
            for name, transform in self.transforms.items():
                pixels[name].append(transform.eval_transform(image))
            flat.append(mask.ravel())
            shapes.append(mask.shape)
        found = {
            "uri": np.array(uris, dtype=str),
            "mask": np.concatenate(flat) if flat else np.zeros(0, np.uint8),
            "shape": np.array(shapes, dtype=np.int64).reshape(-1, 2),
            "bad": np.array(bad, dtype=str).reshape(-1, 2),
        }
        for name, transform in self.transforms.items():
            found[name] = np.stack(pixels[name]) if pixels[name] else np.zeros((0, 3, *transform.size), np.uint8)
        return found


class Score:
    """Counts of every model; those of the student also as a confusion matrix of pixels."""

    def __init__(self, plan: MakeScore) -> None:
        from ktray.training.worker import WorkerContext

        env = WorkerContext(device(), 0, 1, 1.0)
        self.plan = plan
        self.students = {name: spec.build(env, 0) for name, spec in plan.students.items()}
        self.teacher = plan.teacher.load() if plan.teacher else None
        self.flops = sum(forward_flops(m, (3, *p.size)) for m, p in self.students.values())
        if self.teacher:
            self.flops += tower_flops(self.teacher)

    @torch.inference_mode()
    def __call__(self, item: Item, columns: Rows) -> dict[str, Any]:
        classes, shapes = self.plan.num_classes, columns["shape"]
        ends = np.cumsum(shapes.prod(1)).tolist()
        masks = [
            columns["mask"][end - h * w : end].reshape(h, w) for end, (h, w) in zip(ends, shapes.tolist(), strict=True)
        ]
        out: Rows = {"uri": columns["uri"]}
        confusion = np.zeros(classes * classes, np.int64)
        for name in [*self.students, *(["teacher"] if self.teacher else [])]:
            logits = self._logits(name, columns)
            rows: list[Sequence[np.ndarray]] = []
            for one, mask in zip(logits, masks, strict=True):
                where = torch.from_numpy(one).to(device())[None]
                found = resize_map(where, (mask.shape[0], mask.shape[1]))[0].argmax(0).cpu().numpy()
                rows.append([counts[0] for counts in pixel_counts(found[None], mask[None], classes)])
                if name == "student":
                    seen = mask != IGNORE
                    pairs = mask[seen].astype(np.int64) * classes + found[seen]
                    confusion += np.bincount(pairs, minlength=classes * classes)
            for i, what in enumerate(COUNTS):
                counted = [row[i] for row in rows]
                out[f"{name}_{what}"] = np.stack(counted) if counted else np.zeros((0, classes), np.int64)
        write_rows(self.plan.stage, item["name"], out)
        n = len(out["uri"])
        self.plan.stage.write_json(f"{item['name']}.confusion", confusion.tolist())
        bad = pairs(columns["bad"].tolist())
        summary = ShardSummary(item["name"], n, len(item["examples"]), bad, images=n, flops=self.flops * n)
        return finish_shard(self.plan.stage, summary)

    def _logits(self, name: str, columns: Rows) -> np.ndarray:
        """(N, C, h, w) float32."""
        if name == "teacher" and self.teacher is not None:
            return predict_numpy(self.teacher, columns["teacher"], BATCH)
        model, preprocess = self.students[name]
        model.eval()
        pixels = columns["student"]
        parts = []
        for at in range(0, len(pixels), BATCH):
            x = torch.from_numpy(pixels[at : at + BATCH].copy()).to(device())
            parts.append(model(preprocess.normalise(x)).float().cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, self.plan.num_classes, 1, 1), np.float32)


@dataclass(frozen=True)
class MakeScore:
    """Makes the actor's `Score` where it runs."""

    stage: Stage
    students: dict[str, StudentSpec]
    teacher: AdaptedSpec | None
    num_classes: int

    def __call__(self) -> Score:
        return Score(self)


def confusion(stage: Stage, num_classes: int) -> np.ndarray:
    """(C, C) test pixels of the student: rows are true classes, columns predictions."""
    total = np.zeros((num_classes, num_classes), np.int64)
    for name in stage.names(".confusion"):
        total += np.array(stage.read_json(name), dtype=np.int64).reshape(num_classes, num_classes)
    return total
