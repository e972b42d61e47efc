"""The CPU part of INDEX: decode a gallery shard into pieces of pixels and fingerprints that fit into memory.

Large JPEGs are decoded at a reduced size (`ktray.data.preprocess.Ample`): of a photo with 12 megapixels that takes a
fraction of the time. Where crops are candidates too, images keep their size, because crops are in its pixels; copies of
large held-out images are then found by their embedding and hash, not by their digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ktray.data.fingerprints import Small, fingerprint_small, shrink
from ktray.data.preprocess import Ample, Preprocess
from ktray.data.sources.base import Shard
from ktray.data.sources.fetch import decode_image, fetch
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.shards import read_shard
from ktray.data.sources.uris import ImageRef
from ktray.distributed.device_work import Item
from ktray.errors import BadImage
from ktray.retrieval.crops import Crops
from ktray.storage.columns import Rows

# Bytes of pixels in one piece, which goes to the device at once. Ray Data's blocks have this size, too; several copies
# of a piece exist at the same time.
PIECE_BYTES = 128_000_000
# Number of images in a piece with precomputed embeddings that are also decoded, to compare them with the teacher's.
CHECKED = 4


@dataclass(frozen=True)
class DecodeGallery:
    """Reads a shard and yields its images and crops in pieces of about `PIECE_BYTES`."""

    shards: list[Shard]
    preprocess: Preprocess | None
    crops: Crops
    max_pixels: int

    def __call__(self, item: Item) -> Iterator[Rows]:
        # Without an encoder, only fingerprints are kept, and the pixels of each image are released at once.
        image_bytes = 3 * int(np.prod(self.preprocess.size)) if self.preprocess else 3 * 256**2
        most = max(1, PIECE_BYTES // image_bytes)
        piece = _Piece(self.preprocess)
        enough = Ample() if self.crops.kind == "none" else None
        for record, vector in self._records(item):
            uri = record.uri
            try:
                image = decode_image(uri, record.data, record.error, max_pixels=self.max_pixels, enough=enough)
            except BadImage as reason:
                piece.read += 1
                piece.bad.append((uri, reason.reason))
                continue
            boxes = self.crops.boxes(uri, *image.shape[:2])
            if piece.uris and len(piece.uris) + 1 + len(boxes) > most:
                yield piece.columns()
                piece = _Piece(self.preprocess)
            piece.read += 1
            piece.add(uri, record.caption, image, vector, enough.whole if enough else None)
            for box in boxes:
                left, top, width, height = box
                cut = np.ascontiguousarray(image[top : top + height, left : left + width])
                piece.add(str(ImageRef.parse(uri).crop(box)), record.caption, cut)
        yield piece.columns()

    def _records(self, item: Item) -> Iterator[tuple[ImageRecord, np.ndarray | None]]:
        """The images, each with its precomputed embedding; None for an image without one."""
        if "shard" not in item:
            yield from ((ImageRecord(uri, data, error=error), None) for uri, data, error in fetch(item["uris"]))
            return
        shard = self.shards[item["shard"]]
        if shard.source.has_embeddings and self.preprocess:
            yield from shard.source.read_embedded(shard)
        else:
            yield from ((record, None) for record in read_shard(shard))


@dataclass
class _Piece:
    preprocess: Preprocess | None
    uris: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    small: list[Small] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    given: list[np.ndarray] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    read: int = 0

    def add(
        self,
        uri: str,
        caption: str | None,
        image: np.ndarray,
        vector: np.ndarray | None = None,
        whole: tuple[int, int] | None = None,
    ) -> None:
        self.uris.append(uri)
        self.captions.append(caption or "")
        self.small.append(shrink(image))
        if vector is not None:
            self.given.append(vector)
        if self.preprocess and len(self.given) <= CHECKED:
            self.pixels.append(self.preprocess.eval_transform(image, whole))

    def columns(self) -> Rows:
        prints = fingerprint_small(self.small)
        rows = {
            "uri": np.array(self.uris, dtype=str),
            "caption": np.array(self.captions, dtype=str),
            "hash": prints.hash,
            "digest": prints.digest,
            "bad": np.array(self.bad, dtype=str).reshape(-1, 2),
            "read": np.array([self.read]),
        }
        if self.preprocess:
            empty = np.zeros((0, 3, *self.preprocess.size), np.uint8)
            rows["pixels"] = np.stack(self.pixels) if self.pixels else empty
        if self.given:
            rows["given"] = np.stack(self.given)
        return rows
