"""A page to browse a transfer set together with its queries: one HTML file that needs no network."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
import numpy as np
from PIL import Image

MOST = 3_000  # images on the page: about 6 MB
SIDE = 72


@dataclass(frozen=True)
class Query:
    """A query. An empty ``uri`` stands for a random draw without a query.

    Attributes:
        uri: where the query image is.
        label: the class of the query, as a position in the page's list of classes; None if it has no class.
        image: uint8 (H, W, 3), or None.
    """

    uri: str
    label: int | None
    image: np.ndarray | None


@dataclass(frozen=True)
class Match:
    """An image of the transfer set.

    Attributes:
        uri: where the image is.
        query: position of its query in the page's list of queries.
        similarity: cosine similarity to the query; NaN without a query.
        image: uint8 (H, W, 3).
        strategies: names of the strategies that select the image.
    """

    uri: str
    query: int
    similarity: float
    image: np.ndarray
    strategies: tuple[str, ...] = ()


def choose(query: np.ndarray, most: int = MOST) -> np.ndarray:
    """Positions of at most ``most`` images to show; the best-ranked images of all queries have priority.

    Args:
        query: (n,) query of each image; -1 if the image has no query.
    """
    rank = np.zeros(len(query), dtype=np.int64)
    counts: dict[int, int] = {}
    for i, q in enumerate(query.tolist()):
        rank[i] = counts.get(q, 0)
        counts[q] = int(rank[i]) + 1
    kept: np.ndarray = np.sort(np.lexsort((np.arange(len(query)), rank))[:most])
    return kept


def page(
    title: str,
    subtitle: str,
    classes: Sequence[str],
    queries: Sequence[Query],
    images: Sequence[Match],
    figures: str = "",
) -> str:
    """The page as HTML: images grouped by query, with filters for class, query, similarity and strategy.

    Args:
        figures: HTML above the images, which is inserted as it is (`ktray.reporting.transfer_set.on_task_html`).
    """
    data = {
        "classes": list(classes),
        "queries": [
            {"uri": q.uri, "class": q.label, "thumb": None if q.image is None else thumbnail(q.image)} for q in queries
        ],
        "images": [
            {
                "uri": i.uri,
                "query": i.query,
                "similarity": float(i.similarity) if math.isfinite(i.similarity) else None,
                "strategies": i.strategies,
                "thumb": thumbnail(i.image),
            }
            for i in images
        ],
    }
    # The data must not contain anything that looks like the end of the script element.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = resources.files("ktray.retrieval").joinpath("browse.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(template).render(title=title, subtitle=subtitle, data=text, figures=figures)


def thumbnail(image: np.ndarray) -> str:
    """A JPEG of at most `SIDE` pixels a side, in base64, of an image uint8 (H, W, 3)."""
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
