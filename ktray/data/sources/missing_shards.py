"""Missing shards, by names such as ``train-00001-of-00002.parquet``, as Hugging Face and TensorFlow write them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice

_NAME = re.compile(r"(?P<before>.*?-?)(?P<number>\d{3,6})-of-(?P<count>\d{3,6})(?P<after>[^/]*)", re.DOTALL)
_NAMED = 3  # of a set, in the message
_HASH = re.compile(r"-[0-9a-f]{8,}(?=\.)")  # datasets once wrote one of the content behind the count


def missing_shards(paths: Iterable[str]) -> list[str]:
    """A sentence for each set of shards that is not whole, in the order of the names."""
    sets: dict[tuple[str, int, int, str], set[int]] = defaultdict(set)
    for path in paths:
        # Most of a million paths need no regular expression.
        if "-of-" in path and (match := _NAME.fullmatch(path)):
            key = (match["before"], int(match["count"]), len(match["count"]), _HASH.sub("", match["after"]))
            sets[key].add(int(match["number"]))
    notes = []
    for (before, count, width, after), there in sorted(sets.items()):
        lack = count - len(there)
        if lack <= 0:
            continue
        folder, _, stem = before.rpartition("/")
        first = 1 if count in there and 0 not in there else 0
        absent = (number for number in range(first, first + count) if number not in there)
        numbers = islice(absent, _NAMED)
        names = [f"{stem}{number:0{width}d}-of-{count:0{width}d}{after}" for number in numbers]
        more = f" and {lack - len(names):,} more" if lack > len(names) else ""
        missing = f"{', '.join(names)}{more}"
        notes.append(f"WARNING: {lack:,} of {count:,} shards are missing in '{folder}': {missing}.")
    return notes
