"""Crops of a gallery image: parts that may be on the task where the whole is not.

The paper retrieves crops of web images for small target sets (arXiv 2311.18237, figure on retrieval). The whole image
always stays a candidate too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ktray.data.sources.uris import Box
from ktray.data.views import ViewPolicy, make_view

# The random crops of ImageNet training with a larger smallest area: a crop must still show something.
_RANDOM = ViewPolicy(scale=(0.1, 0.6), hflip=0.0)


@dataclass(frozen=True)
class Crops:
    """Which crops an image has beside itself.

    Attributes:
        kind: ``none``; ``grid``: n x n equal cells, n the root of ``count``; ``random``: random resized crops of a
            tenth to six tenths of the area, the same ones for the same uri on any machine.
        count: crops of an image.
    """

    kind: Literal["none", "grid", "random"] = "none"
    count: int = 4

    def boxes(self, uri: str, height: int, width: int) -> list[Box]:
        """(left, top, width, height) of each crop; fewer where an image is too small to be divided."""
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
        """Rows of the index that an image may have."""
        return 1 if self.kind == "none" else 1 + self.count
