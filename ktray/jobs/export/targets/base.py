"""The interface of an export target: a file with which a student is deployed.

A target is registered in `ktray.recipe.registries.EXPORTS` under the name that its figures have in ``export.json``, in
the card and in MLflow. The recipe requests it by this name in ``export.targets``. For every requested target,
jobs/export.py writes the file, compares the file's predictions with the student's, measures the file, and describes it.
Formats that are made from a PyTorch graph have a base class of their own, `ktray.jobs.export.targets.graph`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.errors import KtrayError
from ktray.jobs.export import latency
from ktray.jobs.export.agreement import AgreementScores, Scorer
from ktray.jobs.export.confidence import Confidence
from ktray.jobs.export.images import HeldImages, Split
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
        confidence: temperature and threshold for targets with `ExportTarget.confident`.
    """

    source: FinishedRun
    student: Student
    task: LabelledSet
    folder: Path
    scratch: Path
    on_val: AgreementScores = field(default_factory=AgreementScores)
    confidence: Confidence = field(default_factory=Confidence)

    def split(self, name: str, examples: list[LabelledExample]) -> Split:
        """Return some labelled images as a split for the student."""
        reader = self.source.kind.reader(self.task, whole=True)
        return Split(name, examples, self.student.preprocess, self.source.recipe.data.max_pixels, reader)

    @cached_property
    def validation(self) -> HeldImages:
        """The validation images."""
        return self.split("val", self.task.val).held(self.scratch / "val.npy")


class ExportTarget(ABC):
    """One file format to deploy a student. Instances have no state and are registered in ``EXPORTS``."""

    file: str
    """Name of the file that the target writes."""
    companions: tuple[str, ...] = ()
    """Names of further files that the target writes and that the file needs."""
    order: int = 100
    """Position in the order of writing and in tables; targets with equal numbers are ordered by name."""
    exact: bool = True
    """Whether the logits must equal those of the student up to rounding; if they differ, the export fails. Targets that
    lose accuracy come after exact ones, and their scores are reported."""
    asked_by: str = ""
    """The setting that requests the target, for messages, such as ``export.int8=true``; empty if the target is always
    written, or is requested by its name."""
    extra: str = ""
    """The extra of ktray that installs `libraries`; empty: they are always installed."""
    serves: str = ""
    """The value of ``export.serve`` with which the model in MLflow runs this file."""
    libraries: tuple[str, ...] = ()
    """Packages that the file depends on: with other versions, the export is written again."""
    use: str = ""
    """How to use the file: Markdown for the model card."""

    @property
    def name(self) -> str:
        """The name under which the target is registered."""
        return next(name for name, target in EXPORTS if target is self)

    def wanted(self, part: ExportConfig) -> bool:
        """Return whether the recipe requests this target in another way than by its name in ``export.targets``."""
        return False

    def require(self) -> None:
        """Check that the packages of the target are installed.

        Raises:
            KtrayError: one is missing; the message names the extra that installs it.
        """
        for library in self.libraries:
            try:
                metadata.version(library)
            except metadata.PackageNotFoundError as error:
                remedy = f"pip install 'ktray[{self.extra}]'" if self.extra else f"pip install {library}"
                raise KtrayError(
                    f"The export target '{self.name}' needs the package {library}, which is not installed",
                    f"Install it with: {remedy}. Or remove {self.name} from export.targets.",
                ) from error

    def confident(self, part: ExportConfig) -> bool:
        """Return whether the file contains temperature and threshold, so that they are fitted before it is written."""
        return False

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

    def load(self, path: Path) -> Scorer | None:
        """Open the file to check its predictions; by default an ONNX file. None: this machine cannot run such files,
        and `unchecked` says why.

        Raises:
            KtrayError: the file is damaged.
        """
        return Classifier(path)

    def unchecked(self) -> str:
        """Return why the file cannot be run on this machine, as a sentence for the user, or an empty string."""
        return ""

    def size(self, files: dict[str, Any]) -> int:
        """Return the size of the file and its companions in bytes, from ``files`` in ``export.json``."""
        return sum(int(files[name]["bytes"]) for name in (self.file, *self.companions))

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
        if content.get(name) and self.unchecked() and split == "val":
            return [f"{self.file} was not checked against PyTorch and not measured. {self.unchecked()}"]
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
    """Return the targets of an export with their names, in order.

    Raises:
        KtrayError: ``export.targets`` has a name that no target has.
    """
    for name in part.targets:
        EXPORTS.get(name)
    return [(name, target) for name, target in all_targets() if name in part.targets or target.wanted(part)]


def serving(part: ExportConfig) -> ExportTarget | None:
    """Return the target whose file the model in MLflow runs, or None."""
    return next((target for _, target in all_targets() if target.serves == part.serve), None)
