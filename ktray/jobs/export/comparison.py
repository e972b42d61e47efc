"""The comparison of two models' outputs for the same images, batch after batch."""

from __future__ import annotations

from typing import Any

import numpy as np


class Comparison:
    """Adds up the differences between a reference and another model; memory does not grow with the images."""

    def __init__(self) -> None:
        self._images = self._differs = self._decisions = self._decisions_differ = 0
        self._largest = self._difference = self._margin = 0.0

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Compare the outputs (N, C) or (N, C, h, w) of one batch of N > 0 images.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != other.shape:
            raise ValueError(f"outputs of shape {other.shape} instead of {reference.shape}")
        gap = float(np.abs(reference - other).max())
        # `max` would forget a NaN in its second argument.
        self._difference = gap if not gap <= self._difference else self._difference
        self._largest = max(self._largest, float(np.abs(reference).max()))
        different = reference.argmax(1) != other.argmax(1)
        self._images += len(reference)
        self._differs += int(different.reshape(len(reference), -1).any(1).sum())
        if different.any():
            top = np.sort(np.moveaxis(reference, 1, -1)[different], axis=-1)[:, -2:]
            self._margin = max(self._margin, float((top[:, -1] - top[:, 0]).max()))

    def decided(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Compare decisions, integers of any shape: classes of images or pixels, or sets of classes.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != other.shape:
            raise ValueError(f"decisions of shape {other.shape} instead of {reference.shape}")
        self._decisions += reference.size
        self._decisions_differ += int((reference != other).sum())

    def facts(self) -> dict[str, Any]:
        """Return the comparison of all batches.

        Returns:
            ``images``; ``max_difference`` of the outputs; ``largest_logit``, the largest output of the reference, as a
            scale for it; ``top1_equal``, the share of images with the same most probable class (at every position, if
            the outputs are maps); ``top1_differs``, the number of the other images; ``widest_margin``, the largest
            distance between the reference's two largest outputs where the classes differ. After `decided`,
            ``decisions``, their number, and ``decisions_differ``.
        """
        facts = {
            "images": self._images,
            "max_difference": self._difference,
            "largest_logit": self._largest,
            "top1_equal": 1 - self._differs / self._images if self._images else 1.0,
            "top1_differs": self._differs,
            "widest_margin": self._margin,
        }
        if self._decisions:
            facts |= {"decisions": self._decisions, "decisions_differ": self._decisions_differ}
        return facts
