"""CURATE: choose the transfer set, keep held-out images out of it, and show it.

``retrieved``: each labelled image is a query and brings an equal share of its nearest gallery images.
``generic``: a random draw of the gallery. ``target``: the task's own images without labels (the surplus of the
label budget, and the labelled ones). Gallery images that copy a validation or test image are dropped.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from ktray.data.decode import decode_rgb
from ktray.data.reading import fetch
from ktray.errors import BadImage, KtrayError
from ktray.models.preprocess import Preprocess
from ktray.retrieval.dedup import Fingerprints, GalleryBlock, fingerprint_heldout, near_duplicates
from ktray.retrieval.search import search
from ktray.retrieval.select import Selection, query_balanced, random_selection
from ktray.retrieval.sheet import SheetRow, contact_sheet
from ktray.stages import adapt as adapt_stage
from ktray.stages.base import Context, Done, Reporter, finished_shards, resumed, run_stage
from ktray.stages.index import MakeEmbedder
from ktray.stages.labels import SHARD
from ktray.stages.teachers import TeacherSpec
from ktray.store import Stage
from ktray.streaming import Item, Rows, map_shards, read_rows, write_rows

VERSION = 1
SHEET_ROWS = 12
SHEET_COLUMNS = 12


def run(context: Context, spec: TeacherSpec, adapt: Done, index: Done | None) -> Done:
    """``transfer.parquet`` (uri, query, rank, similarity), ``dropped.parquet``, ``contact_sheet.png``."""
    part = context.recipe.transfer

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        if index is None:
            return _target(context, stage)
        names = [name for name, rows in index.manifest["shards"] if rows]
        counts = [rows for _, rows in index.manifest["shards"] if rows]
        if not names:
            raise KtrayError("The gallery has no usable image", "Check gallery.data and the quarantine list.")
        heldout = _heldout(context, stage, spec, reporter)
        offsets = np.concatenate([[0], np.cumsum(counts)]).tolist()

        def blocks() -> Any:
            for name, offset in zip(names, offsets, strict=False):
                yield offset, read_rows(index.stage, name, ["embedding"])["embedding"]

        def prints() -> Any:
            for name, offset in zip(names, offsets, strict=False):
                rows = read_rows(index.stage, name, ["embedding", "hash", "digest"])
                hashes = Fingerprints(rows["hash"].astype(np.uint64), rows["digest"].astype(np.uint64))
                yield GalleryBlock(offset, rows["embedding"], hashes)

        duplicates = near_duplicates(
            prints(),
            heldout["embedding"].astype(np.float32),
            Fingerprints(heldout["hash"], heldout["digest"]),
            similarity=part.dedup_similarity,
        )
        total, size = offsets[-1], int(part.size or 1)
        width = heldout["embedding"].shape[1]
        reporter.meter.add(flops=2 * total * len(heldout["embedding"]) * width)
        queries, query_uris, query_labels = adapt_stage.train_embeddings(adapt)
        if part.source == "generic":
            chosen = random_selection(total, size, part.seed, exclude=duplicates.gallery)
        else:
            chosen = _retrieve(queries, blocks, total, size, duplicates.gallery, reporter)
        if chosen.missing:
            context.say(
                f"curate    the gallery offers {len(chosen.gallery)} images, {chosen.missing} short of transfer.size"
            )
        uris = _uris(index, names, offsets, chosen.gallery)
        origin = [query_uris[q] if q >= 0 else "" for q in chosen.query.tolist()]
        write_rows(
            stage,
            "transfer.parquet",
            {
                "uri": np.array(uris, dtype=str),
                "query": np.array(origin, dtype=str),
                "rank": chosen.rank,
                "similarity": chosen.similarity,
            },
        )
        write_rows(
            stage,
            "dropped.parquet",
            {
                "uri": np.array(_uris(index, names, offsets, duplicates.gallery), dtype=str),
                "heldout": np.array([str(heldout["uri"][i]) for i in duplicates.heldout], dtype=str),
                "similarity": duplicates.similarity,
                "reason": np.array(duplicates.reason, dtype=str),
            },
        )
        dropped = duplicates.counts()
        _sheet(context, stage, chosen, uris, query_uris, query_labels, sum(dropped.values()))
        return {"kept": len(uris), "dropped": dropped, "gallery": total, "similar_kept": duplicates.similar}

    parts = [
        VERSION,
        part.model_dump(),
        index.key if index else None,
        adapt.manifest["key"] if part.source == "retrieved" else None,
        context.fingerprint,
        spec.fingerprint if index else None,
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


def _retrieve(
    queries: np.ndarray, blocks: Any, total: int, size: int, exclude: np.ndarray, reporter: Reporter
) -> Selection:
    k = min(total, 4 * -(-size // len(queries)) + 8)
    while True:
        similarity, found = search(queries, blocks(), k)
        reporter.meter.add(flops=2 * total * len(queries) * queries.shape[1])
        chosen = query_balanced(similarity, found, size, exclude=exclude)
        # Searching on is only worth it while images are missing: a shortfall that other queries filled is told
        # by coverage, and chasing it would search the whole gallery for the odd query.
        if not chosen.missing or not chosen.retry_k:
            return chosen
        k = min(total, chosen.retry_k)


class _PrepareHeldout:
    def __init__(self, preprocess: Preprocess, max_pixels: int) -> None:
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
        pixels = [self.preprocess.eval_transform(i) for i in images]
        return {
            "uri": np.array(uris, dtype=str),
            "hash": prints.hash,
            "digest": prints.digest,
            "pixels": np.stack(pixels) if pixels else np.zeros((0, 3, *self.preprocess.size), np.uint8),
        }


def _heldout(context: Context, stage: Stage, spec: TeacherSpec, reporter: Reporter) -> Rows:
    """Embeddings and fingerprints of validation and test images; nothing else of them is looked at."""
    uris = [e.uri for e in [*context.task.val, *context.task.test]]
    folder = Stage(stage.file("heldout"))
    items = [
        {"name": f"heldout-{i // SHARD:05d}.parquet", "uris": uris[i : i + SHARD]} for i in range(0, len(uris), SHARD)
    ]
    finished = finished_shards(folder)
    reporter.expect(len(uris))
    reporter.shards({**resumed(s), "bad": []} for s in finished.values())
    prepare = _PrepareHeldout(spec.preprocess, context.recipe.data.max_pixels)
    todo = [i for i in items if i["name"] not in finished]
    reporter.shards(map_shards(todo, prepare, MakeEmbedder(folder, spec), context.plan))
    reporter.read = 0  # counted where they are used
    shards = [read_rows(folder, str(item["name"])) for item in items]
    return {name: np.concatenate([s[name] for s in shards]) for name in shards[0]}


def _uris(index: Done, names: list[str], offsets: list[int], rows: np.ndarray) -> list[str]:
    out: dict[int, str] = {}
    shard = np.searchsorted(offsets, rows, side="right") - 1
    for number in np.unique(shard).tolist():
        uris = read_rows(index.stage, names[number], ["uri"])["uri"]
        for row in rows[shard == number].tolist():
            out[row] = str(uris[row - offsets[number]])
    return [out[row] for row in rows.tolist()]


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
            (query_uris[q], context.task.classes[int(query_labels[q])], by_query[q][:SHEET_COLUMNS])
            for q in sorted(rows, key=lambda q: (int(query_labels[q]), q))
        ]
    wanted = [u for u, _, _ in groups if u] + [uris[i] for _, _, hits in groups for i in hits]
    images: dict[str, np.ndarray] = {}
    for uri, data, _ in fetch(list(dict.fromkeys(wanted))):
        try:
            images[uri] = decode_rgb(data or b"", max_pixels=context.recipe.data.max_pixels, hint_size=128)
        except BadImage:
            continue
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
