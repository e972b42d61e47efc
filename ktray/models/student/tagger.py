"""Students for sets of classes: each output is a class with a probability and a threshold of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ktray.errors import KtrayError
from ktray.models.messages import cause
from ktray.models.student.classifier import Student
from ktray.models.student.classifier_io import load_student, save_student

FILE, _FORMAT = "multilabel.json", 1
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Tags:
    """The classes of one image, most probable first, and the probabilities of all classes."""

    labels: list[str]
    probabilities: dict[str, float]


class Tagger(Student):
    """A timm classifier whose outputs are independent.

    Attributes:
        thresholds: the probabilities from which an image has a class, in the order of the outputs. They are chosen on
            validation; until then they are one half.
    """

    thresholds: list[float]

    @classmethod
    def of(cls, student: Student, thresholds: Sequence[float] | None = None) -> Tagger:
        """The student with thresholds. It shares the model."""
        tagger = cls(student.model, student.name, student.kwargs, student.preprocess, student.classes, student.warnings)
        outputs = len(student.classes)
        tagger.thresholds = [DEFAULT_THRESHOLD] * outputs if thresholds is None else list(thresholds)
        return tagger

    def answers(self, out: torch.Tensor, temperature: float, threshold: float) -> dict[str, torch.Tensor]:
        """``probabilities`` (N, C) float32 and ``labels`` (N, C) int32, 1 for each class whose probability reaches the
        threshold of the class. Temperature and common threshold do not apply."""
        probabilities = out.sigmoid()
        needed = torch.tensor(self.thresholds, dtype=probabilities.dtype, device=out.device)
        return {"probabilities": probabilities, "labels": (probabilities >= needed).to(torch.int32)}

    def decide(self, logits: torch.Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Any]:
        """A `Tags` for each image, from logits (N, C)."""
        return [self._tags(row) for row in logits.double().sigmoid().tolist()]

    def _tags(self, probabilities: list[float]) -> Tags:
        named = dict(zip(self.classes, probabilities, strict=True))
        passed = [n for (n, p), least in zip(named.items(), self.thresholds, strict=True) if p >= least]
        return Tags(sorted(passed, key=lambda name: -named[name]), named)

    def served_facts(self) -> dict[str, Any]:
        return {**super().served_facts(), "thresholds": self.thresholds}


def save_tagger(student: Tagger, directory: str | Path, classes: Sequence[str]) -> None:
    """Write the files of `ktray.models.student.classifier_io.save_student`, which timm can load, and
    ``multilabel.json`` with the thresholds."""
    save_student(student, directory, classes)
    facts = {"format": _FORMAT, "thresholds": dict(zip(classes, student.thresholds, strict=True))}
    (Path(directory) / FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")


def load_tagger(directory: str | Path, device: str | torch.device = "cpu") -> Tagger:
    """Load a student that `save_tagger` wrote, in evaluation mode.

    Raises:
        KtrayError: the folder contains no such student, or its weights are damaged or do not fit.
    """
    folder = Path(directory)
    student = load_student(folder, device)
    try:
        named = json.loads((folder / FILE).read_text(encoding="utf-8"))["thresholds"]
        thresholds = [float(named[name]) for name in student.classes]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KtrayError(
            f"'{folder}' has no thresholds for the classes of its student: {cause(error)}",
            "Use the folder student/ of a run.",
        ) from error
    return Tagger.of(student, thresholds).eval().to(device)
