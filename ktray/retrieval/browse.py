"""A page to browse a transfer set with the queries that brought it; one file, opened offline."""

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
    """A query, or with an empty ``uri`` a draw without one.

    Attributes:
        uri: where it is.
        label: its class, a position in the page's list of classes; None where it has none.
        image: uint8 (H, W, 3), or None.
    """

    uri: str
    label: int | None
    image: np.ndarray | None


@dataclass(frozen=True)
class Match:
    """An image of the transfer set: ``image`` uint8 (H, W, 3), ``query`` its position in the list of queries,
    ``similarity`` its cosine, NaN without a query, and the ``strategies`` that take it."""

    uri: str
    query: int
    similarity: float
    image: np.ndarray
    strategies: tuple[str, ...] = ()


def choose(query: np.ndarray, most: int = MOST) -> np.ndarray:
    """Positions of at most ``most`` images to show, the first of each query first.

    Args:
        query: (n,) query of each image, -1 for none.
    """
    place = np.zeros(len(query), dtype=np.int64)
    seen: dict[int, int] = {}
    for i, q in enumerate(query.tolist()):
        place[i] = seen.get(q, 0)
        seen[q] = int(place[i]) + 1
    kept: np.ndarray = np.sort(np.lexsort((np.arange(len(query)), place))[:most])
    return kept


def page(title: str, subtitle: str, classes: Sequence[str], queries: Sequence[Query], images: Sequence[Match]) -> str:
    """The page as HTML: images by query, filtered by class, query, similarity, and which strategies take them."""
    data = {
        "classes": list(classes),
        "queries": [
            {"uri": q.uri, "class": q.label, "thumb": None if q.image is None else _thumbnail(q.image)} for q in queries
        ],
        "images": [
            {
                "uri": i.uri,
                "query": i.query,
                "similarity": float(i.similarity) if math.isfinite(i.similarity) else None,
                "strategies": i.strategies,
                "thumb": _thumbnail(i.image),
            }
            for i in images
        ],
    }
    # Inside of a script element nothing may look like its end.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = resources.files("ktray.retrieval").joinpath("browse.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(template).render(title=title, subtitle=subtitle, data=text)


def _thumbnail(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
