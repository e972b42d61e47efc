"""Errors that a report shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WorstError:
    """A test image that the student got wrong: uint8 (H, W, 3), what it shows and what the student said, its confidence
    0..1 (or another fraction, which the report names), and where the image is."""

    image: np.ndarray
    true: str
    predicted: str
    confidence: float
    uri: str
