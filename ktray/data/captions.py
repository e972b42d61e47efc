"""Captions as tokens, in a vocabulary as small as the captions need."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard

LIMIT = 77
LOOKED_AT = 256


def first_captions(gallery: Sequence[str] | str, column: str = "auto") -> list[str]:
    """The captions of a gallery's first `LOOKED_AT` images: enough to know whether there are any, and how long."""
    shards = gallery_shards(gallery, column, None)
    records = islice(read_shard(shards[0]), LOOKED_AT) if shards else []
    return [record.caption for record in records if record.caption]


def tokenise(captions: Sequence[str], limit: int = LIMIT) -> tuple[np.ndarray, int]:
    """CLIP's byte-pair tokens (arXiv 2103.00020, section 2.4), renumbered to those that occur.

    A text tower's table has a row a token: with the full 49,408 it would be most of a small tower's weights, and the
    optimizer would go over all of them at each step.

    Args:
        captions: N texts.
        limit: tokens that are kept of a caption, its end token included.

    Returns:
        (N, L) int32 with L the longest caption's tokens, and the number V of different ids: 0 is padding, and every
        caption ends with the highest one, V - 1.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    encoded: dict[str, list[int]] = {}
    for caption in captions:
        if caption not in encoded:
            encoded[caption] = tokenizer.encode(caption)[: limit - 1]
    known = {token: i for i, token in enumerate(sorted({t for tokens in encoded.values() for t in tokens}), 1)}
    end = len(known) + 1
    length = max((len(tokens) for tokens in encoded.values()), default=0) + 1
    out = np.zeros((len(captions), length), dtype=np.int32)
    for row, caption in enumerate(captions):
        ids = [known[token] for token in encoded[caption]]
        out[row, : len(ids) + 1] = [*ids, end]
    return out, end + 1
