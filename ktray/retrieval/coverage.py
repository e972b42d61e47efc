"""Coverage of a transfer set: how many images each query and each class contributed, and how similar they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ktray.retrieval.select import Selection

BINS = 20


def coverage(chosen: Selection, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Counts of a selection that was made with queries, as JSON values.

    ``queries``: the number of queries, the number of queries that contributed no image, and the minimum, median and
    maximum of images per query; ``share``: images per query if all queries had equal shares. ``classes``: for each
    class name the number of queries, the number of images that they contributed, and the mean similarity of these
    images (None without images). ``similarity``: ``edges`` (BINS + 1) and ``counts`` (BINS) of a histogram over the
    similarities of all selected images.

    Args:
        labels: (Q,) class of each query, or (Q, C), not 0 for each class of a query.
        classes: class names in the order of the labels; empty if queries have no class.
    """
    images_per_query = np.bincount(chosen.query, minlength=len(labels))
    member = labels > 0 if labels.ndim > 1 else labels[:, None] == np.arange(len(classes))
    per_class = {}
    for number, name in enumerate(classes):
        similarities = chosen.similarity[member[chosen.query, number]]
        per_class[name] = {
            "queries": int(member[:, number].sum()),
            "images": len(similarities),
            "similarity": float(similarities.mean()) if len(similarities) else None,
        }
    counts, edges = np.histogram(chosen.similarity, bins=BINS)
    return {
        "queries": {
            "count": len(labels),
            "empty": int((images_per_query == 0).sum()),
            "least": int(images_per_query.min()),
            "median": float(np.median(images_per_query)),
            "most": int(images_per_query.max()),
        },
        "share": len(chosen) / max(1, len(labels)),
        "classes": per_class,
        "similarity": {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]},
    }


def lines(counted: dict[str, Any], widest: int = 10) -> list[str]:
    """The coverage as a few lines of text: queries, the classes with the fewest images, similarities."""
    q = counted["queries"]
    text = [
        f"{q['count']:,} queries contributed {q['least']} to {q['most']} images each (median {q['median']:g}, "
        f"an equal share is {counted['share']:.1f}); {q['empty']} contributed none"
    ]
    ordered = sorted(counted["classes"].items(), key=lambda item: item[1]["images"])
    shown = ", ".join(f"{name} {row['images']}" for name, row in ordered[:widest])
    more = f" and {len(ordered) - widest} classes with more images" if len(ordered) > widest else ""
    if shown:
        text.append(f"images per class of the queries, fewest first: {shown}{more}")
    counts, edges = np.array(counted["similarity"]["counts"]), np.array(counted["similarity"]["edges"])
    if counts.sum():
        cumulative = np.cumsum(counts) / counts.sum()
        low, middle, high = (
            float(edges[1 + int(np.searchsorted(cumulative, quantile))]) for quantile in (0.05, 0.5, 0.95)
        )
        text.append(
            f"cosine similarity to the query: 5% at most {low:.2f}, median {middle:.2f}, 95% at most {high:.2f}"
        )
    return text
