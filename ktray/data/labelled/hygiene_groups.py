"""Images that belong together: copies of each other, and the groups of the user (``task.group``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ktray.data.labelled.rows import LabelledRow, count, three

Pairs = Sequence[tuple[str, str]]  # uris of two images that show the same


def units(rows: Sequence[LabelledRow], copies: Pairs, *, groups: bool) -> dict[str, int]:
    """By uri, the number of the unit of each row: the rows that are connected by pairs of copies, or by a group.

    Args:
        copies: pairs of uris; pairs with an image that is in no row are ignored.
        groups: whether the rows of one group (`LabelledRow.group`) are connected.
    """
    from scipy.sparse import coo_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    place = {row.uri: i for i, row in enumerate(rows)}
    edges = [(place[a], place[b]) for a, b in copies if a in place and b in place]
    if groups:
        first: dict[str, int] = {}
        edges += [(first.setdefault(row.group, i), i) for i, row in enumerate(rows) if row.group]
    if not edges:
        return place
    a, b = np.array(edges, dtype=np.int64).T
    _, number = connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(len(rows),) * 2), directed=False)
    return {row.uri: int(n) for row, n in zip(rows, number, strict=True)}


def torn_groups(members: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The groups that have members in more than one of train, val and test, each with these splits.

    Args:
        members: group and split of each image. An empty group is none; the split ``pool`` is part of train.
    """
    splits: dict[str, set[str]] = defaultdict(set)
    for group, split in members:
        if group:
            splits[group].add("train" if split == "pool" else split)
    return {group: sorted(found) for group, found in sorted(splits.items()) if len(found) > 1}


def in_words(torn: Mapping[str, Sequence[str]]) -> str:
    """A sentence about the result of `torn_groups`."""
    named = [f"{group} ({', '.join(splits)})" for group, splits in torn.items()]
    return (
        f"{count(torn, 'group')} {'is' if len(torn) == 1 else 'are'} in more than one split: {three(named)}. Images of "
        "one group are not independent, so that validation and test may be too good."
    )
