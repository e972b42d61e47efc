"""What the jobs return in Python: a finished job with its result, its cost and its page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import csv

from ktray.data import filesystem
from ktray.errors import KtrayError
from ktray.reporting.report import closing_table, metric_label
from ktray.reporting.units import flops, percent, usd
from ktray.storage.store import Dir, Store

if TYPE_CHECKING:
    from ktray.data.labelled.labelled_set import LabelledSet
    from ktray.models.student.classifier import Student
    from ktray.recipe.schema import Recipe

_FRAME = '<iframe srcdoc="{}" style="width:100%;height:{}px;border:1px solid #ccc"></iframe>'
_HEIGHT = 720  # pixels


@dataclass(frozen=True)
class Report:
    """A page of a job, which needs no network. A notebook shows it where it is the value of a cell.

    Attributes:
        path: the file, local or ``s3://``.
        html: the whole page.
    """

    path: str
    html: str

    def __repr__(self) -> str:
        return f"Report({self.path!r})"

    def _repr_html_(self) -> str:
        """The page in a frame, so that its styles and those of the notebook do not mix."""
        return _FRAME.format(html.escape(self.html, quote=True), _HEIGHT)


class FinishedJob:
    """The folder of a finished job.

    Attributes:
        folder: the folder, local or ``s3://``.
    """

    PAGE: ClassVar[str] = ""
    RESULT: ClassVar[str] = "result.json"

    def __init__(self, folder: str) -> None:
        self._dir = Dir(str(folder))
        self.folder = self._dir.uri

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of ``result.json`` (for an export, ``export.json``); ``docs/guide/results.md`` explains it.

        Raises:
            KtrayError: the folder has no result.
        """
        try:
            return dict(self._dir.read_json(self.RESULT))
        except (FileNotFoundError, ValueError) as error:
            raise KtrayError(
                f"'{self.folder}' has no finished job: {self.RESULT} is missing or damaged",
                "Make the call again: it continues an interrupted job.",
            ) from error

    @property
    def cost(self) -> Mapping[str, Any]:
        """What the job spent: ``flops``, ``device_seconds``, ``usd``, ``kwh``, ..., as in ``result.json``."""
        return dict(self.result.get("cost") or self.result.get("spent") or {})

    @property
    def report(self) -> Report:
        """The page of the job.

        Raises:
            KtrayError: this job has no page.
        """
        if not self.PAGE or not self._dir.exists(self.PAGE):
            raise KtrayError(f"'{self.folder}' has no page", "Its numbers are in the attribute result.")
        return Report(self._dir.file(self.PAGE), self._dir.read(self.PAGE).decode("utf-8"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.folder!r})"


class Run(FinishedJob):
    """A finished run: a student, what it reaches, and what it cost. `ktray.open_run` opens an earlier one."""

    PAGE = "report.html"

    @property
    def id(self) -> str:
        return str(self.result["run_id"])

    @property
    def store(self) -> str:
        """The store that has the run."""
        return self.folder.rpartition("/runs/")[0]

    @property
    def metric(self) -> float:
        """The task's metric of the student on the test split, a fraction. ``result["metric"]`` has its name and all
        other metrics."""
        return float(self.result["metric"]["test"])

    @cached_property
    def recipe(self) -> Recipe:
        """The complete recipe of the run."""
        from ktray import recipe as recipes

        with self._dir.local("recipe.yaml") as path:
            return recipes.load(str(path), [])

    @cached_property
    def task(self) -> LabelledSet:
        """The labelled images of the run: lists ``train``, ``val`` and ``test`` of examples with ``uri`` and ``label``,
        which is an index into ``classes``.

        Raises:
            KtrayError: the images have moved or changed.
        """
        from ktray.pipeline.finished_run import FinishedRun

        return FinishedRun(Store(self.store), self._dir, self.recipe, self.result).task()

    @cached_property
    def student(self) -> Student:
        """The student, a PyTorch module in evaluation mode on the CPU.

        ``student.model`` is the plain timm model, ``student.transform(image)`` its input for an image, and
        ``student.predict(images)`` the predictions for images, paths or encoded bytes.
        """
        from ktray.tasks.students import load_student

        with self._dir.local("student") as folder:
            return load_student(folder)

    def compare(self, other: Run) -> RunComparison:
        """Compare this run with another one of the same task, on the same test images.

        The interval of the difference is from a paired bootstrap over the test images.

        Raises:
            KtrayError: the runs have other test images or another metric, or their predictions are not in the store.
        """
        from ktray.jobs.compare.rows import load_scores
        from ktray.jobs.compare.statistics import interval, resample

        if self._tested() != other._tested():
            raise KtrayError(
                f"Runs '{self.id}' and '{other.id}' were tested on other images, or by another metric",
                "Compare runs of one task with the same test split.",
            )
        sample = resample([load_scores(Store(run.store), [run.result]) for run in (self, other)])
        low, high = interval(sample[:, 0] - sample[:, 1])
        return RunComparison(self, other, self.metric - other.metric, low, high)

    def _tested(self) -> tuple[str, list[str]]:
        """The metric, and the test images in order."""
        from ktray.stages.evaluate import stage as evaluate

        keys = [row["key"] for row in self.result["stages"] if row["name"] == "evaluate"]
        stage = Store(self.store).stage("evaluate", keys[0]) if keys else None
        if stage is None or stage.manifest() is None:
            raise KtrayError(
                f"The test predictions of run '{self.id}' are not in '{self.store}'", "Run it again in this store."
            )
        uris = evaluate.load(stage, reduce=lambda rows: {"uri": rows["uri"].astype(str)})["uri"]
        return str(self.result["metric"]["name"]), uris.tolist()

    def __repr__(self) -> str:
        r = self.result
        return (
            f"Run {self.id}: {r['student']}, {metric_label(r)} {percent(self.metric)} on test, "
            f"{flops(self.cost['flops']['total'])}, {usd(self.cost['usd'])}"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}\n\n{html.escape(closing_table(self.result))}</pre>"


@dataclass(frozen=True, repr=False)
class RunComparison:
    """Two runs on the same test images.

    Attributes:
        first, second: the runs.
        lead: metric of the first minus metric of the second.
        low, high: 95% interval of ``lead``.
    """

    first: Run
    second: Run
    lead: float
    low: float
    high: float

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the first run divided by those of the second, each with all stages at their original cost."""
        costs = [run.cost["without_cache"]["flops"] for run in (self.first, self.second)]
        return float(np.divide(*costs))

    def __repr__(self) -> str:
        lead = f"{100 * self.lead:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        return f"{self.first!r}\n{self.second!r}\nThe first leads by {lead} at {self.flops_ratio:.2g} times the FLOPs."

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


class CompareRun(FinishedJob):
    """A finished comparison of methods."""

    PAGE = "compare.html"

    @property
    def methods(self) -> list[dict[str, Any]]:
        """A row for each method: accuracy with its interval, and cost."""
        return list(self.result["ways"])


class TuneRun(FinishedJob):
    """A finished search."""

    PAGE = "tune.html"

    @property
    def winner(self) -> Run:
        """The run of the winner with the first seed.

        Raises:
            KtrayError: the budget did not suffice to train the winner.
        """
        runs = self.result["winner"]["runs"]
        if not runs:
            raise KtrayError("The winner of the search was not trained to its end", "Raise the budget and tune again.")
        return Run(f"{self.folder.rpartition('/runs/')[0]}/runs/{runs[0]}")


class CurateRun(FinishedJob):
    """A chosen transfer set."""

    PAGE = "transfer.html"

    @property
    def table(self) -> pa.Table:
        """The images of the transfer set: ``uri``, ``query``, ``similarity``, and more."""
        with self._dir.local("transfer.parquet") as path:
            return pq.read_table(path)

    @property
    def suggestions(self) -> pa.Table | None:
        """The images to label next, the most valuable first (``docs/guide/label-next.md`` has the columns); None if the
        recipe has no ``curate.suggest``."""
        if not self.result.get("suggestions"):
            return None
        types = {"label": pa.string(), "suggested": pa.string(), "disagreement": pa.float64()}
        with self._dir.local("suggestions.csv") as path:
            return csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=types))


class IndexRun(FinishedJob):
    """An embedded gallery; ``result["index"]`` has its folder and its numbers."""


class ExportRun(FinishedJob):
    """The files of an exported student, in ``folder``."""

    RESULT = "export.json"


class PredictRun(FinishedJob):
    """The predictions for many images."""

    @property
    def dataset(self) -> ds.Dataset:
        """All predictions (``docs/guide/predict.md`` has the columns). Nothing is read before it is used."""
        folder = self.result["predictions"]["folder"]
        fs, path = filesystem.locate(folder)
        return ds.dataset(path, filesystem=fs, format="parquet")

    @property
    def table(self) -> pa.Table:
        """All predictions, in memory."""
        return self.dataset.to_table()
