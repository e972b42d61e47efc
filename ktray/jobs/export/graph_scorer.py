"""Open files of `ktray.jobs.export.served_graph`, of any format, for the comparison with the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ktray.errors import KtrayError
from ktray.jobs.export.predict import normalise
from ktray.models.student.classifier import Student

# One inference: (N, 3, height, width) to the outputs in order.
Session = Callable[[np.ndarray], Sequence[np.ndarray]]


class _GraphScorer:
    def __init__(self, session: Session, facts: dict[str, Any], file: str) -> None:
        self.session, self.facts, self.file = session, facts, file

    def run(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name."""
        names = self.facts["outputs"]
        found = [np.asarray(value) for value in self.session(np.ascontiguousarray(x))]
        if len(found) != len(names) or any(len(value) != len(x) for value in found):
            raise KtrayError(
                f"'{self.file}' returns {len(found)} outputs of shapes {[value.shape for value in found]} for "
                f"{len(x)} images, but its description has {', '.join(names)}",
                "Write the export again.",
            )
        return dict(zip(names, found, strict=True))


class LogitScorer(_GraphScorer):
    """A file that takes normalised images and returns logits; see `ktray.jobs.export.agreement.Scorer`."""

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Compute logits (N, ...) float32 of pixels (N, 3, height, width) uint8."""
        return self.run(normalise(pixels, self.facts["preprocess"]))["logits"]


class AnswerScorer(_GraphScorer):
    """A file that takes pixels and returns probabilities and decisions; see `ktray.jobs.export.agreement.Answering`."""

    def answers(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name of pixels (N, 3, height, width) uint8."""
        return self.run(pixels.astype(self.facts["input"]["dtype"]))

    def expected(self, student: Student, logits: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the same outputs in PyTorch from the student's logits (N, ...)."""
        with torch.inference_mode():
            named = student.answers(torch.from_numpy(logits), self.facts["temperature"], self.facts["threshold"])
        return {name: value.numpy() for name, value in named.items()}

    def as_logits(self, probabilities: np.ndarray) -> np.ndarray:
        """Logits (N, ...) float32 with these probabilities; those that are 0 or 1 in float32 become very small or very
        large ones."""
        p = np.clip(probabilities.astype(np.float64), np.finfo(np.float32).tiny, 1 - 2.0**-25)
        if "thresholds" in self.facts:  # independent classes
            return np.asarray(np.log(p) - np.log1p(-p), np.float32)
        return np.asarray(np.log(p) * self.facts["temperature"], np.float32)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Compute `as_logits` of pixels (N, 3, height, width) uint8."""
        return self.as_logits(self.answers(pixels)["probabilities"])
