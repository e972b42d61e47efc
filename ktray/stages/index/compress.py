"""The compressed index of a gallery: whether one is needed, how it is built, and how it is searched."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ktray.distributed.allocation import Allocation
from ktray.errors import KtrayError
from ktray.recipe.schema import GalleryConfig
from ktray.recipe.section import digest
from ktray.retrieval import faiss_index
from ktray.retrieval.search import Hits
from ktray.stages.index.gallery import Gallery, exact

logger = logging.getLogger("ktray")

# Above this number of rows, exact search takes longer than everything else that is done with the embeddings.
EXACT_ROWS = 100_000_000


def wanted(kind: str, rows: int) -> bool:
    """Whether ``gallery.search=KIND`` uses a compressed index for a gallery with this number of rows."""
    return kind == "compressed" or (kind == "auto" and rows > EXACT_ROWS)


def compress(part: GalleryConfig, gallery: Gallery, plan: Allocation) -> dict[str, Any]:
    """Build the compressed index unless it exists; returns the entry for the manifest
    (`ktray.retrieval.faiss_index.Compressed`).

    Raises:
        KtrayError: the index is not in a local folder, so it cannot be mapped into memory.
    """
    if not gallery.folder.is_local:
        raise KtrayError(
            f"gallery.search=compressed maps its index into memory, and '{gallery.folder.uri}' is not a local folder",
            "Set gallery.index to a folder that all nodes can read, or gallery.search=exact.",
        )
    read = vectors(gallery)
    dimensions = read(np.zeros(1, np.int64)).shape[1]
    factory = part.factory or faiss_index.choose_factory(gallery.total, dimensions, part.search_gb * 1e9)
    home = _home(gallery, factory)
    pieces = gallery.blocks()
    blocks = [(digest([p.name for p in piece.parts]), sum(p.rows for p in piece.parts)) for piece in pieces]
    key = digest(blocks)
    existing = faiss_index.saved(home)
    if existing is not None and existing.key == key:
        return asdict(existing)
    rng = np.random.default_rng(0)

    def sample(count: int) -> np.ndarray:
        count = min(faiss_index.sample_size(count, dimensions), gallery.total)
        return read(np.sort(rng.choice(gallery.total, count, replace=False)))

    index, trained_on = faiss_index.build(home, blocks, lambda number: pieces[number].embedding(), sample, factory)
    queries = sample(faiss_index.SAMPLE)
    truth: Callable[[int], Hits] = lambda k: exact(queries, gallery, k, plan)  # noqa: E731
    probes, recall = faiss_index.measured(index, queries, truth, read, part.recall)
    built = faiss_index.Compressed(factory, gallery.total, trained_on, probes, recall, key)
    faiss_index.save(home, built)
    recalls = ", ".join(f"{share:.1%} at {k}" for k, share in recall.items())
    logger.info(f"search    {factory}, {probes} cells per query: recall {recalls}")
    return asdict(built)


def nearest(entry: dict[str, Any], gallery: Gallery) -> Callable[[np.ndarray, int], Hits]:
    """A function from (queries, k) to hits, which searches the compressed index of a manifest."""
    index, read = faiss_index.load(_home(gallery, entry["factory"])), vectors(gallery)
    return lambda queries, k: faiss_index.search(index, queries, k, int(entry["probes"]), read)


def _home(gallery: Gallery, factory: str) -> Path:
    return Path(gallery.folder.path) / "search" / digest(factory)


def vectors(gallery: Gallery) -> Callable[[np.ndarray], np.ndarray]:
    """A function from gallery rows (n,) to their embeddings (n, D) float32."""
    return lambda rows: np.stack(gallery.take("embedding", rows)).astype(np.float32)
