"""CURATE: choose the transfer set, keep held-out images out of it, and show it.

``retrieved``: queries (the labelled images, parts of them, the classes' names) bring equal shares of their nearest
gallery images. ``generic``: a random draw of the gallery. ``list``: the images of a list that the user brings.
``target``: the task's own images without labels (the surplus of the label budget, and the labelled ones). Gallery
images that copy a validation or test image are dropped, and of several that show the same one is kept. What came with
an image and the objective needs (its caption, its generic label) goes along.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.sources.fetch import decode_image, fetch
from ktray.errors import BadImage, KtrayError
from ktray.models.teacher.spec import TeacherSpec
from ktray.recipe.schema import TransferConfig
from ktray.retrieval.contact_sheet import SheetRow, contact_sheet
from ktray.retrieval.coverage import coverage, lines
from ktray.retrieval.heldout_duplicates import DuplicateTable, Fingerprints
from ktray.retrieval.search import Hits
from ktray.retrieval.select import Selection, listed_selection, random_selection
from ktray.retrieval.set_duplicates import SetDuplicates
from ktray.stages.adapt import stage as adapt_stage
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.curate.heldout import heldout
from ktray.stages.curate.queries import Queries, QueryInputs, queries
from ktray.stages.index import compress
from ktray.stages.index.gallery import Gallery, agreement, duplicates, exact, retrieve
from ktray.stages.inputs import StageInputs
from ktray.stages.manifests import CurateManifest
from ktray.storage.columns import Rows, write_rows
from ktray.storage.store import Stage
from ktray.tasks.base import task_kind

logger = logging.getLogger("ktray")

SHEET_ROWS = 12
SHEET_COLUMNS = 12
REPEATED = "repeated"


@dataclass(frozen=True)
class CurateInputs(StageInputs):
    """What CURATE reads.

    Attributes:
        beside: columns of the index that go along with an image: its caption, its label.
        index: None for ``target``.
        encoder: of the index; None where it holds fingerprints alone.
        adapt: gives the queries of ``retrieved``.
        kind: of the task.
        names, prompts: the classes as text; empty where no query is text.
        crop_count: crops of a labelled image; None where there are none.
    """

    stage = "curate"
    # 2: captions, labels; 3: strategies, coverage; 4: queries of several kinds, no two images that show the same;
    # 5: which other strategies take an image too; 6: declared inputs
    version = 6

    transfer: TransferConfig
    beside: list[str]
    index: StageResult | None
    encoder: TeacherSpec | None
    adapt: StageResult | None
    task: LabelledSet
    kind: str
    names: list[str]
    prompts: list[str]
    crop_count: int | None
    max_pixels: int

    @property
    def asks(self) -> QueryInputs | None:
        """What the queries are made of; None where nothing is searched."""
        if self.transfer.source != "retrieved" or self.adapt is None or self.encoder is None:
            return None
        return QueryInputs(
            self.transfer,
            self.adapt,
            self.encoder,
            self.kind,
            self.task.classes,
            self.names,
            self.prompts,
            self.crop_count,
            self.max_pixels,
        )


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
    recipe, part = context.recipe, context.recipe.transfer
    needs = recipe.objective.traits.targets_needed
    text = part.queries != "images"
    inputs = CurateInputs(
        transfer=part,
        beside=[name for column, name in (("text", "caption"), ("label", "label")) if column in needs],
        index=index,
        encoder=spec if index else None,
        adapt=adapt if part.source == "retrieved" else None,
        task=context.task,
        kind=recipe.task.kind,
        names=context.names if text else [],
        prompts=context.prompts if text else [],
        crop_count=recipe.gallery.crop_count if part.query_crops != "none" else None,
        max_pixels=recipe.data.max_pixels,
    )
    return run_stage(context.runtime, inputs, work)


def work(inputs: CurateInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> CurateManifest:
    part, index, embedded = inputs.transfer, inputs.index, inputs.encoder is not None
    if index is None:
        return _target(inputs, stage)
    gallery = Gallery.of(index)
    kept_out = heldout(inputs.task, inputs.encoder, inputs.max_pixels, runtime, stage, reporter)
    copies = _copies(part, gallery, kept_out, embedded, runtime, reporter)
    repeats = _repeats(part, gallery, embedded)
    exclude = copies.gallery
    if "caption" in inputs.beside:
        silent = np.flatnonzero(np.concatenate(gallery.columns("caption")) == "")
        exclude = np.union1d(exclude, silent)
        if len(silent) == gallery.total:
            raise KtrayError(
                "No gallery image has a caption, and the objective learns from captions",
                "Name a gallery with captions (.txt beside the images of a tar), or another objective.",
            )
    asked = Queries(np.zeros((0, 0), np.float32), [], np.zeros(0, np.int64))
    if inputs.asks is not None:
        asked = queries(inputs.asks, runtime, stage, reporter)
        write_rows(stage, "queries.parquet", {"uri": np.array(asked.uris, dtype=str), "label": asked.labels})
    if index.manifest.get("search"):
        nearest = compress.nearest(index.manifest["search"], gallery)
    else:
        nearest = partial(exact, gallery=gallery, plan=runtime.plan)
    chosen, agreed = _choose(inputs, gallery, asked, nearest, exclude, repeats, reporter)
    if chosen.missing and part.source != "list":
        logger.info(
            f"curate    the gallery offers {len(chosen.gallery)} images, {chosen.missing} short of transfer.size"
        )
    found = repeats.repeats if repeats else {}
    uris = _write(stage, gallery, chosen, asked, inputs.beside, agreed, copies, kept_out, found)
    dropped = {**copies.counts(), REPEATED: len(found)}
    covered = None
    if len(asked) and len(chosen):
        classes = inputs.task.classes if task_kind(inputs.kind).image_classes else []
        covered = coverage(chosen, asked.labels, classes)
        for line in lines(covered):
            logger.info(f"curate    {line}")
    _sheet(inputs, stage, chosen, uris, asked, dropped)
    return {
        "kept": len(uris),
        "dropped": dropped,
        "gallery": gallery.total,
        "similar_kept": copies.similar,
        "coverage": covered,
        "agreement": {name: float(also.mean()) for name, also in agreed.items()} if len(chosen) else {},
    }


def _copies(
    part: TransferConfig, gallery: Gallery, kept_out: Rows, embedded: bool, runtime: Runtime, reporter: Reporter
) -> DuplicateTable:
    embedding = kept_out["embedding"].astype(np.float32) if embedded else None
    prints = Fingerprints(kept_out["hash"], kept_out["digest"])
    found = duplicates(gallery, embedding, prints, part.dedup_similarity, runtime.plan)
    if embedding is not None:
        reporter.meter.add(flops=2 * gallery.total * embedding.size)
    return found


def _repeats(part: TransferConfig, gallery: Gallery, embedded: bool) -> SetDuplicates | None:
    similarity = part.repeat_similarity
    if similarity is None:
        return None

    def look(rows: np.ndarray) -> tuple[np.ndarray | None, Fingerprints]:
        prints = (np.array(gallery.take(name, rows), dtype=np.uint64) for name in ("hash", "digest"))
        vectors = np.stack(gallery.take("embedding", rows)).astype(np.float32) if embedded else None
        return vectors, Fingerprints(*prints)

    return SetDuplicates(look, similarity)


def _choose(
    inputs: CurateInputs,
    gallery: Gallery,
    asked: Queries,
    nearest: Callable[..., Hits],
    exclude: np.ndarray,
    repeats: SetDuplicates | None,
    reporter: Reporter,
) -> tuple[Selection, dict[str, np.ndarray]]:
    """The set, and which of it each strategy takes too (`ktray.stages.index.gallery.agreement`)."""
    part, adapt, total = inputs.transfer, inputs.adapt, gallery.total
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

    strategy = part.chosen_strategy
    able = strategy.needs_predictions or task_kind(inputs.kind).image_classes
    predict = adapt_stage.frozen_predictions(adapt) if able else None
    chosen = retrieve(strategy, hits, len(asked), gallery, int(part.size or 1), exclude, predict, repeats)
    repeated = np.array(sorted(repeats.repeats), dtype=np.int64) if repeats else exclude[:0]
    return chosen, agreement(chosen, last, gallery, np.union1d(exclude, repeated), predict, strategy)


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


def _target(inputs: CurateInputs, stage: Stage) -> CurateManifest:
    uris = [e.uri for e in inputs.task.train] + list(inputs.task.unlabeled)
    size = inputs.transfer.size
    if size is not None and size < len(uris):
        order = np.random.default_rng(inputs.transfer.seed).permutation(len(uris))[:size]
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
    inputs: CurateInputs, stage: Stage, chosen: Selection, uris: list[str], asked: Queries, dropped: dict[str, int]
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
            (asked.uris[q], _caption(inputs, asked.uris[q], int(labels[q])), by_query[q][:SHEET_COLUMNS])
            for q in sorted(rows, key=lambda q: (int(labels[q]), q))
        ]
    wanted = [u for u, _, _ in groups if u] + [uris[i] for _, _, hits in groups for i in hits]
    images = small_images(wanted, inputs.max_pixels)
    sheet = [
        SheetRow(
            images.get(query) if query else None,
            label,
            [(images[uris[i]], float(chosen.similarity[i])) for i in hits if uris[i] in images],
        )
        for query, label, hits in groups
    ]
    part = inputs.transfer
    title = f"Transfer set, {part.source}: queries (left) and the nearest images they fetched (right)"
    copied = sum(count for reason, count in dropped.items() if reason != REPEATED)
    counts = (
        f"{len(asked)} queries · {len(uris):,} images · dropped: {copied} copies of held-out images, "
        f"{dropped.get(REPEATED, 0)} that show the same as another"
    )
    stream = io.BytesIO()
    contact_sheet(sheet, stream, title, counts)
    stage.write("contact_sheet.png", stream.getvalue())


def small_images(uris: list[str], max_pixels: int) -> dict[str, np.ndarray]:
    """Images to be shown, uint8 (H, W, 3), by uri; decoded small where the format allows, unusable ones (and what is no
    image, such as a class's name) left out."""
    found = {}
    for uri, data, error in fetch(list(dict.fromkeys(uris))):
        try:
            found[uri] = decode_image(uri, data, error, max_pixels=max_pixels, enough=lambda *sides: min(sides) / 128)
        except BadImage:
            continue
    return found


def _caption(inputs: CurateInputs, uri: str, label: int) -> str:
    """A query's class; its file name where it has none."""
    return inputs.task.classes[label] if task_kind(inputs.kind).image_classes else uri.rpartition("/")[2]
