"""CURATE: choose the transfer set, keep held-out images out of it, and show it.

``retrieved``: each labelled image is a query and brings an equal share of its nearest gallery images.
``generic``: a random draw of the gallery. ``target``: the task's own images without labels (the surplus of the
label budget, and the labelled ones). Gallery images that copy a validation or test image are dropped. What came with
an image and the objective needs (its caption, its generic label) goes along.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktray.data.decode import decode_rgb
from ktray.data.reading import fetch
from ktray.errors import BadImage, KtrayError
from ktray.models.preprocess import Preprocess
from ktray.objectives import build_objective
from ktray.retrieval.coverage import coverage, lines
from ktray.retrieval.dedup import (
    Fingerprints,
    fingerprint_heldout,
    hash_duplicates,
    near_duplicates,
)
from ktray.retrieval.select import Selection, random_selection
from ktray.retrieval.sheet import SheetRow, contact_sheet
from ktray.stages import adapt as adapt_stage
from ktray.stages.base import Context, Done, Reporter, finish_shard, finished_shards, resumed, run_stage
from ktray.stages.gallery import NEEDS_PREDICTIONS, Gallery, retrieve
from ktray.stages.index import MakeEmbedder
from ktray.stages.labels import SHARD
from ktray.stages.teachers import TeacherSpec
from ktray.store import Stage
from ktray.streaming import Item, Rows, cpu_shards, map_shards, read_rows, write_rows

VERSION = 3  # 2: captions, labels; 3: strategies, coverage
SHEET_ROWS = 12
SHEET_COLUMNS = 12


def run(context: Context, spec: TeacherSpec | None, adapt: Done | None, index: Done | None) -> Done:
    """``transfer.parquet`` (uri, query, rank, similarity, perhaps caption or label), ``dropped.parquet``,
    ``contact_sheet.png``.

    Args:
        spec: the index's encoder; None where it holds fingerprints alone.
        adapt: gives the queries of ``retrieved``.
        index: None for ``target``.
    """
    part = context.recipe.transfer
    needs = build_objective(context.recipe.objective).targets_needed
    beside = [name for column, name in (("text", "caption"), ("label", "label")) if column in needs]

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        if index is None:
            return _target(context, stage)
        gallery = Gallery(index)
        heldout = _heldout(context, stage, spec, reporter)
        prints = Fingerprints(heldout["hash"], heldout["digest"])
        if spec:
            duplicates = near_duplicates(
                gallery.blocks(), heldout["embedding"].astype(np.float32), prints, similarity=part.dedup_similarity
            )
            reporter.meter.add(flops=2 * gallery.total * heldout["embedding"].size)
        else:
            duplicates = hash_duplicates(gallery.prints(), prints)
        total, size, exclude = gallery.total, int(part.size or 1), duplicates.gallery
        if "caption" in beside:
            silent = np.flatnonzero(np.concatenate(gallery.columns("caption")) == "")
            exclude = np.union1d(exclude, silent)
            if len(silent) == total:
                raise KtrayError(
                    "No gallery image has a caption, and objective.name=clip learns from captions",
                    "Name a gallery with captions (.txt beside the images of a tar), or another objective.",
                )
        query_uris: list[str] = []
        query_labels = np.zeros(0, np.int64)
        if part.source == "retrieved" and adapt is not None:
            queries, query_uris, query_labels = adapt_stage.train_embeddings(adapt)
            predict = None
            if part.strategy in NEEDS_PREDICTIONS:
                predict = adapt_stage.frozen_predictions(adapt)

            def spent(flops: float) -> None:
                reporter.meter.add(flops=flops)

            chosen = retrieve(part.strategy, queries, gallery, size, exclude, predict, spent)
        else:
            chosen = random_selection(total, size, part.seed, exclude=exclude)
        if chosen.missing:
            context.say(
                f"curate    the gallery offers {len(chosen.gallery)} images, {chosen.missing} short of transfer.size"
            )
        uris = gallery.take("uri", chosen.gallery)
        origin = [query_uris[q] if q >= 0 else "" for q in chosen.query.tolist()]
        write_rows(
            stage,
            "transfer.parquet",
            {
                "uri": np.array(uris, dtype=str),
                "query": np.array(origin, dtype=str),
                "rank": chosen.rank,
                "similarity": chosen.similarity,
                **{name: np.array(gallery.take(name, chosen.gallery)) for name in beside},
            },
        )
        write_rows(
            stage,
            "dropped.parquet",
            {
                "uri": np.array(gallery.take("uri", duplicates.gallery), dtype=str),
                "heldout": np.array([str(heldout["uri"][i]) for i in duplicates.heldout], dtype=str),
                "similarity": duplicates.similarity,
                "reason": np.array(duplicates.reason, dtype=str),
            },
        )
        dropped = duplicates.counts()
        covered = None
        if query_uris and len(chosen):
            classes = [] if context.recipe.task.kind == "segmentation" else context.task.classes
            covered = coverage(chosen, query_labels, classes)
            for line in lines(covered):
                context.say(f"curate    {line}")
        _sheet(context, stage, chosen, uris, query_uris, query_labels, sum(dropped.values()))
        return {
            "kept": len(uris),
            "dropped": dropped,
            "gallery": total,
            "similar_kept": duplicates.similar,
            "coverage": covered,
        }

    parts = [
        VERSION,
        part.model_dump(),
        beside,
        index.key if index else None,
        adapt.manifest["key"] if part.source == "retrieved" and adapt else None,
        context.fingerprint,
        spec.fingerprint if index and spec else None,
    ]
    return run_stage(context, "curate", parts, work)


def _target(context: Context, stage: Stage) -> dict[str, Any]:
    uris = [e.uri for e in context.task.train] + list(context.task.unlabeled)
    size = context.recipe.transfer.size
    if size is not None and size < len(uris):
        order = np.random.default_rng(context.recipe.transfer.seed).permutation(len(uris))[:size]
        uris = [uris[i] for i in sorted(order.tolist())]
    n = len(uris)
    write_rows(
        stage,
        "transfer.parquet",
        {
            "uri": np.array(uris, dtype=str),
            "query": np.array([""] * n, dtype=str),
            "rank": np.full(n, -1, dtype=np.int64),
            "similarity": np.full(n, np.nan, dtype=np.float32),
        },
    )
    return {"kept": n, "dropped": {}, "gallery": n, "similar_kept": 0}


class _PrepareHeldout:
    def __init__(self, preprocess: Preprocess | None, max_pixels: int) -> None:
        self.preprocess, self.max_pixels = preprocess, max_pixels

    def __call__(self, item: Item) -> Rows:
        uris, images = [], []
        for uri, data, _ in fetch(item["uris"]):
            # A held-out image that cannot be decoded cannot leak; EVALUATE quarantines it.
            try:
                images.append(decode_rgb(data or b"", max_pixels=self.max_pixels))
                uris.append(uri)
            except BadImage:
                continue
        prints = fingerprint_heldout(images)
        found = {"uri": np.array(uris, dtype=str), "hash": prints.hash, "digest": prints.digest}
        if self.preprocess:
            pixels = [self.preprocess.eval_transform(i) for i in images]
            found["pixels"] = np.stack(pixels) if pixels else np.zeros((0, 3, *self.preprocess.size), np.uint8)
        return found


@dataclass(frozen=True)
class _WriteHeldout:
    folder: Stage
    prepare: _PrepareHeldout

    def __call__(self, item: Item) -> dict[str, Any]:
        columns = self.prepare(item)
        write_rows(self.folder, item["name"], columns)
        rows = len(columns["uri"])
        return finish_shard(self.folder, item["name"], {"name": item["name"], "rows": rows, "read": rows})


def _heldout(context: Context, stage: Stage, spec: TeacherSpec | None, reporter: Reporter) -> Rows:
    """Embeddings and fingerprints of validation and test images; nothing else of them is looked at."""
    uris = [e.uri for e in [*context.task.val, *context.task.test]]
    folder = Stage(stage.file("heldout"))
    items = [
        {"name": f"heldout-{i // SHARD:05d}.parquet", "uris": uris[i : i + SHARD]} for i in range(0, len(uris), SHARD)
    ]
    finished = finished_shards(folder)
    reporter.expect(len(uris))
    reporter.shards({**resumed(s), "bad": []} for s in finished.values())
    prepare = _PrepareHeldout(spec.preprocess if spec else None, context.recipe.data.max_pixels)
    todo = [i for i in items if i["name"] not in finished]
    reporter.shards(
        map_shards(todo, prepare, MakeEmbedder(folder, spec), context.plan)
        if spec
        else cpu_shards(todo, _WriteHeldout(folder, prepare), context.plan)
    )
    reporter.read = 0  # counted where they are used
    shards = [read_rows(folder, str(item["name"])) for item in items]
    return {name: np.concatenate([s[name] for s in shards]) for name in shards[0]}


def _sheet(
    context: Context,
    stage: Stage,
    chosen: Selection,
    uris: list[str],
    query_uris: list[str],
    query_labels: np.ndarray,
    dropped: int,
) -> None:
    """Queries spread over the classes on the left, what they brought on the right."""
    rng = np.random.default_rng(0)
    by_query: dict[int, list[int]] = {}
    for i, q in enumerate(chosen.query.tolist()):
        by_query.setdefault(q, []).append(i)
    if chosen.query.size and chosen.query[0] < 0:  # no queries: rows of a random draw
        picks = rng.permutation(len(uris))[: SHEET_ROWS * SHEET_COLUMNS].tolist()
        groups = [(None, "random", picks[i : i + SHEET_COLUMNS]) for i in range(0, len(picks), SHEET_COLUMNS)]
    else:
        order = rng.permutation(sorted(by_query)).tolist()
        seen: set[int] = set()
        first = [q for q in order if not (int(query_labels[q]) in seen or seen.add(int(query_labels[q])))]  # type: ignore[func-returns-value]
        rows = (first + [q for q in order if q not in first])[:SHEET_ROWS]
        groups = [
            (query_uris[q], _caption(context, query_uris[q], int(query_labels[q])), by_query[q][:SHEET_COLUMNS])
            for q in sorted(rows, key=lambda q: (int(query_labels[q]), q))
        ]
    wanted = [u for u, _, _ in groups if u] + [uris[i] for _, _, hits in groups for i in hits]
    images = small_images(context, wanted)
    sheet = [
        SheetRow(
            images.get(query) if query else None,
            label,
            [(images[uris[i]], float(chosen.similarity[i])) for i in hits if uris[i] in images],
        )
        for query, label, hits in groups
    ]
    part = context.recipe.transfer
    title = f"Transfer set, {part.source}: queries (left) and the nearest images they fetched (right)"
    counts = f"{len(query_uris)} queries · {len(uris):,} images · {dropped} copies of held-out images dropped"
    stream = io.BytesIO()
    contact_sheet(sheet, stream, title, counts)
    stage.write("contact_sheet.png", stream.getvalue())


def small_images(context: Context, uris: list[str]) -> dict[str, np.ndarray]:
    """Images to be shown, uint8 (H, W, 3), by uri; decoded small where the format allows, unusable ones left out."""
    found = {}
    for uri, data, _ in fetch(list(dict.fromkeys(uris))):
        try:
            found[uri] = decode_rgb(data or b"", max_pixels=context.recipe.data.max_pixels, hint_size=128)
        except BadImage:
            continue
    return found


def _caption(context: Context, uri: str, label: int) -> str:
    """A query's class; for segmentation, where it has none, its file name."""
    return uri.rpartition("/")[2] if context.recipe.task.kind == "segmentation" else context.task.classes[label]
