"""INDEX: embed the gallery with the frozen teacher, shard by shard.

A way of pretraining that has no teacher draws its images at random, so that its index holds fingerprints alone. For
``supervised`` the gallery is the labelled generic set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ktray.data.decode import decode_rgb
from ktray.data.labelled import LabelledSet
from ktray.data.reading import fetch, read_shard
from ktray.data.sources import Shard, list_shards
from ktray.errors import BadImage
from ktray.models.preprocess import Preprocess
from ktray.retrieval.dedup import fingerprint
from ktray.stages.base import Context, Done, Reporter, finish_shard, finished_shards, resumed, run_stage
from ktray.stages.teachers import TeacherSpec, embed_numpy, tower_flops
from ktray.store import Stage
from ktray.streaming import Item, Rows, cpu_shards, map_shards, write_rows

VERSION = 2  # 2: captions
LABELLED_SHARD = 512


@dataclass(frozen=True)
class _Prepare:
    shards: list[Shard]
    preprocess: Preprocess | None
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        uris, captions, pixels, images, bad = [], [], [], [], []
        records = (
            ((r.uri, r.data, r.error, r.caption) for r in read_shard(self.shards[item["shard"]]))
            if "shard" in item
            else ((*found, None) for found in fetch(item["uris"]))
        )
        for uri, data, error, caption in records:
            try:
                if data is None:
                    raise BadImage(error or "cannot be read")
                image = decode_rgb(data, max_pixels=self.max_pixels)
            except BadImage as reason:
                bad.append((uri, reason.reason))
                continue
            uris.append(uri)
            captions.append(caption or "")
            images.append(image)
            if self.preprocess:
                pixels.append(self.preprocess.eval_transform(image))
        prints = fingerprint(images)
        found = {
            "uri": np.array(uris, dtype=str),
            "caption": np.array(captions, dtype=str),
            "hash": prints.hash,
            "digest": prints.digest,
            "bad": np.array(bad, dtype=str).reshape(-1, 2),
        }
        if self.preprocess:
            empty = np.zeros((0, 3, *self.preprocess.size), np.uint8)
            found["pixels"] = np.stack(pixels) if pixels else empty
        return found


@dataclass(frozen=True)
class _WriteFingerprints:
    stage: Stage
    prepare: _Prepare

    def __call__(self, item: Item) -> dict[str, Any]:
        columns = self.prepare(item)
        bad = columns.pop("bad").tolist()
        if "labels" in item:
            known = dict(zip(item["uris"], item["labels"], strict=True))
            columns["label"] = np.array([known[uri] for uri in columns["uri"].tolist()], dtype=np.int64)
        write_rows(self.stage, item["name"], columns)
        rows = len(columns["uri"])
        summary = {"name": item["name"], "rows": rows, "read": rows + len(bad), "bad": bad, "images": rows}
        return finish_shard(self.stage, item["name"], summary)


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


def run(context: Context, spec: TeacherSpec | None) -> Done:
    """Shards of ``uri``, ``caption`` (or empty), ``hash``, ``digest`` and, with a teacher, ``embedding`` (fp16, unit
    length) of the whole gallery."""
    data = context.recipe.gallery.data
    shards = list_shards(data if data is not None else [], column=context.recipe.gallery.column)
    items = [{"shard": i, "name": f"shard-{i:06d}.parquet"} for i in range(len(shards))]
    counts = [s.count for s in shards]
    total = sum(c or 0 for c in counts) if None not in counts else None
    return _index(context, spec, shards, items, total, [s.fingerprint for s in shards], {})


def run_labelled(context: Context, source: LabelledSet) -> Done:
    """The labelled generic set as a gallery: ``uri``, ``hash``, ``digest`` and ``label`` of all its images."""
    examples = [*source.train, *source.val, *source.test]
    items: list[Item] = []
    for i in range(0, len(examples), LABELLED_SHARD):
        part = examples[i : i + LABELLED_SHARD]
        name = f"shard-{i // LABELLED_SHARD:06d}.parquet"
        items.append({"name": name, "uris": [e.uri for e in part], "labels": [e.label for e in part]})
    return _index(context, None, [], items, len(examples), source.fingerprint, {"classes": source.classes})


def _index(
    context: Context,
    spec: TeacherSpec | None,
    shards: list[Shard],
    items: list[Item],
    total: int | None,
    fingerprint: Any,
    facts: dict[str, Any],
) -> Done:
    prepare = _Prepare(shards, spec.preprocess if spec else None, context.recipe.data.max_pixels)

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        finished = finished_shards(stage)
        reporter.expect(total)
        before = reporter.shards(resumed(s) for s in finished.values())
        todo = [item for item in items if item["name"] not in finished]
        summaries = (
            map_shards(todo, prepare, MakeEmbedder(stage, spec), context.plan)
            if spec
            else cpu_shards(todo, _WriteFingerprints(stage, prepare), context.plan)
        )
        made = reporter.shards(summaries)
        rows = {s["name"]: s["rows"] for s in [*before, *made]}
        return {"rows": sum(rows.values()), "shards": [[name, rows[name]] for name in sorted(rows)], **facts}

    parts = [VERSION, fingerprint, spec.fingerprint if spec else None, context.recipe.data.max_pixels]
    return run_stage(context, "index", parts, work)
