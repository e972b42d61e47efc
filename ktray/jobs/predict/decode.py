"""The CPU part of a prediction: decode a shard into pieces of pixels that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ktray.data.preprocess import Preprocess
from ktray.data.sources.base import Shard
from ktray.data.sources.fetch import decode_image
from ktray.data.sources.shards import read_shard
from ktray.distributed.device_work import Item
from ktray.errors import BadImage
from ktray.stages.index.decode import PIECE_BYTES
from ktray.storage.columns import Rows


@dataclass(frozen=True)
class DecodeShard:
    """Reads a shard and yields its images in pieces of about `PIECE_BYTES`: ``uri``, ``pixels`` (N, 3, H, W) uint8 as
    the model expects them, ``bad`` (M, 2) text, and ``read`` (1,), the number of images that were read."""

    shards: list[Shard]
    preprocess: Preprocess
    max_pixels: int

    def __call__(self, item: Item) -> Iterator[Rows]:
        most = max(1, PIECE_BYTES // (3 * int(np.prod(self.preprocess.size))))
        uris: list[str] = []
        pixels: list[np.ndarray] = []
        bad: list[tuple[str, str]] = []
        for record in read_shard(self.shards[item["shard"]]):
            try:
                image = decode_image(record.uri, record.data, record.error, max_pixels=self.max_pixels)
            except BadImage as reason:
                bad.append((record.uri, reason.reason))
                continue
            if len(uris) == most:
                yield self._columns(uris, pixels, bad)
                uris, pixels, bad = [], [], []
            uris.append(record.uri)
            pixels.append(self.preprocess.eval_transform(image))
        yield self._columns(uris, pixels, bad)

    def _columns(self, uris: list[str], pixels: list[np.ndarray], bad: list[tuple[str, str]]) -> Rows:
        return {
            "uri": np.array(uris, dtype=str),
            "pixels": np.stack(pixels) if pixels else np.zeros((0, 3, *self.preprocess.size), np.uint8),
            "bad": np.array(bad, dtype=str).reshape(-1, 2),
            "read": np.array([len(uris) + len(bad)]),
        }
