"""Captions as tokens, with a vocabulary of only the tokens that occur."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard

LIMIT = 77
LOOKED_AT = 256


def first_captions(gallery: Sequence[str] | str, column: str = "auto") -> list[str]:
    """The captions of the first `LOOKED_AT` images of a gallery, which show whether it has captions and how long."""
    shards = gallery_shards(gallery, column, None)
    records = islice(read_shard(shards[0]), LOOKED_AT) if shards else []
    return [record.caption for record in records if record.caption]


def tokenise(captions: Sequence[str], limit: int = LIMIT) -> tuple[np.ndarray, int]:
    """CLIP's byte-pair tokens (arXiv 2103.00020, section 2.4), renumbered so that only the tokens that occur have ids.

    The embedding table of a text tower has one row per token. With all 49,408 tokens it would be most of the weights of
    a small tower, and the optimizer would update all rows at each step.

    Args:
        captions: N texts.
        limit: maximum number of tokens per caption, including its end token.

    Returns:
        Tokens (N, L) int32, where L is the number of tokens of the longest caption, and the number V of distinct ids:
        0 is padding, and every caption ends with the highest id, V - 1.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    encoded: dict[str, list[int]] = {}
    for caption in captions:
        if caption not in encoded:
            encoded[caption] = tokenizer.encode(caption)[: limit - 1]
    new_ids = {token: i for i, token in enumerate(sorted({t for tokens in encoded.values() for t in tokens}), 1)}
    end = len(new_ids) + 1
    length = max((len(tokens) for tokens in encoded.values()), default=0) + 1
    out = np.zeros((len(captions), length), dtype=np.int32)
    for row, caption in enumerate(captions):
        ids = [new_ids[token] for token in encoded[caption]]
        out[row, : len(ids) + 1] = [*ids, end]
    return out, end + 1
