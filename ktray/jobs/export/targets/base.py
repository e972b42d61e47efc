"""What an export target is: a file that a student is deployed as.

A target is registered in `ktray.recipe.registries.EXPORTS` under the name that its figures have in ``export.json``, in
the card and in MLflow. jobs/export.py asks every target whether the recipe wants it, lets it write its file, checks the
file's predictions against the student's, measures it, and describes it. A target of another package that has no key in
the recipe decides `ExportTarget.wanted` by itself, for example by a variable of the environment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.jobs.export import latency
from ktray.jobs.export.agreement import AgreementScores, Scorer
from ktray.jobs.export.images import Split
from ktray.jobs.export.predict import Classifier
from ktray.jobs.export.run_source import ExportedRun
from ktray.models.student.classifier import Student
from ktray.recipe.export import ExportConfig
from ktray.recipe.registries import EXPORTS


@dataclass
class ExportWork:
    """What a target works with.

    Attributes:
        source: the run.
        student: its student, in evaluation mode on the CPU.
        task: its labelled images.
        folder: where the files of the export are written; those of targets that come before are there.
        scratch: folder for what is not kept.
        on_val: scores on validation of the student and of the targets with ``exact``; empty while these are written.
    """

    source: ExportedRun
    student: Student
    task: LabelledSet
    folder: Path
    scratch: Path
    on_val: AgreementScores = field(default_factory=AgreementScores)

    def split(self, name: str, examples: list[LabelledExample]) -> Split:
        """Some labelled images as the student sees them."""
        return Split(name, examples, self.student.preprocess, self.source.recipe.data.max_pixels)

    @cached_property
    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (N, 3, height, width) uint8, in a file, and labels (N,) of the validation images."""
        return self.split("val", self.task.val).held(self.scratch / "val.npy")


class ExportTarget(ABC):
    """One way to deploy a student. Instances have no state and are registered in ``EXPORTS``."""

    file: str
    """Name of the file that it writes."""
    order: int = 100
    """When it is written and where it stands in tables; equal numbers go by name."""
    exact: bool = True
    """Whether its logits must be those of the student up to rounding (else the export ends with an error). Targets that
    lose accuracy come after those that do not, and their scores are reported."""
    asked_by: str = ""
    """How the recipe asks for it, for messages: ``export.int8=true``; empty where it is always written."""
    serves: str = ""
    """The value of ``export.serve`` with which the model in MLflow runs this file."""
    libraries: tuple[str, ...] = ()
    """Packages whose versions make another export."""
    use: str = ""
    """How its file is used: Markdown for the model card."""

    @abstractmethod
    def wanted(self, part: ExportConfig) -> bool:
        """Whether this export has it."""

    def options(self, part: ExportConfig) -> list[Any]:
        """What of the recipe changes its file; JSON."""
        return []

    def passes(self, part: ExportConfig, task: LabelledSet) -> int:
        """Images that the model looks at, for ``--plan``."""
        return len(task.val) + len(task.test)

    def plan(self, part: ExportConfig) -> str:
        """What more ``--plan`` says of it; begins with a comma where it is not empty."""
        return ""

    @abstractmethod
    def write(self, work: ExportWork) -> dict[str, Any]:
        """Write the file; returns what ``export.json`` holds under the target's name.

        Raises:
            KtrayError: this student cannot be written in this way.
        """

    def load(self, path: Path) -> Scorer:
        """The file, opened to be checked; an ONNX file by default."""
        return Classifier(path)

    def latency(self, path: Path, batch: int) -> dict[str, Any] | None:
        """See `ktray.jobs.export.latency.measure`, which knows ONNX files; None where it is not measured."""
        return latency.measure(path, batch)

    def notes(self, name: str, content: dict[str, Any], split: str, what: str) -> list[str]:
        """What a person should know of its file, one sentence each.

        Args:
            name: its own.
            content: what ``export.json`` holds.
            split, what: ``val`` or ``test``, and in words.
        """
        checked = (content.get(name) or {}).get("agreement", {}).get(split)
        if not checked or not checked["top1_differs"]:
            return []
        return [
            f"{self.file} names another class than PyTorch for {checked['top1_differs']} of {checked['images']} {what} "
            f"images, whose first two classes lie at most {checked['widest_margin']:.2g} apart."
        ]


def all_targets() -> list[tuple[str, ExportTarget]]:
    """Every target by name, in order; those that must agree with the student come first."""
    return sorted(EXPORTS, key=lambda item: (not item[1].exact, item[1].order, item[0]))


def wanted_targets(part: ExportConfig) -> list[tuple[str, ExportTarget]]:
    """The targets of an export, in order."""
    return [(name, target) for name, target in all_targets() if target.wanted(part)]


def serving(part: ExportConfig) -> ExportTarget | None:
    """The target whose file the model in MLflow runs."""
    return next((target for _, target in all_targets() if target.serves == part.serve), None)
