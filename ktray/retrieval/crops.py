"""Crops of a gallery image: a part of an image may fit the task even if the whole image does not.

The paper retrieves crops of web images for small target sets (arXiv 2311.18237, figure on retrieval). The whole image
is always a candidate as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ktray.data.sources.uris import Box
from ktray.data.views import ViewPolicy, make_view

# The random crops of ImageNet training with a larger minimum area, so that a crop still has recognisable content.
_RANDOM = ViewPolicy(scale=(0.1, 0.6), hflip=0.0)


@dataclass(frozen=True)
class Crops:
    """Which crops of an image are candidates in addition to the whole image.

    Attributes:
        kind: ``none``; ``grid``: n x n equal cells, where n is the square root of ``count``; ``random``: random resized
            crops with 10% to 60% of the area, which are the same for the same uri on every machine.
        count: number of crops per image.
    """

    kind: Literal["none", "grid", "random"] = "none"
    count: int = 4

    def boxes(self, uri: str, height: int, width: int) -> list[Box]:
        """(left, top, width, height) of each crop; fewer if an image is too small to be divided."""
        if self.kind == "none":
            return []
        if self.kind == "grid":
            n = math.isqrt(self.count)
            xs = [round(i * width / n) for i in range(n + 1)]
            ys = [round(i * height / n) for i in range(n + 1)]
            cells = [(xs[i], ys[j], xs[i + 1] - xs[i], ys[j + 1] - ys[j]) for j in range(n) for i in range(n)]
        else:
            views = (make_view(_RANDOM, uri, number, 0, height, width) for number in range(self.count))
            cells = [(view.x, view.y, view.width, view.height) for view in views]
        whole = (0, 0, width, height)
        return list(dict.fromkeys(box for box in cells if box[2] and box[3] and box != whole))

    @property
    def most(self) -> int:
        """The maximum number of rows of the index per image."""
        return 1 if self.kind == "none" else 1 + self.count
