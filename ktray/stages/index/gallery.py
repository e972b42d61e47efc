"""The gallery as INDEX left it, and what the queries find in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from ktray.distributed.allocation import Allocation
from ktray.distributed.ray_data import map_numbered
from ktray.recipe.choice import strategies
from ktray.retrieval.heldout_duplicates import (
    DuplicateTable,
    Fingerprints,
    GalleryBlock,
    hash_duplicates,
    near_duplicates,
)
from ktray.retrieval.index_dir import IndexDir, Part
from ktray.retrieval.search import Hits, merge, search
from ktray.retrieval.select import Selection
from ktray.retrieval.strategies.base import Candidates, StrategyConfig
from ktray.stages.base import StageResult
from ktray.stages.manifests import IndexManifest
from ktray.storage.columns import Rows

# Hits a query, for each image of its share: those that others have taken first, and what a strategy may choose among.
CANDIDATES = 4
# Rows that are searched at once: in float32 some 200 MB at 512 dimensions, beside which the queries' share is small.
BLOCK_ROWS = 100_000
NO_ROWS = np.zeros(0, np.int64)
# Candidates (hits of all queries) up to which a set is held against the other strategies' choices: some seconds.
COMPARED = 200_000


class Gallery:
    """The index's parts as one long table."""

    def __init__(self, folder: IndexDir, named: Sequence[tuple[str, int]]) -> None:
        """``named``: parts and their rows, in order."""
        self.folder = folder
        self.parts = [Part(name, rows, {}) for name, rows in named if rows]
        self.offsets: list[int] = np.concatenate([[0], np.cumsum([p.rows for p in self.parts], dtype=int)]).tolist()
        self.total = self.offsets[-1]

    @classmethod
    def of(cls, index: StageResult) -> Gallery:
        """The gallery of INDEX's directory; an index in the store is named from the store's root."""
        facts = cast(IndexManifest, index.manifest)
        folder = facts["folder"]
        if not folder.startswith("/") and "://" not in folder:
            folder = f"{index.stage.uri.rsplit('/', 3)[0]}/{folder}"
        return cls(IndexDir(folder), [(name, rows) for name, rows in facts["shards"]])

    def columns(self, column: str) -> list[np.ndarray]:
        return [self.folder.rows(part, [column])[column] for part in self.parts]

    def blocks(self) -> list[GalleryPart]:
        """The gallery in pieces of about `BLOCK_ROWS`."""
        groups: list[list[int]] = []
        rows = BLOCK_ROWS
        for number, part in enumerate(self.parts):
            if rows + part.rows > BLOCK_ROWS:
                groups.append([])
                rows = 0
            groups[-1].append(number)
            rows += part.rows
        return [
            GalleryPart(self.folder, self.offsets[group[0]], tuple(self.parts[n] for n in group)) for group in groups
        ]

    def take(self, column: str, rows: np.ndarray) -> list[Any]:
        """A column's values of some rows, in their order; ``embedding`` is one of them."""
        out: dict[int, Any] = {}
        shard = np.searchsorted(self.offsets, rows, side="right") - 1
        for number in np.unique(shard).tolist():
            part = self.parts[number]
            embedded = column == "embedding"
            values = self.folder.embedding(part) if embedded else self.folder.rows(part, [column])[column]
            for row in rows[shard == number].tolist():
                out[row] = values[row - self.offsets[number]]
        return [out[row] for row in rows.tolist()]

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 of some rows, in their order."""
        return np.stack(self.take("embedding", rows)).astype(np.float32)


@dataclass(frozen=True)
class GalleryPart:
    """Consecutive rows of a gallery. Picklable; reads when it is asked."""

    folder: IndexDir
    offset: int
    parts: tuple[Part, ...]

    def embedding(self) -> np.ndarray:
        """(rows, D) float16."""
        return np.concatenate([self.folder.embedding(part) for part in self.parts])

    def prints(self) -> Fingerprints:
        read = [self.folder.rows(part, ["hash", "digest"]) for part in self.parts]
        hash_, digest = (np.concatenate([r[name] for r in read]).astype(np.uint64) for name in ("hash", "digest"))
        return Fingerprints(hash_, digest)

    def block(self) -> GalleryBlock:
        return GalleryBlock(self.offset, self.embedding(), self.prints())


def duplicates(
    gallery: Gallery, heldout: np.ndarray | None, prints: Fingerprints, similarity: float, plan: Allocation
) -> DuplicateTable:
    """The gallery's copies of held-out images; ``heldout`` (M, D) unit embeddings, None where there is no encoder."""
    work = partial(_duplicates, heldout=heldout, prints=prints, similarity=similarity)
    found = []
    for _, rows in map_numbered(gallery.blocks(), work, plan):
        reason, similar = rows.pop("reason").astype(str).tolist(), int(rows.pop("similar")[0])
        found.append(DuplicateTable(**rows, reason=reason, similar=similar))
    return DuplicateTable.joined(found)


def _duplicates(part: GalleryPart, heldout: np.ndarray | None, prints: Fingerprints, similarity: float) -> Rows:
    found = (
        hash_duplicates([(part.offset, part.prints())], prints)
        if heldout is None
        else near_duplicates([part.block()], heldout, prints, similarity=similarity)
    )
    columns = {name: getattr(found, name) for name in ("gallery", "heldout", "similarity", "distance")}
    return {**columns, "reason": np.array(found.reason, dtype=str), "similar": np.array([found.similar])}


def exact(queries: np.ndarray, gallery: Gallery, k: int, plan: Allocation) -> Hits:
    """`ktray.retrieval.search.search` over the whole gallery, a task for each block."""
    found: Hits | None = None
    for _, rows in map_numbered(gallery.blocks(), partial(_search, queries=queries, k=k), plan):
        more = rows["similarity"], rows["index"]
        found = merge(found, more) if found else more
    assert found is not None  # a gallery has rows
    return found


def _search(part: GalleryPart, queries: np.ndarray, k: int) -> Rows:
    similarity, index = search(queries, [(part.offset, part.embedding())], k)
    return {"similarity": similarity, "index": index}


def retrieve(
    strategy: StrategyConfig,
    hits: Callable[[int], Hits],
    queries: int,
    gallery: Gallery,
    size: int,
    exclude: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray] | None = None,
    repeats: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Selection:
    """``size`` gallery images for the queries.

    Args:
        strategy: of ``transfer.strategy``.
        hits: k to the k nearest of each query.
        queries: how many they are.
        exclude: gallery rows that must not be taken.
        predict: unit embeddings to class probabilities, for a strategy with ``needs_predictions``.
        repeats: of chosen rows, in their order, those that show what an earlier one shows; others take their places.
    """
    total = gallery.total
    k = min(total, CANDIDATES * -(-size // queries) + 8)
    candidates = Candidates(*hits(k), gallery.embeddings, predict)
    while True:
        chosen = strategy.select(candidates, size, exclude)
        again = repeats(chosen.gallery) if repeats else NO_ROWS
        if len(again):
            exclude = np.union1d(exclude, again)
        # Searching on is only worth it while images are missing: a shortfall that other queries filled is told
        # by coverage, and chasing it would search the whole gallery for the odd query.
        elif not chosen.missing or not chosen.retry_k or k >= total:
            return chosen
        else:
            k = min(total, chosen.retry_k)
            candidates = Candidates(*hits(k), gallery.embeddings, predict)


def agreement(
    chosen: Selection,
    found: Hits,
    gallery: Gallery,
    exclude: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray] | None,
    own: StrategyConfig | None = None,
) -> dict[str, np.ndarray]:
    """By strategy, (n,) whether it takes each chosen image too, of the same candidates and as many in all.

    Args:
        found: the candidates.
        exclude, predict: as for `retrieve`; without ``predict`` the strategies that need it are left out.
        own: the strategy that has chosen; held against the others with its own keys.

    Returns:
        Nothing where there are more than `COMPARED` candidates.
    """
    if found[1].size > COMPARED:
        return {}
    candidates = Candidates(*found, gallery.embeddings, predict)
    # Those of other packages only where they are chosen: what is stored must not depend on what else is installed.
    asked = {config.strategy_name(): config() for config in strategies() if config.compared}
    asked |= {own.name: own} if own else {}
    able = {name: one for name, one in asked.items() if predict is not None or not one.needs_predictions}
    others = {name: one.select(candidates, len(chosen), exclude).gallery for name, one in able.items()}
    return {name: np.isin(chosen.gallery, taken) for name, taken in others.items()}
