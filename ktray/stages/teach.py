"""TEACH: the adapted teacher's task predictions for K replayable views of every image of the transfer set.

The view's pixels are stored beside the prediction, at the student's size: teacher and student see the same
view, and training never decodes an original again. Cached outputs are never transformed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ktray.data.decode import decode_rgb
from ktray.data.reading import fetch
from ktray.data.views import VIEW_LENGTH, ViewPolicy, make_view, render
from ktray.errors import BadImage, KtrayError
from ktray.objectives import build_objective
from ktray.stages.base import Context, Done, Reporter, finish_shard, finished_shards, resumed, run_stage
from ktray.stages.teachers import AdaptedSpec, embed_numpy, logits_numpy, resize_numpy, tower_flops
from ktray.store import Stage
from ktray.streaming import Item, Rows, map_shards, read_rows, write_rows
from ktray.training.jobs import Cache

VERSION = 1
SHARD_BYTES = 64_000_000
Targets = tuple[str, ...]


@dataclass(frozen=True)
class _Prepare:
    policy: ViewPolicy
    views: int
    seed: int
    size: int
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        uris: list[str] = []
        indices: list[int] = []
        records, pixels, bad = [], [], []
        for uri, data, error in fetch(item["uris"]):
            try:
                if data is None:
                    raise BadImage(error or "cannot be read")
                image = decode_rgb(data, max_pixels=self.max_pixels)
            except BadImage as reason:
                bad.append((uri, reason.reason))
                continue
            for index in range(self.views):
                view = make_view(self.policy, uri, index, self.seed, *image.shape[:2])
                uris.append(uri)
                indices.append(index)
                records.append(np.array(view, dtype=np.int32))
                pixels.append(render(image, view, self.size).transpose(2, 0, 1))
        return {
            "uri": np.array(uris, dtype=str),
            "view_index": np.array(indices, dtype=np.int32),
            "view": np.stack(records) if records else np.zeros((0, VIEW_LENGTH), np.int32),
            "pixels": np.stack(pixels) if pixels else np.zeros((0, 3, self.size, self.size), np.uint8),
            "bad": np.array(bad, dtype=str).reshape(-1, 2),
        }


class _Predict:
    def __init__(self, stage: Stage, spec: AdaptedSpec, student_size: int, targets: Targets, batch: int) -> None:
        self.stage, self.size, self.targets, self.batch = stage, student_size, targets, batch
        self.model = spec.load()
        self.flops = tower_flops(self.model)

    def __call__(self, item: Item, columns: Rows) -> dict[str, Any]:
        pixels = columns["pixels"]
        embedding = embed_numpy(self.model, pixels, self.batch)
        found = {"pixels": resize_numpy(pixels, self.size, self.batch)}
        if "embedding" in self.targets:
            found["embedding"] = embedding.astype(np.float16)
        if "logits" in self.targets:
            found["logits"] = logits_numpy(self.model, embedding).astype(np.float16)
        kept = {k: v for k, v in columns.items() if k not in ("pixels", "bad")}
        write_rows(self.stage, item["name"], {**kept, **found})
        return finish_shard(
            self.stage,
            item["name"],
            {
                "name": item["name"],
                "rows": len(pixels),
                "read": len(item["uris"]),
                "bad": columns["bad"].tolist(),
                "images": len(pixels),
                "flops": self.flops * len(pixels),
            },
        )


@dataclass(frozen=True)
class _MakePredict:
    stage: Stage
    spec: AdaptedSpec
    student_size: int
    targets: Targets
    batch: int = 256

    def __call__(self) -> _Predict:
        return _Predict(self.stage, self.spec, self.student_size, self.targets, self.batch)


def run(context: Context, curate: Done, adapt: Done, spec: AdaptedSpec) -> Done:
    """Shards of ``uri``, ``view_index``, ``view``, ``pixels`` and what the objective needs of the teacher:
    ``logits`` (fp16, calibrated), ``embedding`` (fp16, not normalised)."""
    recipe, part = context.recipe, context.recipe.teach
    student_size = int(recipe.image_size or 0)
    view_size = max(student_size, *spec.preprocess.size)
    policy = view_policy(context)

    targets: Targets = tuple(sorted(build_objective(recipe.objective).targets_needed))
    widths = {"logits": len(context.task.classes), "embedding": int(adapt.manifest.get("embed_dim", 0))}

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        uris = read_rows(curate.stage, "transfer.parquet", ["uri"])["uri"].tolist()
        per_shard = int(max(1, min(512, SHARD_BYTES // (part.views * 3 * view_size**2), -(-len(uris) // 8))))
        items = [
            {"name": f"shard-{i // per_shard:06d}.parquet", "uris": uris[i : i + per_shard]}
            for i in range(0, len(uris), per_shard)
        ]
        reporter.expect(len(uris))
        finished = finished_shards(stage)
        before = reporter.shards(resumed(s) for s in finished.values())
        prepare = _Prepare(policy, part.views, part.seed, view_size, recipe.data.max_pixels)
        todo = [item for item in items if item["name"] not in finished]
        finish = _MakePredict(stage, spec, student_size, targets)
        made = reporter.shards(map_shards(todo, prepare, finish, context.plan))
        rows = {s["name"]: s["rows"] for s in [*before, *made]}
        if not sum(rows.values()):
            raise KtrayError("No image of the transfer set can be used", "Check the quarantine list and gallery.data.")
        return {
            "rows": sum(rows.values()),
            "row_bytes": 3 * student_size**2 + 2 * sum(widths[t] for t in targets),
            "targets": list(targets),
            "embed_dim": widths["embedding"],
            "view_size": view_size,
            "shards": [[name, rows[name]] for name in sorted(rows)],
        }

    parts = [VERSION, curate.key, adapt.key, part.model_dump(), targets, student_size, recipe.data.max_pixels]
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
    shards = tuple((str(name), int(rows)) for name, rows in done.manifest["shards"] if rows)
    m = done.manifest
    return Cache(done.stage, shards, int(m["row_bytes"]), tuple(m["targets"]), int(m["embed_dim"]))
