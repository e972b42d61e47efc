"""The candidates for labelling: unlabelled images without copies of labelled ones, with their embeddings.

They come from the gallery that INDEX has embedded, or, without a gallery, from the task's own images beyond the label
budget, which are embedded here. Validation and test images, and copies of them, are never candidates: their labels
would make a model learn what it is judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ktray.data.fingerprints import Fingerprints, fingerprint
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.preprocess import Ample, Preprocess
from ktray.data.sources.fetch import fetch_images
from ktray.data.sources.uris import ImageRef
from ktray.distributed.device_work import Item
from ktray.models.teacher.spec import TeacherSpec
from ktray.retrieval.heldout_duplicates import GalleryBlock, near_duplicates
from ktray.stages.base import Reporter, Runtime, StageResult
from ktray.stages.curate.heldout import embed_images
from ktray.stages.curate.stage import REPEATED
from ktray.stages.index.gallery import Gallery
from ktray.storage.columns import Rows, read_rows
from ktray.storage.store import Stage

T = TypeVar("T")

LOOKED = 2_000_000  # rows of a gallery whose addresses are in memory; of a larger gallery, a random draw is looked at


@dataclass(frozen=True)
class Pool:
    """Candidates.

    Attributes:
        uris: n images.
        embedding: (n, D) float32, of unit length, by the frozen teacher.
        prints: fingerprints with (n,) hashes.
        images: number of whole images that they were drawn from; at most `LOOKED` rows of a gallery are looked at.
        copies: number of images that were left out as labelled images or copies of them.
    """

    uris: list[str]
    embedding: np.ndarray
    prints: Fingerprints
    images: int
    copies: int

    def __len__(self) -> int:
        return len(self.uris)

    def without_copies(self, labelled: Rows, similarity: float) -> Pool:
        """The candidates that are no copies of labelled images.

        Args:
            labelled: the columns of `ktray.stages.curate.heldout.recognisable`.
            similarity: cosine similarity from which a pair is compared by pixels.
        """
        prints = Fingerprints(labelled["hash"], labelled["digest"])
        block = GalleryBlock(0, self.embedding, self.prints)
        found = near_duplicates([block], labelled["embedding"].astype(np.float32), prints, similarity=similarity)
        kept = np.setdiff1d(np.arange(len(self)), found.gallery)
        return Pool(
            [self.uris[i] for i in kept.tolist()],
            self.embedding[kept],
            Fingerprints(self.prints.hash[kept], self.prints.digest[kept]),
            self.images,
            self.copies + len(found),
        )


def labelled_uris(task: LabelledSet) -> set[str]:
    """The images of all splits."""
    return {example.uri for split in (task.train, task.val, task.test) for example in split}


def of_gallery(index: StageResult, curated: StageResult, task: LabelledSet, most: int, seed: int) -> Pool:
    """Whole images of the gallery; at most ``most`` of them, which are then a random draw.

    Args:
        index: the INDEX stage, with embeddings.
        curated: the CURATE stage, which has found the copies of held-out images.
        task: the labelled images, which are no candidates.
    """
    gallery = Gallery.of(index)
    looked = np.arange(gallery.total)
    if gallery.total > LOOKED:
        looked = np.sort(np.random.default_rng(seed).choice(gallery.total, LOOKED, replace=False))
    uris = [str(uri) for uri in gallery.take("uri", looked)]
    dropped = read_rows(curated.stage, "dropped.parquet", ["uri", "reason"])
    reasons = zip(dropped["uri"].astype(str).tolist(), dropped["reason"].astype(str).tolist(), strict=True)
    taken = labelled_uris(task) | {uri for uri, reason in reasons if reason != REPEATED}
    whole = [i for i, uri in enumerate(uris) if not _is_crop(uri)]
    free = [i for i in whole if uris[i] not in taken]
    chosen = drawn(free, most, seed)
    rows = looked[chosen] if chosen else looked[:0]
    hash_, digest = (np.array(gallery.take(name, rows), dtype=np.uint64) for name in ("hash", "digest"))
    embedding = gallery.embeddings(rows) if len(rows) else np.zeros((0, 0), np.float32)
    prints = Fingerprints(hash_, digest)
    return Pool([uris[i] for i in chosen], embedding, prints, len(whole), len(whole) - len(free))


def of_task(
    task: LabelledSet,
    encoder: TeacherSpec,
    most: int,
    seed: int,
    max_pixels: int,
    runtime: Runtime,
    folder: Stage,
    reporter: Reporter,
) -> Pool:
    """The images beyond the label budget (`LabelledSet.unlabeled`); at most ``most`` of them, as in `of_gallery`.

    Args:
        folder: where their embeddings are stored.
    """
    labelled = labelled_uris(task)
    free = [uri for uri in task.unlabeled if uri not in labelled]
    chosen = drawn(free, most, seed)
    if not chosen:
        none = np.zeros(0, np.uint64)
        return Pool([], np.zeros((0, encoder.embed_dim), np.float32), Fingerprints(none, none), 0, 0)
    rows = embed_images(runtime, folder, chosen, _Plain(encoder.preprocess, max_pixels), encoder, reporter)
    prints = Fingerprints(rows["hash"], rows["digest"])
    return Pool(rows["uri"].astype(str).tolist(), rows["embedding"].astype(np.float32), prints, len(free), 0)


def drawn(items: Sequence[T], most: int, seed: int) -> list[T]:
    """All items, or a random draw of ``most`` of them, in their order."""
    if len(items) <= most:
        return list(items)
    rows = np.random.default_rng(seed).permutation(len(items))[:most]
    return [items[i] for i in np.sort(rows).tolist()]


def _is_crop(uri: str) -> bool:
    return "xywh=" in uri and ImageRef.parse(uri).box is not None


@dataclass(frozen=True)
class _Plain:
    """Decodes images as INDEX does: ``uri``, ``hash``, ``digest`` and ``pixels``."""

    preprocess: Preprocess
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        uris, images, wholes, enough = [], [], [], Ample()
        for uri, image, _ in fetch_images(item["uris"], max_pixels=self.max_pixels, enough=enough):
            if image is not None:  # what cannot be decoded cannot be labelled
                uris.append(uri)
                images.append(image)
                wholes.append(enough.whole)
        prints = fingerprint(images)
        pixels = [self.preprocess.eval_transform(*pair) for pair in zip(images, wholes, strict=True)]
        return {
            "uri": np.array(uris, dtype=str),
            "hash": prints.hash,
            "digest": prints.digest,
            "pixels": np.stack(pixels) if pixels else np.zeros((0, 3, *self.preprocess.size), np.uint8),
        }
