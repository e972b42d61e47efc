"""The choice of the transfer set: a random draw, a list, or the images that the queries retrieve above the floor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ktray.distributed.allocation import Allocation
from ktray.distributed.ray_data import map_numbered
from ktray.errors import KtrayError
from ktray.recipe.schema import TransferConfig
from ktray.retrieval.floor import above
from ktray.retrieval.heldout_duplicates import Fingerprints
from ktray.retrieval.search import Hits
from ktray.retrieval.select import Selection, listed_selection, random_selection
from ktray.retrieval.set_duplicates import Pairs, SetDuplicates, Span, similar_pairs
from ktray.stages.base import Reporter
from ktray.stages.curate.judge import DRAWN, LARGEST_GALLERY, Judge, Predict, table
from ktray.stages.curate.queries import Queries
from ktray.stages.index.gallery import Gallery, alternatives, retrieve
from ktray.stages.manifests import OnTask
from ktray.storage.columns import Rows

logger = logging.getLogger("ktray")


@dataclass(frozen=True)
class Chosen:
    """A transfer set.

    Attributes:
        agreed: by strategy, (n,) bool, which of the images that strategy would also choose.
        repeated: gallery rows that were left out as near-duplicates, and the rows that they repeat.
        on_task: figures for the manifest (`ktray.stages.manifests.OnTask`); None without queries.
    """

    selection: Selection
    agreed: dict[str, np.ndarray] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)
    on_task: OnTask | None = None


def without_queries(
    part: TransferConfig, gallery: Gallery, embedded: bool, exclude: np.ndarray, plan: Allocation
) -> Chosen:
    """A random draw, or the images of a list, without near-duplicates."""
    repeats = _repeats(part, gallery, embedded, plan)
    while True:
        chosen = (
            listed_selection(gallery.total, _size(part), exclude=exclude)
            if part.source == "list"
            else random_selection(gallery.total, _size(part) or 1, part.seed, exclude=exclude)
        )
        repeated = repeats(chosen.gallery) if repeats else exclude[:0]
        if not len(repeated):
            return Chosen(chosen, repeated=repeats.repeats if repeats else {})
        exclude = np.union1d(exclude, repeated)


def retrieved(
    part: TransferConfig,
    gallery: Gallery,
    query_set: Queries,
    nearest: Callable[..., Hits],
    exclude: np.ndarray,
    predict: Predict | None,
    classes: bool,
    reporter: Reporter,
) -> Chosen:
    """The images that the queries find.

    Args:
        nearest: a function from queries and k to the k nearest gallery rows of each query.
        exclude: gallery rows that must not be chosen.
        predict: a function from unit embeddings to class probabilities; None if the strategy does not need it and the
            images of the task have no classes.
        classes: whether the images of the task have classes.

    Raises:
        KtrayError: no image reaches the floor, or the labelled images do not give a floor.
    """
    plan = reporter.runtime.plan
    repeats = _repeats(part, gallery, True, plan)
    strategy, size, floor = part.chosen_strategy, _size(part) or 1, floors(part, query_set)
    found: dict[int, Hits] = {}

    def every(k: int) -> Hits:
        if k not in found:
            reporter.meter.add(flops=2 * gallery.total * query_set.embedding.size)
            found.clear()  # the hits of fewer images are not needed again, and may be large
            found[k] = nearest(query_set.embedding, k=k)
        return found[k]

    last: Hits = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int64)

    def hits(k: int) -> Hits:
        nonlocal last
        last = every(k) if floor is None else _above(every(k), floor)
        return last

    share = query_set.share
    chosen = retrieve(strategy, hits, len(query_set), gallery, size, exclude, predict, repeats, share)
    repeated = repeats.repeats if repeats else {}
    excluded = np.union1d(exclude, np.array(sorted(repeated), dtype=np.int64))
    others = alternatives(len(chosen), last, gallery, excluded, predict, strategy, share)
    agreed = {name: np.isin(chosen.gallery, other.gallery) for name, other in others.items()}
    # Without the floor, the same strategy and size show what the floor leaves out.
    whole = chosen
    if floor is not None:
        whole = retrieve(strategy, every, len(query_set), gallery, size, excluded, predict, share=share)
    judge = Judge(gallery, query_set, predict if classes else None)
    drawn = None
    if gallery.total <= LARGEST_GALLERY:
        like = part.model_copy(update={"source": "generic", "size": min(len(chosen), DRAWN)})
        drawn = without_queries(like, gallery, True, exclude, plan).selection.gallery if len(chosen) else None
    limit = query_set.floor if floor is None else floor
    known = not np.isnan(limit).any()
    facts: OnTask = {
        "floor": sorted({round(float(value), 6) for value in limit.tolist()}) if known else [],
        "applied": floor is not None,
        "below": int((whole.similarity < limit[whole.query]).sum()) if known else 0,
        "curve": judge.by_query(whole).curve() if len(whole) else None,
        "sets": table(judge, chosen, strategy.name, others, drawn),
    }
    for line in lines(facts, len(whole)):
        logger.info(f"curate    {line}")
    return Chosen(chosen, agreed, repeated, facts)


def floors(part: TransferConfig, query_set: Queries) -> np.ndarray | None:
    """(Q,) float32 lowest similarity of each query's images; None: there is no floor.

    Raises:
        KtrayError: ``transfer.min_similarity=auto``, and the labelled images do not give a floor.
    """
    if part.min_similarity is None:
        return None
    if part.min_similarity != "auto":
        return np.full(len(query_set), part.min_similarity, dtype=np.float32)
    if np.isnan(query_set.floor).any():
        raise KtrayError(
            "transfer.min_similarity=auto compares labelled images of a class with each other, and no class has two of "
            "them for training",
            "Set transfer.min_similarity to a number or to null, or use more labels per class.",
        )
    return query_set.floor


def lines(facts: OnTask, images: int) -> list[str]:
    """The figures as lines of text.

    Args:
        images: number of images without a floor.
    """
    text = []
    floor = " and ".join(f"{value:.3f}" for value in facts["floor"])
    if facts["applied"]:
        text.append(
            f"floor of the cosine similarity {floor}: {facts['below']:,} of the {images:,} nearest images are below it "
            "and left out"
        )
    elif floor and facts["below"]:
        text.append(
            f"{facts['below']:,} of {images:,} images are less similar to the query that chose them than {floor}, "
            "which 90% of the labelled images reach; transfer.min_similarity=auto would leave them out"
        )
    for row in facts["sets"]:
        parts = [
            f"{row[name]:.0%} {words}"
            for name, words in (
                ("near", "of them above the calibrated floor"),
                ("confidence", "confidence of the teacher"),
            )
            if row[name] is not None
        ]
        text.append(
            f"{row['name']}: {row['images']:,} images, median similarity to the nearest query {row['similarity']:.2f}"
            + "".join(f", {part}" for part in parts)
        )
    return text


def _above(every: Hits, floor: np.ndarray) -> Hits:
    near = above(every, floor)
    if not (near[1] >= 0).any():
        best = float(every[0].max()) if every[0].size else float("nan")
        raise KtrayError(
            f"No gallery image reaches the floor transfer.min_similarity={float(floor.min()):.3f}; the highest "
            f"similarity to a query is {best:.3f}",
            "Lower transfer.min_similarity, set it to null, or use a gallery that has images of the task.",
        )
    return near


def _repeats(part: TransferConfig, gallery: Gallery, embedded: bool, plan: Allocation) -> SetDuplicates | None:
    similarity = part.repeat_similarity
    if similarity is None:
        return None

    def look(rows: np.ndarray) -> tuple[np.ndarray | None, Fingerprints]:
        prints = (np.array(gallery.take(name, rows), dtype=np.uint64) for name in ("hash", "digest"))
        vectors = np.stack(gallery.take("embedding", rows)).astype(np.float32) if embedded else None
        return vectors, Fingerprints(*prints)

    return SetDuplicates(look, similarity, find_pairs=partial(_pairs_in_tasks, plan=plan))


def _pairs_in_tasks(
    spans: Sequence[Span],
    embedding: np.ndarray,
    prints: Fingerprints,
    similarity: float,
    distance: int,
    plan: Allocation,
) -> Iterator[Pairs]:
    """On all machines: for a transfer set of 150,000 images, it is a product of 10^10 pairs."""
    work = partial(_pairs, similarity=similarity, distance=distance)
    found = dict(map_numbered(spans, work, plan, [embedding, prints]))
    return ((found[number]["i"], found[number]["j"]) for number in range(len(spans)))


def _pairs(span: Span, embedding: np.ndarray, prints: Fingerprints, similarity: float, distance: int) -> Rows:
    i, j = similar_pairs(span, embedding, prints, similarity, distance)
    return {"i": i, "j": j}


def _size(part: TransferConfig) -> int | None:
    """The requested size; the pipeline has replaced ``auto``."""
    assert part.size != "auto"
    return part.size
