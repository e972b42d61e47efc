"""The errors that a report shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WorstError:
    """An error of the student on a test image.

    Attributes:
        image: (H, W, 3) uint8.
        true: name of the true class.
        predicted: name of the predicted class.
        confidence: the student's confidence, 0..1, or another fraction, which the report names.
        uri: address of the image.
    """

    image: np.ndarray
    true: str
    predicted: str
    confidence: float
    uri: str
