"""The gallery that INDEX has stored, and the search in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from ktray.data.fingerprints import Fingerprints
from ktray.distributed.allocation import Allocation
from ktray.distributed.ray_data import map_numbered
from ktray.distributed.watchdog import waiting_for
from ktray.recipe.choice import strategies
from ktray.retrieval.heldout_duplicates import (
    DuplicateTable,
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

# Hits per query, as a multiple of the query's share: other queries take some of them, and strategies choose among them.
CANDIDATES = 4
# Rows that are searched at once: about 200 MB in float32 at 512 dimensions; the queries take little memory in addition.
BLOCK_ROWS = 100_000
NO_ROWS = np.zeros(0, np.int64)
# Number of candidates (hits of all queries) up to which the other strategies run for comparison: a few seconds.
COMPARED = 200_000


class Gallery:
    """The parts of the index as one long table."""

    def __init__(self, folder: IndexDir, named: Sequence[tuple[str, int]]) -> None:
        """``named``: (name, rows) of the parts, in order."""
        self.folder = folder
        self.parts = [Part(name, rows, {}) for name, rows in named if rows]
        self.offsets: list[int] = np.concatenate([[0], np.cumsum([p.rows for p in self.parts], dtype=int)]).tolist()
        self.total = self.offsets[-1]

    @classmethod
    def of(cls, index: StageResult) -> Gallery:
        """The gallery of an INDEX stage. The folder of an index in the store is relative to the root of the store."""
        facts = cast(IndexManifest, index.manifest)
        folder = facts["folder"]
        if not folder.startswith("/") and "://" not in folder:
            folder = f"{index.stage.uri.rsplit('/', 3)[0]}/{folder}"
        return cls(IndexDir(folder), [(name, rows) for name, rows in facts["shards"]])

    def columns(self, column: str) -> list[np.ndarray]:
        return [rows[column] for rows in self.folder.rows_of(self.parts, [column])]

    def blocks(self) -> list[GalleryPart]:
        """The gallery in blocks of about `BLOCK_ROWS` rows."""
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
        """Values of a column (``embedding`` included) at the given rows (n,), in their order."""
        out: dict[int, Any] = {}
        shard = np.searchsorted(self.offsets, rows, side="right") - 1
        numbers = np.unique(shard).tolist()
        parts = [self.parts[number] for number in numbers]
        columns: Iterator[np.ndarray] = (
            self.folder.embeddings(parts)
            if column == "embedding"
            else (rows_of_part[column] for rows_of_part in self.folder.rows_of(parts, [column]))
        )
        for number, values in zip(numbers, columns, strict=True):
            for row in rows[shard == number].tolist():
                out[row] = values[row - self.offsets[number]]
        return [out[row] for row in rows.tolist()]

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings (n, D) float32 of the given rows (n,), in their order."""
        return np.stack(self.take("embedding", rows)).astype(np.float32)


@dataclass(frozen=True)
class GalleryPart:
    """Consecutive rows of a gallery. It is picklable, and reads its data on demand."""

    folder: IndexDir
    offset: int
    parts: tuple[Part, ...]

    def embedding(self) -> np.ndarray:
        """(rows, D) float16."""
        return np.concatenate(list(self.folder.embeddings(self.parts)))

    def prints(self) -> Fingerprints:
        read = list(self.folder.rows_of(self.parts, ["hash", "digest"]))
        hash_, digest = (np.concatenate([r[name] for r in read]).astype(np.uint64) for name in ("hash", "digest"))
        return Fingerprints(hash_, digest)

    def block(self) -> GalleryBlock:
        return GalleryBlock(self.offset, self.embedding(), self.prints())


def duplicates(
    gallery: Gallery, heldout: np.ndarray | None, prints: Fingerprints, similarity: float, plan: Allocation
) -> DuplicateTable:
    """Find the gallery images that are copies of held-out images.

    Args:
        heldout: (M, D) unit embeddings of the held-out images; None without an encoder.
        prints: fingerprints of the held-out images.
        similarity: cosine similarity from which a pair is compared by pixels.
    """
    work, tables = partial(_duplicates, similarity=similarity), []
    for rows in _of_blocks(gallery.blocks(), work, plan, [heldout, prints], "the search for copies"):
        reason, similar = rows.pop("reason").astype(str).tolist(), int(rows.pop("similar")[0])
        tables.append(DuplicateTable(**rows, reason=reason, similar=similar))
    return DuplicateTable.joined(tables)


def _of_blocks(
    blocks: Sequence[GalleryPart], work: Callable[..., Rows], plan: Allocation, shared: list[Any], what: str
) -> Iterator[Rows]:
    """What tasks find in each block. A million images take minutes on CPUs, so it says how far it is."""
    for done, (_, rows) in enumerate(map_numbered(blocks, work, plan, shared), 1):
        waiting_for(f"{what} ({done} of {len(blocks)} blocks of the gallery are done)")
        yield rows


def _duplicates(part: GalleryPart, heldout: np.ndarray | None, prints: Fingerprints, similarity: float) -> Rows:
    table = (
        hash_duplicates([(part.offset, part.prints())], prints)
        if heldout is None
        else near_duplicates([part.block()], heldout, prints, similarity=similarity)
    )
    columns = {name: getattr(table, name) for name in ("gallery", "heldout", "similarity", "distance")}
    return {**columns, "reason": np.array(table.reason, dtype=str), "similar": np.array([table.similar])}


def exact(queries: np.ndarray, gallery: Gallery, k: int, plan: Allocation) -> Hits:
    """`ktray.retrieval.search.search` over the whole gallery, with one task for each block."""
    hits: Hits | None = None
    for rows in _of_blocks(gallery.blocks(), partial(_search, k=k), plan, [queries], "the search for neighbours"):
        block_hits = rows["similarity"], rows["index"]
        hits = merge(hits, block_hits) if hits else block_hits
    assert hits is not None  # a gallery has rows
    return hits


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
    share: np.ndarray | None = None,
) -> Selection:
    """Choose ``size`` gallery images for the queries.

    Args:
        strategy: the strategy of ``transfer.strategy``.
        hits: a function from k to the k nearest gallery rows of each query.
        queries: number of queries.
        exclude: gallery rows that must not be chosen.
        predict: a function from unit embeddings to class probabilities, for a strategy with ``needs_predictions``.
        repeats: a function from chosen rows, in order, to those that are near-duplicates of an earlier one; they are
            replaced by other images.
        share: relative shares of the queries; None: equal shares.
    """
    total = gallery.total
    k = min(total, CANDIDATES * -(-size // queries) + 8)
    candidates = Candidates(*hits(k), gallery.embeddings, predict, share)
    while True:
        chosen = strategy.select(candidates, size, exclude)
        again = repeats(chosen.gallery) if repeats else NO_ROWS
        if len(again):
            exclude = np.union1d(exclude, again)
        # A larger search is worth its cost only while images are missing. If other queries have filled the share of a
        # query, coverage reports it; to fill that share, the whole gallery might be searched for a single query.
        elif not chosen.missing or not chosen.retry_k or k >= total:
            return chosen
        else:
            k = min(total, chosen.retry_k)
            candidates = Candidates(*hits(k), gallery.embeddings, predict, share)


def alternatives(
    size: int,
    hits: Hits,
    gallery: Gallery,
    exclude: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray] | None,
    own: StrategyConfig | None = None,
    share: np.ndarray | None = None,
) -> dict[str, Selection]:
    """By strategy, what it would choose among the same candidates, if it chose ``size`` images.

    Args:
        hits: the candidates.
        exclude, predict, share: as in `retrieve`; without ``predict``, strategies that need it are left out.
        own: the strategy that chose the transfer set; it takes part with its own keys.

    Returns:
        An empty dictionary if there are more than `COMPARED` candidates.
    """
    if int((hits[1] >= 0).sum()) > COMPARED:
        return {}
    candidates = Candidates(*hits, gallery.embeddings, predict, share)
    # A strategy of another package takes part only if it is chosen: what is stored must not depend on what is
    # installed.
    compared = {config.strategy_name(): config() for config in strategies() if config.compared}
    compared |= {own.name: own} if own else {}
    usable = {name: s for name, s in compared.items() if predict is not None or not s.needs_predictions}
    return {name: s.select(candidates, size, exclude) for name, s in usable.items()}


def agreement(
    chosen: Selection,
    hits: Hits,
    gallery: Gallery,
    exclude: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray] | None,
    own: StrategyConfig | None = None,
) -> dict[str, np.ndarray]:
    """By strategy, (n,) bool: whether it would also choose each chosen image. The arguments are as in
    `alternatives`."""
    others = alternatives(len(chosen), hits, gallery, exclude, predict, own)
    return {name: np.isin(chosen.gallery, other.gallery) for name, other in others.items()}
