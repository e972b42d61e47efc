"""INDEX: embed the gallery with the frozen teacher, shard by shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ktray.data.decode import decode_rgb
from ktray.data.reading import read_shard
from ktray.data.sources import Shard, list_shards
from ktray.errors import BadImage
from ktray.models.preprocess import Preprocess
from ktray.retrieval.dedup import fingerprint
from ktray.stages.base import Context, Done, Reporter, finish_shard, finished_shards, resumed, run_stage
from ktray.stages.teachers import TeacherSpec, embed_numpy, tower_flops
from ktray.store import Stage
from ktray.streaming import Item, Rows, map_shards, write_rows

VERSION = 1


@dataclass(frozen=True)
class _Prepare:
    shards: list[Shard]
    preprocess: Preprocess
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        uris, pixels, images, bad = [], [], [], []
        for record in read_shard(self.shards[item["shard"]]):
            try:
                if record.data is None:
                    raise BadImage(record.error or "cannot be read")
                image = decode_rgb(record.data, max_pixels=self.max_pixels)
            except BadImage as reason:
                bad.append((record.uri, reason.reason))
                continue
            uris.append(record.uri)
            pixels.append(self.preprocess.eval_transform(image))
            images.append(image)
        prints = fingerprint(images)
        return {
            "uri": np.array(uris, dtype=str),
            "hash": prints.hash,
            "digest": prints.digest,
            "pixels": np.stack(pixels) if pixels else np.zeros((0, 3, *self.preprocess.size), np.uint8),
            "bad": np.array(bad, dtype=str).reshape(-1, 2),
        }


class Embedder:
    """The device half: pixels to unit-length fp16 embeddings. Also used for queries and held-out images."""

    def __init__(self, stage: Stage, spec: TeacherSpec, batch: int) -> None:
        self.stage, self.batch = stage, batch
        self.model = spec.tower()
        self.flops = tower_flops(self.model)

    def __call__(self, item: Item, columns: Rows) -> dict[str, Any]:
        pixels = columns["pixels"]
        embedding = embed_numpy(self.model, pixels, self.batch)
        norms = np.linalg.norm(embedding, axis=1, keepdims=True)
        unit = (embedding / np.maximum(norms, 1e-12)).astype(np.float16)
        kept = {k: v for k, v in columns.items() if k not in ("pixels", "bad")}
        write_rows(self.stage, item["name"], {**kept, "embedding": unit})
        bad = columns["bad"].tolist() if "bad" in columns else []
        return finish_shard(
            self.stage,
            item["name"],
            {
                "name": item["name"],
                "rows": len(unit),
                "read": len(unit) + len(bad),
                "bad": bad,
                "images": len(unit),
                "flops": self.flops * len(unit),
            },
        )


@dataclass(frozen=True)
class MakeEmbedder:
    """Makes the actor's `Embedder` where it runs."""

    stage: Stage
    spec: TeacherSpec
    batch: int = 256

    def __call__(self) -> Embedder:
        return Embedder(self.stage, self.spec, self.batch)


def run(context: Context, spec: TeacherSpec) -> Done:
    """Shards of ``uri``, ``hash``, ``digest`` and ``embedding`` (fp16, unit length) of the whole gallery."""
    data = context.recipe.gallery.data
    shards = list_shards(data if data is not None else [], column=context.recipe.gallery.column)

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        items = [{"shard": i, "name": f"shard-{i:06d}.parquet"} for i in range(len(shards))]
        finished = finished_shards(stage)
        counts = [s.count for s in shards]
        reporter.expect(sum(c or 0 for c in counts) if None not in counts else None)
        before = reporter.shards(resumed(s) for s in finished.values())
        prepare = _Prepare(shards, spec.preprocess, context.recipe.data.max_pixels)
        todo = [item for item in items if item["name"] not in finished]
        made = reporter.shards(map_shards(todo, prepare, MakeEmbedder(stage, spec), context.plan))
        rows = {s["name"]: s["rows"] for s in [*before, *made]}
        return {"rows": sum(rows.values()), "shards": [[name, rows[name]] for name in sorted(rows)]}

    parts = [VERSION, [s.fingerprint for s in shards], spec.fingerprint, context.recipe.data.max_pixels]
    return run_stage(context, "index", parts, work)
