"""TEACH: K replayable views of every image of the transfer set, and what the objective needs with each.

With a teacher that is its predictions or its embeddings of the very view that the student will see; a caption or a
generic label goes along as it is. The view's pixels are stored too, at the student's size, so that training never
decodes an original again. Cached outputs are never transformed. An objective that cuts its own views gets one whole
image in place of K views.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ktray.data.captions import tokenise
from ktray.data.reading import decode_image, fetch
from ktray.data.views import VIEW_LENGTH, View, ViewPolicy, make_view, render
from ktray.errors import BadImage, KtrayError
from ktray.models.adapted import AdaptedTeacher
from ktray.models.dense_teacher import DenseTeacher
from ktray.models.preprocess import Preprocess
from ktray.models.teacher import patch_embeddings
from ktray.objectives import build_objective
from ktray.stages.base import Context, Done, Reporter, finish_shard, finished_shards, resumed, run_stage
from ktray.stages.labels import canvas_preprocess
from ktray.stages.teachers import (
    AdaptedSpec,
    device,
    embed_numpy,
    logits_numpy,
    predict_numpy,
    resize_numpy,
    tower_flops,
)
from ktray.store import Stage
from ktray.streaming import Item, Rows, cpu_shards, map_shards, read_rows, write_rows
from ktray.training.inputs import Cache

VERSION = 2  # 2: view ids, captions, labels, patch embeddings, whole images
SHARD_BYTES = 64_000_000
Targets = tuple[str, ...]


@dataclass(frozen=True)
class _Prepare:
    """Decode and cut views of ``size`` pixels; with ``canvas`` whole images in its geometry."""

    policy: ViewPolicy
    views: int
    seed: int
    size: int
    max_pixels: int
    canvas: Preprocess | None

    def __call__(self, item: Item) -> Rows:
        uris: list[str] = []
        indices: list[int] = []
        records, pixels, bad, beside = [], [], [], []
        for number, (uri, data, error) in enumerate(fetch(item["uris"])):
            try:
                image = decode_image(uri, data, error, max_pixels=self.max_pixels)
            except BadImage as reason:
                bad.append((uri, reason.reason))
                continue
            for index in range(1 if self.canvas else self.views):
                if self.canvas:
                    view = View(0, 0, image.shape[1], image.shape[0])
                    pixels.append(self.canvas.eval_transform(image))
                else:
                    view = make_view(self.policy, uri, index, self.seed, *image.shape[:2])
                    pixels.append(render(image, view, self.size).transpose(2, 0, 1))
                uris.append(uri)
                indices.append(index)
                beside.append(number)
                records.append(np.array(view, dtype=np.int32))
        height, width = self.canvas.size if self.canvas else (self.size, self.size)
        found = {
            "uri": np.array(uris, dtype=str),
            "view_index": np.array(indices, dtype=np.int32),
            "view_id": np.array([_view_id(*pair) for pair in zip(uris, indices, strict=True)], dtype=np.int64),
            "view": np.stack(records) if records else np.zeros((0, VIEW_LENGTH), np.int32),
            "pixels": np.stack(pixels) if pixels else np.zeros((0, 3, height, width), np.uint8),
            "bad": np.array(bad, dtype=str).reshape(-1, 2),
        }
        for name, values in item["beside"].items():
            column = np.array(values, dtype=np.int64).reshape(len(values), -1)[np.array(beside, dtype=np.int64)]
            found[name] = column.astype(np.int32) if name == "text" else column[:, 0]
        return found


def _view_id(uri: str, index: int) -> int:
    digest = hashlib.blake2b(f"{index}\0{uri}".encode("utf-8", "surrogatepass"), digest_size=8, person=b"ktray.id")
    return int.from_bytes(digest.digest(), "little", signed=True)


def _write(stage: Stage, item: Item, columns: Rows, flops: float) -> dict[str, Any]:
    bad = columns.pop("bad").tolist()
    write_rows(stage, item["name"], columns)
    rows = len(columns["pixels"])
    summary = {"name": item["name"], "rows": rows, "read": len(item["uris"]), "bad": bad, "images": rows}
    return finish_shard(stage, item["name"], {**summary, "flops": flops * rows})


@dataclass(frozen=True)
class _WithoutTeacher:
    stage: Stage
    prepare: _Prepare

    def __call__(self, item: Item) -> dict[str, Any]:
        return _write(self.stage, item, self.prepare(item), 0.0)


class _Predict:
    def __init__(self, plan: _MakePredict) -> None:
        self.plan = plan
        self.model = plan.spec.load()
        self.flops = tower_flops(self.model)

    def __call__(self, item: Item, columns: Rows) -> dict[str, Any]:
        plan, pixels = self.plan, columns["pixels"]
        found = {**columns, "pixels": resize_numpy(pixels, plan.student_size, plan.batch)}
        if "patch_embedding" in plan.targets:
            found["patch_embedding"] = _patches(self.model, pixels, plan.patch_side, plan.batch)
        if "logits" in plan.targets and isinstance(self.model, DenseTeacher):
            found["logits"] = predict_numpy(self.model, pixels, plan.batch).astype(np.float16)
        elif "logits" in plan.targets or "embedding" in plan.targets:
            embedding = embed_numpy(self.model, pixels, plan.batch)
            if "embedding" in plan.targets:
                found["embedding"] = embedding.astype(np.float16)
            if "logits" in plan.targets and isinstance(self.model, AdaptedTeacher):
                found["logits"] = logits_numpy(self.model, embedding).astype(np.float16)
        return _write(plan.stage, item, found, self.flops)


@torch.inference_mode()
def _patches(model: Any, pixels: np.ndarray, side: int, batch: int) -> np.ndarray:
    """(N, D, side, side) fp16 patch embeddings, averaged or interpolated to the student's grid."""
    parts = []
    for at in range(0, len(pixels), batch):
        views = torch.from_numpy(np.ascontiguousarray(pixels[at : at + batch])).to(device())
        maps = patch_embeddings(model.image_tower, model.preprocess, model.source, views)
        fitted = (
            F.adaptive_avg_pool2d(maps, side)
            if min(maps.shape[2:]) >= side
            else F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
        )
        parts.append(fitted.half().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, model.patch_dim, side, side), np.float16)


@dataclass(frozen=True)
class _MakePredict:
    stage: Stage
    spec: AdaptedSpec
    student_size: int
    patch_side: int
    targets: Targets
    batch: int = 256

    def __call__(self) -> _Predict:
        return _Predict(self)


def run(
    context: Context, curate: Done, adapt: Done | None, spec: AdaptedSpec | None, student: Preprocess, map_side: int
) -> Done:
    """Shards of ``uri``, ``view_index``, ``view_id``, ``view``, ``pixels`` and what the objective needs: ``logits``
    (fp16, calibrated; maps for segmentation), ``embedding``, ``patch_embedding`` (fp16, not normalised), ``text``
    (int32), ``label`` (int64).

    Args:
        adapt, spec: the adapted teacher; None where the objective needs none.
        student: the student's preprocessing.
        map_side: side of its last map, to which patch embeddings are fitted.
    """
    recipe, part = context.recipe, context.recipe.teach
    objective = build_objective(recipe.objective)
    targets: Targets = tuple(sorted(objective.targets_needed))
    student_size = int(recipe.image_size or 0)
    view_size = max(student_size, *spec.preprocess.size) if spec else student_size
    canvas = canvas_preprocess(student, context.canvas) if objective.views == "canvas" else None
    prepare = _Prepare(view_policy(context), part.views, part.seed, view_size, recipe.data.max_pixels, canvas)
    patches, predicts = "patch_embedding" in targets, "logits" in targets
    facts = adapt.manifest if adapt else {}

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        wanted = [column for name, column in (("text", "caption"), ("label", "label")) if name in targets]
        table = read_rows(curate.stage, "transfer.parquet", ["uri", *wanted])
        uris = table["uri"].tolist()
        tokens, vocabulary = tokenise(table["caption"].tolist()) if "text" in targets else (None, 0)
        beside = {"text": tokens, "label": table.get("label")}
        per_shard = int(max(1, min(512, SHARD_BYTES // (part.views * 3 * view_size**2), -(-len(uris) // 8))))
        items = []
        for i in range(0, len(uris), per_shard):
            span = slice(i, i + per_shard)
            along = {name: values[span].tolist() for name, values in beside.items() if values is not None}
            items.append({"name": f"shard-{i // per_shard:06d}.parquet", "uris": uris[span], "beside": along})
        reporter.expect(len(uris))
        finished = finished_shards(stage)
        before = reporter.shards(resumed(s) for s in finished.values())
        todo = [item for item in items if item["name"] not in finished]
        summaries = (
            map_shards(todo, prepare, _MakePredict(stage, spec, student_size, map_side, targets), context.plan)
            if spec
            else cpu_shards(todo, _WithoutTeacher(stage, prepare), context.plan)
        )
        made = reporter.shards(summaries)
        rows = {s["name"]: s["rows"] for s in [*before, *made]}
        if not sum(rows.values()):
            raise KtrayError("No image of the transfer set can be used", "Check the quarantine list and gallery.data.")
        known = {
            "embed_dim": int(facts.get("embed_dim", 0)) if "embedding" in targets else 0,
            "patch_dim": int(facts.get("patch_dim") or 0) if patches else 0,
            "vocabulary": vocabulary,
            "text_length": tokens.shape[1] if tokens is not None else 0,
            "source_classes": int(table["label"].max()) + 1 if "label" in targets else 0,
        }
        shape = next(read_rows(stage, n, ["logits"])["logits"].shape for n in rows if rows[n]) if predicts else (0, 0)
        logits = math.prod(shape[1:])
        halves = logits + known["embed_dim"] + known["patch_dim"] * map_side**2 + 2 * known["text_length"]
        side = canvas.size[0] if canvas else student_size
        return {
            "rows": sum(rows.values()),
            "row_bytes": 3 * side**2 + 2 * halves + 16,
            "targets": list(targets),
            "view_size": view_size,
            "shards": [[name, rows[name]] for name in sorted(rows)],
            **known,
        }

    parts = [
        VERSION,
        curate.key,
        adapt.key if adapt else None,
        part.model_dump(),
        targets,
        student_size,
        recipe.data.max_pixels,
        map_side if patches else None,
        canvas.to_dict() if canvas else None,
    ]
    return run_stage(context, "teach", parts, work)


def view_policy(context: Context) -> ViewPolicy:
    """The views of training, from the recipe."""
    part = context.recipe.teach
    return ViewPolicy(
        scale=(part.crop_min, 1.0),
        hflip=part.hflip,
        brightness=part.jitter,
        contrast=part.jitter,
        saturation=part.jitter,
    )


def cache(done: Done) -> Cache:
    """What training needs to know of a whole TEACH directory."""
    m = done.manifest
    return Cache(
        done.stage,
        tuple((str(name), int(rows)) for name, rows in m["shards"] if rows),
        int(m["row_bytes"]),
        tuple(m["targets"]),
        **{k: int(m[k]) for k in ("embed_dim", "patch_dim", "vocabulary", "text_length", "source_classes")},
    )
