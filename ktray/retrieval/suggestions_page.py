"""A page with the images that are suggested for labelling: one HTML file without scripts that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
import numpy as np

from ktray.retrieval.browse import thumbnail

MOST = 1_000  # images on the page: about 2 MB


@dataclass(frozen=True)
class Suggested:
    """A suggested image.

    Attributes:
        rank: 1 for the first.
        uri: where the image is.
        suggested: the class that the teacher predicts, with this ``probability``.
        distance: of the teacher's probabilities to those of the nearest labelled image or image of a higher rank.
        disagreement: of student and teacher, 0..1; NaN without a student.
    """

    rank: int
    uri: str
    suggested: str
    probability: float
    distance: float
    disagreement: float

    @property
    def values(self) -> tuple[float, float, float]:
        return self.probability, self.distance, self.disagreement


def page(task: str, listed: Sequence[Suggested], images: Mapping[str, np.ndarray]) -> str:
    """The page as HTML, in the order of the ranks.

    Args:
        task: name of the task.
        listed: all suggestions; the page has the first `MOST` of them.
        images: by uri, uint8 (H, W, 3); an image that is missing is named only.
    """
    cards = [
        {
            "one": one,
            "thumb": thumbnail(images[one.uri]) if one.uri in images else None,
            "disagreement": one.disagreement if math.isfinite(one.disagreement) else None,
        }
        for one in listed[:MOST]
    ]
    template = resources.files("ktray.retrieval").joinpath("suggestions.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(task=task, cards=cards, total=len(listed))
