"""What the queries brought: how evenly, for which classes, and how near."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ktray.retrieval.select import Selection

BINS = 20


def coverage(chosen: Selection, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """JSON-like counts of a selection that queries made.

    ``queries``: how many there are, how many brought nothing, and the fewest, the median and the most that one brought;
    ``share``: images that each would have at an equal share. ``classes``: by name the queries, the images that they
    brought, and their mean similarity (None without images). ``similarity``: ``edges`` (BINS + 1) and ``counts`` (BINS)
    of a histogram over what was found.

    Args:
        labels: (Q,) class of each query.
        classes: names in the order of the labels; none where a query has no class.
    """
    brought = np.bincount(chosen.query, minlength=len(labels))
    of_each = labels[chosen.query]
    found = {}
    for number, name in enumerate(classes):
        own = chosen.similarity[of_each == number]
        found[name] = {
            "queries": int((labels == number).sum()),
            "images": len(own),
            "similarity": float(own.mean()) if len(own) else None,
        }
    counts, edges = np.histogram(chosen.similarity, bins=BINS)
    return {
        "queries": {
            "count": len(labels),
            "empty": int((brought == 0).sum()),
            "least": int(brought.min()),
            "median": float(np.median(brought)),
            "most": int(brought.max()),
        },
        "share": len(chosen) / max(1, len(labels)),
        "classes": found,
        "similarity": {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]},
    }


def lines(found: dict[str, Any], widest: int = 10) -> list[str]:
    """The coverage in a few lines for a person: queries, the classes with the fewest images, similarities."""
    q = found["queries"]
    out = [
        f"{q['count']:,} queries brought {q['least']} to {q['most']} images each (median {q['median']:g}, "
        f"an equal share is {found['share']:.1f}); {q['empty']} brought none"
    ]
    ordered = sorted(found["classes"].items(), key=lambda item: item[1]["images"])
    shown = ", ".join(f"{name} {one['images']}" for name, one in ordered[:widest])
    more = f" and {len(ordered) - widest} classes with more" if len(ordered) > widest else ""
    if shown:
        out.append(f"images by the queries' class, fewest first: {shown}{more}")
    counts, edges = np.array(found["similarity"]["counts"]), np.array(found["similarity"]["edges"])
    if counts.sum():
        reached = np.cumsum(counts) / counts.sum()
        low, middle, high = (float(edges[1 + int(np.searchsorted(reached, part))]) for part in (0.05, 0.5, 0.95))
        out.append(f"cosine to the query: 5% up to {low:.2f}, half up to {middle:.2f}, 95% up to {high:.2f}")
    return out
