"""CURATE: choose the transfer set, keep held-out images out of it, and show it.

``retrieved``: queries (the labelled images, parts of them, the classes' names) bring equal shares of their nearest
gallery images. ``generic``: a random draw of the gallery. ``list``: the images of a list that the user brings.
``target``: the task's own images without labels (the surplus of the label budget, and the labelled ones). Gallery
images that copy a validation or test image are dropped, and of several that show the same one is kept. What came with
an image and the objective needs (its caption, its generic label) goes along.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import numpy as np

from ktray.data.sources.fetch import decode_image, fetch
from ktray.errors import BadImage, KtrayError
from ktray.models.teacher.spec import TeacherSpec
from ktray.objectives import build_objective
from ktray.retrieval.contact_sheet import SheetRow, contact_sheet
from ktray.retrieval.coverage import coverage, lines
from ktray.retrieval.heldout_duplicates import DuplicateTable, Fingerprints
from ktray.retrieval.search import Hits
from ktray.retrieval.select import Selection, listed_selection, random_selection
from ktray.retrieval.set_duplicates import SetDuplicates
from ktray.retrieval.strategies import NEEDS_PREDICTIONS
from ktray.stages.adapt import stage as adapt_stage
from ktray.stages.base import Reporter, RunContext, StageResult, run_stage
from ktray.stages.curate.heldout import heldout
from ktray.stages.curate.queries import Queries, queries
from ktray.stages.index import compress
from ktray.stages.index.gallery import Gallery, agreement, duplicates, exact, retrieve
from ktray.stages.manifests import CurateManifest
from ktray.storage.columns import Rows, write_rows
from ktray.storage.store import Stage

# 2: captions, labels; 3: strategies, coverage; 4: queries of several kinds, no two images that show the same;
# 5: which other strategies take an image too
VERSION = 5
SHEET_ROWS = 12
SHEET_COLUMNS = 12
REPEATED = "repeated"


def run(
    context: RunContext, spec: TeacherSpec | None, adapt: StageResult | None, index: StageResult | None
) -> StageResult:
    """``transfer.parquet`` (uri, query, rank, similarity, strategies, perhaps caption or label), ``queries.parquet``,
    ``dropped.parquet``, ``contact_sheet.png``.

    Args:
        spec: the index's encoder; None where it holds fingerprints alone.
        adapt: gives the queries of ``retrieved``.
        index: None for ``target``.
    """
    part = context.recipe.transfer
    needs = build_objective(context.recipe.objective).targets_needed
    beside = [name for column, name in (("text", "caption"), ("label", "label")) if column in needs]

    def work(stage: Stage, reporter: Reporter) -> CurateManifest:
        if index is None:
            return _target(context, stage)
        gallery = Gallery.of(index)
        kept_out = heldout(context, stage, spec, reporter)
        copies = _copies(context, gallery, kept_out, spec is not None, reporter)
        repeats = _repeats(context, gallery, spec is not None)
        exclude = copies.gallery
        if "caption" in beside:
            silent = np.flatnonzero(np.concatenate(gallery.columns("caption")) == "")
            exclude = np.union1d(exclude, silent)
            if len(silent) == gallery.total:
                raise KtrayError(
                    "No gallery image has a caption, and objective.name=clip learns from captions",
                    "Name a gallery with captions (.txt beside the images of a tar), or another objective.",
                )
        asked = Queries(np.zeros((0, 0), np.float32), [], np.zeros(0, np.int64))
        if part.source == "retrieved" and adapt is not None and spec is not None:
            asked = queries(context, stage, adapt, spec, reporter)
            write_rows(stage, "queries.parquet", {"uri": np.array(asked.uris, dtype=str), "label": asked.labels})
        if index.manifest.get("search"):
            nearest = compress.nearest(index.manifest["search"], gallery)
        else:
            nearest = partial(exact, gallery=gallery, plan=context.plan)
        chosen, agreed = _choose(context, gallery, asked, nearest, adapt, exclude, repeats, reporter)
        if chosen.missing and part.source != "list":
            context.say(
                f"curate    the gallery offers {len(chosen.gallery)} images, {chosen.missing} short of transfer.size"
            )
        found = repeats.repeats if repeats else {}
        uris = _write(stage, gallery, chosen, asked, beside, agreed, copies, kept_out, found)
        dropped = {**copies.counts(), REPEATED: len(found)}
        covered = None
        if len(asked) and len(chosen):
            classes = [] if context.recipe.task.kind == "segmentation" else context.task.classes
            covered = coverage(chosen, asked.labels, classes)
            for line in lines(covered):
                context.say(f"curate    {line}")
        _sheet(context, stage, chosen, uris, asked, dropped)
        return {
            "kept": len(uris),
            "dropped": dropped,
            "gallery": gallery.total,
            "similar_kept": copies.similar,
            "coverage": covered,
            "agreement": {name: float(also.mean()) for name, also in agreed.items()} if len(chosen) else {},
        }

    parts = [
        VERSION,
        part.model_dump(),
        beside,
        index.key if index else None,
        adapt.manifest["key"] if part.source == "retrieved" and adapt else None,
        context.fingerprint,
        spec.fingerprint if index and spec else None,
        [context.class_names, context.prompts] if part.queries != "images" else None,
        context.recipe.gallery.crop_count if part.query_crops != "none" else None,
    ]
    return run_stage(context, "curate", parts, work)


def _copies(
    context: RunContext, gallery: Gallery, kept_out: Rows, embedded: bool, reporter: Reporter
) -> DuplicateTable:
    embedding = kept_out["embedding"].astype(np.float32) if embedded else None
    prints = Fingerprints(kept_out["hash"], kept_out["digest"])
    found = duplicates(gallery, embedding, prints, context.recipe.transfer.dedup_similarity, context.plan)
    if embedding is not None:
        reporter.meter.add(flops=2 * gallery.total * embedding.size)
    return found


def _repeats(context: RunContext, gallery: Gallery, embedded: bool) -> SetDuplicates | None:
    similarity = context.recipe.transfer.repeat_similarity
    if similarity is None:
        return None

    def look(rows: np.ndarray) -> tuple[np.ndarray | None, Fingerprints]:
        prints = (np.array(gallery.take(name, rows), dtype=np.uint64) for name in ("hash", "digest"))
        vectors = np.stack(gallery.take("embedding", rows)).astype(np.float32) if embedded else None
        return vectors, Fingerprints(*prints)

    return SetDuplicates(look, similarity)


def _choose(
    context: RunContext,
    gallery: Gallery,
    asked: Queries,
    nearest: Callable[..., Hits],
    adapt: StageResult | None,
    exclude: np.ndarray,
    repeats: SetDuplicates | None,
    reporter: Reporter,
) -> tuple[Selection, dict[str, np.ndarray]]:
    """The set, and which of it each strategy takes too (`ktray.stages.index.gallery.agreement`)."""
    part, total = context.recipe.transfer, gallery.total
    if part.source != "retrieved" or adapt is None:
        while True:
            chosen = (
                listed_selection(total, part.size, exclude=exclude)
                if part.source == "list"
                else random_selection(total, int(part.size or 1), part.seed, exclude=exclude)
            )
            again = repeats(chosen.gallery) if repeats else exclude[:0]
            if not len(again):
                return chosen, {}
            exclude = np.union1d(exclude, again)

    last: Hits = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int64)

    def hits(k: int) -> Hits:
        nonlocal last
        reporter.meter.add(flops=2 * total * asked.embedding.size)
        last = nearest(asked.embedding, k=k)
        return last

    able = part.strategy in NEEDS_PREDICTIONS or context.recipe.task.kind == "classification"
    predict = adapt_stage.frozen_predictions(adapt) if able else None
    chosen = retrieve(part.strategy, hits, len(asked), gallery, int(part.size or 1), exclude, predict, repeats)
    repeated = np.array(sorted(repeats.repeats), dtype=np.int64) if repeats else exclude[:0]
    return chosen, agreement(chosen, last, gallery, np.union1d(exclude, repeated), predict)


def _write(
    stage: Stage,
    gallery: Gallery,
    chosen: Selection,
    asked: Queries,
    beside: list[str],
    agreed: dict[str, np.ndarray],
    copies: DuplicateTable,
    kept_out: Rows,
    repeated: dict[int, int],
) -> list[str]:
    """``transfer.parquet`` and ``dropped.parquet``; returns the images' uris."""
    uris = gallery.take("uri", chosen.gallery)
    origin = [asked.uris[q] if q >= 0 else "" for q in chosen.query.tolist()]
    write_rows(
        stage,
        "transfer.parquet",
        {
            "uri": np.array(uris, dtype=str),
            "query": np.array(origin, dtype=str),
            "rank": chosen.rank,
            "similarity": chosen.similarity,
            "strategies": np.array(
                [",".join(name for name, also in agreed.items() if also[i]) for i in range(len(uris))], dtype=str
            ),
            **{name: np.array(gallery.take(name, chosen.gallery)) for name in beside},
        },
    )
    again, of = (np.array(list(rows), dtype=np.int64) for rows in (repeated.keys(), repeated.values()))
    copied = [str(kept_out["uri"][i]) for i in copies.heldout]
    write_rows(
        stage,
        "dropped.parquet",
        {
            "uri": np.array([*gallery.take("uri", copies.gallery), *gallery.take("uri", again)], dtype=str),
            "copy_of": np.array([*copied, *gallery.take("uri", of)], dtype=str),
            "similarity": np.concatenate([copies.similarity, np.full(len(again), np.nan, np.float32)]),
            "reason": np.array([*copies.reason, *[REPEATED] * len(again)], dtype=str),
        },
    )
    return uris


def _target(context: RunContext, stage: Stage) -> CurateManifest:
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
            "strategies": np.array([""] * n, dtype=str),
        },
    )
    return {"kept": n, "dropped": {}, "gallery": n, "similar_kept": 0}


def _sheet(
    context: RunContext, stage: Stage, chosen: Selection, uris: list[str], asked: Queries, dropped: dict[str, int]
) -> None:
    """Queries spread over the classes on the left, what they brought on the right."""
    rng = np.random.default_rng(0)
    by_query: dict[int, list[int]] = {}
    for i, q in enumerate(chosen.query.tolist()):
        by_query.setdefault(q, []).append(i)
    groups: list[tuple[str | None, str, list[int]]]
    if chosen.query.size and chosen.query[0] < 0:  # no queries: rows of a random draw
        picks = rng.permutation(len(uris))[: SHEET_ROWS * SHEET_COLUMNS].tolist()
        groups = [(None, "random", picks[i : i + SHEET_COLUMNS]) for i in range(0, len(picks), SHEET_COLUMNS)]
    else:
        order, labels = rng.permutation(sorted(by_query)).tolist(), asked.labels
        seen: set[int] = set()
        first = [q for q in order if not (int(labels[q]) in seen or seen.add(int(labels[q])))]  # type: ignore[func-returns-value]
        rows = (first + [q for q in order if q not in first])[:SHEET_ROWS]
        groups = [
            (asked.uris[q], _caption(context, asked.uris[q], int(labels[q])), by_query[q][:SHEET_COLUMNS])
            for q in sorted(rows, key=lambda q: (int(labels[q]), q))
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
    copied = sum(count for reason, count in dropped.items() if reason != REPEATED)
    counts = (
        f"{len(asked)} queries · {len(uris):,} images · dropped: {copied} copies of held-out images, "
        f"{dropped.get(REPEATED, 0)} that show the same as another"
    )
    stream = io.BytesIO()
    contact_sheet(sheet, stream, title, counts)
    stage.write("contact_sheet.png", stream.getvalue())


def small_images(context: RunContext, uris: list[str]) -> dict[str, np.ndarray]:
    """Images to be shown, uint8 (H, W, 3), by uri; decoded small where the format allows, unusable ones (and what is no
    image, such as a class's name) left out."""
    found, limit = {}, context.recipe.data.max_pixels
    for uri, data, error in fetch(list(dict.fromkeys(uris))):
        try:
            found[uri] = decode_image(uri, data, error, max_pixels=limit, enough=lambda *sides: min(sides) / 128)
        except BadImage:
            continue
    return found


def _caption(context: RunContext, uri: str, label: int) -> str:
    """A query's class; for segmentation, where it has none, its file name."""
    return uri.rpartition("/")[2] if context.recipe.task.kind == "segmentation" else context.task.classes[label]
