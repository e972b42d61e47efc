"""The interface of an export target: a file with which a student is deployed.

A target is registered in `ktray.recipe.registries.EXPORTS` under the name that its figures have in ``export.json``, in
the card and in MLflow. For every target that the recipe requests, jobs/export.py writes the file, compares the file's
predictions with the student's, measures the file, and describes it. A target of another package has no key in the
recipe; its `ExportTarget.wanted` decides, for example, by an environment variable.
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
from ktray.models.student.classifier import Student
from ktray.pipeline.finished_run import FinishedRun
from ktray.recipe.export import ExportConfig
from ktray.recipe.registries import EXPORTS


@dataclass
class ExportWork:
    """The inputs of a target.

    Attributes:
        source: the run.
        student: the run's student, in evaluation mode on the CPU.
        task: the run's labelled images.
        folder: folder of the exported files, with the files of earlier targets.
        scratch: folder for temporary files.
        on_val: scores on validation of the student and of the targets with ``exact``; empty while these are written.
    """

    source: FinishedRun
    student: Student
    task: LabelledSet
    folder: Path
    scratch: Path
    on_val: AgreementScores = field(default_factory=AgreementScores)

    def split(self, name: str, examples: list[LabelledExample]) -> Split:
        """Return some labelled images as a split for the student."""
        reader = self.source.kind.reader(self.task)
        return Split(name, examples, self.student.preprocess, self.source.recipe.data.max_pixels, reader)

    @cached_property
    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (N, 3, height, width) uint8, memory-mapped, and the labels of the validation images."""
        return self.split("val", self.task.val).held(self.scratch / "val.npy")


class ExportTarget(ABC):
    """One file format to deploy a student. Instances have no state and are registered in ``EXPORTS``."""

    file: str
    """Name of the file that the target writes."""
    order: int = 100
    """Position in the order of writing and in tables; targets with equal numbers are ordered by name."""
    exact: bool = True
    """Whether the logits must equal those of the student up to rounding; if they differ, the export fails. Targets that
    lose accuracy come after exact ones, and their scores are reported."""
    asked_by: str = ""
    """The setting that requests the target, for messages, such as ``export.int8=true``; empty if the target is always
    written."""
    serves: str = ""
    """The value of ``export.serve`` with which the model in MLflow runs this file."""
    libraries: tuple[str, ...] = ()
    """Packages that the file depends on: with other versions, the export is written again."""
    use: str = ""
    """How to use the file: Markdown for the model card."""

    @abstractmethod
    def wanted(self, part: ExportConfig) -> bool:
        """Return whether the recipe requests this target."""

    def options(self, part: ExportConfig) -> list[Any]:
        """Return the values of the recipe that change the file, as JSON."""
        return []

    def passes(self, part: ExportConfig, task: LabelledSet) -> int:
        """Return the number of forward passes, for ``--plan``."""
        return len(task.val) + len(task.test)

    def plan(self, part: ExportConfig) -> str:
        """Return a text about the target for ``--plan``, which starts with a comma, or an empty string."""
        return ""

    @abstractmethod
    def write(self, work: ExportWork) -> dict[str, Any]:
        """Write the file; returns the entry in ``export.json`` under the target's name.

        Raises:
            KtrayError: the student cannot be written in this format.
        """

    def calibrate(self, path: Path, temperature: float) -> bool:
        """Store the temperature in the file that `write` has written; returns whether the file has a place for it,
        which by default it has not. ``export.json`` has the temperature in any case.

        Args:
            temperature: divides the logits, so that probabilities are honest; fitted on validation.
        """
        return False

    def load(self, path: Path) -> Scorer:
        """Open the file to check its predictions; by default an ONNX file."""
        return Classifier(path)

    def latency(self, path: Path, batch: int) -> dict[str, Any] | None:
        """Measure the file; by default an ONNX file, with `ktray.jobs.export.latency.measure`. None: not measured."""
        return latency.measure(path, batch)

    def notes(self, name: str, content: dict[str, Any], split: str, what: str) -> list[str]:
        """Return what a user should know about the file, in one sentence each.

        Args:
            name: name of the target.
            content: the content of ``export.json``.
            split: ``val`` or ``test``.
            what: the name of the split in words.
        """
        checked = (content.get(name) or {}).get("agreement", {}).get(split)
        if not checked or not checked["top1_differs"]:
            return []
        return [
            f"{self.file} predicts another class than PyTorch for {checked['top1_differs']} of {checked['images']} "
            f"{what} images. The two largest logits of these images differ by at most {checked['widest_margin']:.2g}."
        ]


def all_targets() -> list[tuple[str, ExportTarget]]:
    """Return every target with its name, in order; exact targets come first."""
    return sorted(EXPORTS, key=lambda item: (not item[1].exact, item[1].order, item[0]))


def wanted_targets(part: ExportConfig) -> list[tuple[str, ExportTarget]]:
    """Return the targets of an export with their names, in order."""
    return [(name, target) for name, target in all_targets() if target.wanted(part)]


def serving(part: ExportConfig) -> ExportTarget | None:
    """Return the target whose file the model in MLflow runs, or None."""
    return next((target for _, target in all_targets() if target.serves == part.serve), None)
