"""CURATE: choose the transfer set, keep copies of held-out images out of it, and draw a contact sheet.

``transfer.source`` names where the images come from. ``retrieved``: each query (a labelled image, a crop of one, or a
class name) contributes an equal share of its nearest gallery images, above a similarity floor if there is one; a query
without near images left gives its share to the others. ``generic``: a random draw from the gallery.
``list``: the images in a list of the user. ``target``: the images of the task without their labels (the labelled images
and those beyond the label budget). Gallery images that are copies of a validation or test image are dropped, and only
one of several near-duplicates is kept. A caption or generic label that the objective needs is stored with each image.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np

from ktray.data.fingerprints import Fingerprints
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.sources.fetch import fetch_images
from ktray.errors import KtrayError
from ktray.models.teacher.spec import TeacherSpec
from ktray.recipe.schema import TransferConfig
from ktray.retrieval.contact_sheet import SheetRow, contact_sheet
from ktray.retrieval.coverage import coverage, lines
from ktray.retrieval.heldout_duplicates import DuplicateTable
from ktray.retrieval.select import Selection
from ktray.stages.adapt import stage as adapt_stage
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.curate.choose import retrieved, without_queries
from ktray.stages.curate.heldout import heldout
from ktray.stages.curate.queries import Queries, QueryInputs, queries
from ktray.stages.index import compress
from ktray.stages.index.gallery import Gallery, duplicates, exact
from ktray.stages.inputs import AddedLater, NotInKey, StageInputs
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
    """The inputs of CURATE.

    Attributes:
        beside: columns of the index that are stored with each image: its caption, its label.
        index: the INDEX stage; None for ``target``.
        encoder: the encoder of the index; None where the index holds only fingerprints.
        adapt: the ADAPT stage, which holds the queries of ``retrieved``; None for other sources.
        kind: the task kind.
        names, prompts: the class names as text, and their templates; empty without text queries.
        crop_count: number of crops of each labelled image; None: no crops.
    """

    stage = "curate"
    # 2: captions, labels; 3: strategies, coverage; 4: queries of several kinds, no near-duplicates;
    # 5: the other strategies that would also choose an image; 6: declared inputs
    version = 6

    transfer: Annotated[
        TransferConfig,
        NotInKey("weights of images do not change which images are chosen", ("weight",)),
        AddedLater({"min_similarity": None}),
    ]
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
    def speed(self) -> dict[str, Any]:
        # The time grows with the gallery; what the task needs besides is the same in all runs of the task.
        return {
            "model": self.encoder.source.name if self.encoder else None,
            "size": self.encoder.preprocess.size[0] if self.encoder else 0,
            "source": self.transfer.source,
            "strategy": self.transfer.chosen_strategy.name,
            "queries": self.transfer.queries,
            "crops": self.crop_count,
            "labelled": len(self.task.train),
            "heldout": len(self.task.val) + len(self.task.test),
        }

    def images_worked(self, counted: int, manifest: Mapping[str, Any]) -> int:
        """The rows of the gallery, or the images of ``target``; the ledger counts only images that are embedded."""
        return int(manifest["gallery"])

    @property
    def asks(self) -> QueryInputs | None:
        """The inputs of the queries; None where nothing is searched."""
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
    """Store ``transfer.parquet`` (uri, query, rank, similarity, strategies, and the caption or label if the objective
    needs it), ``queries.parquet``, ``dropped.parquet`` and ``contact_sheet.png``.

    Args:
        spec: the encoder of the index; None where the index holds only fingerprints.
        adapt: the ADAPT stage, which holds the queries of ``retrieved``.
        index: the INDEX stage; None for ``target``.
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
    exclude = copies.gallery
    if "caption" in inputs.beside:
        silent = np.flatnonzero(np.concatenate(gallery.columns("caption")) == "")
        exclude = np.union1d(exclude, silent)
        if len(silent) == gallery.total:
            raise KtrayError(
                "No gallery image has a caption, and the objective learns from captions",
                "Set gallery.data to a gallery with captions (in a tar: a .txt directly before or after each image, as "
                "`tar --sort=name` writes them), or choose an objective that needs no captions.",
            )
    query_set = Queries.none()
    if inputs.asks is not None:
        query_set = queries(inputs.asks, runtime, stage, reporter)
        write_rows(stage, "queries.parquet", {"uri": np.array(query_set.uris, dtype=str), "label": query_set.labels})
    if index.manifest.get("search"):
        nearest = compress.nearest(index.manifest["search"], gallery)
    else:
        nearest = partial(exact, gallery=gallery, plan=runtime.plan)
    if part.source == "retrieved" and inputs.adapt is not None:
        has_classes = task_kind(inputs.kind).image_classes
        able = part.chosen_strategy.needs_predictions or has_classes
        predict = adapt_stage.frozen_predictions(inputs.adapt) if able else None
        made = retrieved(part, gallery, query_set, nearest, exclude, predict, has_classes, reporter)
    else:
        made = without_queries(part, gallery, embedded, exclude, runtime.plan)
    chosen, agreed, repeated = made.selection, made.agreed, made.repeated
    if chosen.missing and part.source != "list":
        limit = " reach the floor and" if made.on_task and made.on_task["applied"] else ""
        logger.info(
            f"curate    only {len(chosen.gallery)} images of the gallery{limit} can be chosen, {chosen.missing} fewer "
            "than transfer.size"
        )
    uris = _write(stage, gallery, chosen, query_set, inputs.beside, agreed, copies, kept_out, repeated)
    dropped = {**copies.counts(), REPEATED: len(repeated)}
    query_coverage = None
    if len(query_set) and len(chosen):
        kind = task_kind(inputs.kind)
        classes = inputs.task.classes if kind.image_classes or kind.label_sets else []
        query_coverage = coverage(chosen, query_set.membership, classes)
        for line in lines(query_coverage):
            logger.info(f"curate    {line}")
    _sheet(inputs, stage, chosen, uris, query_set, dropped)
    return {
        "kept": len(uris),
        "dropped": dropped,
        "gallery": gallery.total,
        "similar_kept": copies.similar,
        "coverage": query_coverage,
        "agreement": {name: float(also.mean()) for name, also in agreed.items()} if len(chosen) else {},
        "on_task": made.on_task,
    }


def _copies(
    part: TransferConfig, gallery: Gallery, kept_out: Rows, embedded: bool, runtime: Runtime, reporter: Reporter
) -> DuplicateTable:
    embedding = kept_out["embedding"].astype(np.float32) if embedded else None
    prints = Fingerprints(kept_out["hash"], kept_out["digest"])
    copies = duplicates(gallery, embedding, prints, part.dedup_similarity, runtime.plan)
    if embedding is not None:
        reporter.meter.add(flops=2 * gallery.total * embedding.size)
    return copies


def _write(
    stage: Stage,
    gallery: Gallery,
    chosen: Selection,
    query_set: Queries,
    beside: list[str],
    agreed: dict[str, np.ndarray],
    copies: DuplicateTable,
    kept_out: Rows,
    repeated: dict[int, int],
) -> list[str]:
    """Write ``transfer.parquet`` and ``dropped.parquet``; returns the uris of the chosen images."""
    uris = gallery.take("uri", chosen.gallery)
    origin = [query_set.uris[q] if q >= 0 else "" for q in chosen.query.tolist()]
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
    repeated_rows, originals = (np.array(list(rows), dtype=np.int64) for rows in (repeated.keys(), repeated.values()))
    copied = [str(kept_out["uri"][i]) for i in copies.heldout]
    write_rows(
        stage,
        "dropped.parquet",
        {
            "uri": np.array([*gallery.take("uri", copies.gallery), *gallery.take("uri", repeated_rows)], dtype=str),
            "copy_of": np.array([*copied, *gallery.take("uri", originals)], dtype=str),
            "similarity": np.concatenate([copies.similarity, np.full(len(repeated_rows), np.nan, np.float32)]),
            "reason": np.array([*copies.reason, *[REPEATED] * len(repeated_rows)], dtype=str),
        },
    )
    return uris


def _target(inputs: CurateInputs, stage: Stage) -> CurateManifest:
    uris = [e.uri for e in inputs.task.train] + list(inputs.task.unlabeled)
    size = inputs.transfer.size
    assert size != "auto"  # the pipeline has replaced it
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
    inputs: CurateInputs, stage: Stage, chosen: Selection, uris: list[str], query_set: Queries, dropped: dict[str, int]
) -> None:
    """Draw the contact sheet: queries from different classes on the left, and the images that they found on the
    right."""
    rng = np.random.default_rng(0)
    by_query: dict[int, list[int]] = {}
    for i, q in enumerate(chosen.query.tolist()):
        by_query.setdefault(q, []).append(i)
    groups: list[tuple[str | None, str, list[int]]]
    if chosen.query.size and chosen.query[0] < 0:  # without queries, the rows show a random draw
        picks = rng.permutation(len(uris))[: SHEET_ROWS * SHEET_COLUMNS].tolist()
        groups = [(None, "random", picks[i : i + SHEET_COLUMNS]) for i in range(0, len(picks), SHEET_COLUMNS)]
    else:
        order, labels = rng.permutation(sorted(by_query)).tolist(), query_set.labels
        shown_labels: set[int] = set()
        first = [q for q in order if not (int(labels[q]) in shown_labels or shown_labels.add(int(labels[q])))]  # type: ignore[func-returns-value]
        rows = (first + [q for q in order if q not in first])[:SHEET_ROWS]
        groups = [
            (query_set.uris[q], _caption(inputs, query_set, q), by_query[q][:SHEET_COLUMNS])
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
    title = f"Transfer set, {part.source}: queries (left) and the nearest images that they found (right)"
    copied = sum(count for reason, count in dropped.items() if reason != REPEATED)
    counts = (
        f"{len(query_set)} queries · {len(uris):,} images · dropped: {copied} copies of held-out images, "
        f"{dropped.get(REPEATED, 0)} near-duplicates within the set"
    )
    stream = io.BytesIO()
    contact_sheet(sheet, stream, title, counts)
    stage.write("contact_sheet.png", stream.getvalue())


def small_images(uris: list[str], max_pixels: int) -> dict[str, np.ndarray]:
    """Images for display, uint8 (H, W, 3), by uri. They are decoded at a reduced size where the format allows it.
    Unusable images, and uris that are no images (such as text queries), are left out."""
    images = fetch_images(list(dict.fromkeys(uris)), max_pixels=max_pixels, enough=lambda *sides: min(sides) / 128)
    return {uri: image for uri, image, _ in images if image is not None}


def _caption(inputs: CurateInputs, query_set: Queries, query: int) -> str:
    """The class or classes of a query; its file name if it has none."""
    if query_set.classes is not None and query_set.classes[query].any():
        return ", ".join(inputs.task.classes[c] for c in np.flatnonzero(query_set.classes[query]).tolist())
    if task_kind(inputs.kind).image_classes:
        return inputs.task.classes[int(query_set.labels[query])]
    return query_set.uris[query].rpartition("/")[2]
