"""Parts of the results of all jobs: the base class, the function that writes a result, and objects that several
share."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

if TYPE_CHECKING:
    from ktray.storage.store import Dir

SCHEMA: Literal[1] = 1
# A count must stay an integer, because a float loses digits above 2^53.
Number = Annotated[int | float, WithJsonSchema({"type": "number"})]


class ResultPart(BaseModel):
    """An object in a result. Keys that a job does not set are left out of the file, so they are optional here."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def content(self) -> dict[str, Any]:
        """The JSON-like content, with only the keys that were set."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Result(ResultPart):
    """The result of a job, in ``result.json``; that of jobs/export.py is in ``export.json``."""

    schema_: Literal[1] = Field(alias="schema", description="version of these keys")


def write_result(folder: Dir, result: Result, name: str = "result.json") -> dict[str, Any]:
    """Write the result of a job into its folder; returns the content."""
    content = result.content()
    folder.write_json(name, content)
    return content


def finished(begun: float) -> dict[str, str]:
    """The entries ``status``, ``started`` and ``ended`` of a job that finishes now.

    Args:
        begun: time of its start, seconds since 1970.
    """
    return {"status": "finished", "started": utc(begun), "ended": utc(time.time())}


def utc(seconds: float) -> str:
    """A time, in seconds since 1970, as ISO 8601 in UTC, such as ``2026-11-28T14:30:00Z``."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Gpu(ResultPart):
    name: str
    memory_bytes: int


class Device(ResultPart):
    """The machine that runs the driver (`ktray.accounting.device.describe_device`)."""

    cpu: str = Field(description="model name")
    cores: int = Field(description="number of usable CPU cores")
    memory_bytes: int = Field(description="usable memory")
    gpus: list[Gpu]
    system: str
    instance: str = Field("", description="the cloud provider's name for the type of the machine; left out if unknown")


class MLflowRun(ResultPart):
    """The MLflow run of the job."""

    tracking_uri: str
    experiment: str
    run_id: str | None = Field(description="null: the server did not answer; a later job sends what is missing")


class Worth(ResultPart):
    """The cost of stages, whether this run or an earlier one computed them."""

    flops: Number
    device_seconds: Number
    usd: Number | None


class Cost(ResultPart):
    """The cost of a run (`ktray.accounting.summary.cost_summary`)."""

    flops: dict[str, Number] = Field(description="by stage, and their total")
    device_seconds: dict[str, Number] = Field(description="by stage, and their total")
    wall_seconds: Number
    usd: Number | None = Field(description="null: the price of a device is not known")
    kwh: Number | None = Field(description="null: no energy was measured")
    images_seen: int
    peak_memory_bytes: int
    without_cache: Worth = Field(description="with reused stages at the cost of their computation")
    baselines: dict[str, Worth] = Field(
        description="cost of baselines and of HYGIENE by name; the totals do not include it"
    )
    with_baselines: Worth | None = Field(
        default=None,
        description="what this run spent, baselines and HYGIENE included; null: an older result",
    )


class StageRow(ResultPart):
    """A stage of a run; the numbers are what this run spent on the stage."""

    name: str
    key: str = Field(description="key of the stage, the name of its folder in the store")
    cached: bool = Field(description="true: an earlier run computed the stage")
    attempts: int
    restarts: int = Field(description="number of times that training workers started again")
    wall_seconds: Number
    flops: Number
    lost_flops: Number = Field(description="FLOPs of steps that were repeated after a restart")
    device_seconds: Number
    images: int
    usd: Number | None


class PlannedStage(ResultPart):
    """A stage that the run computed: what was planned, and what it took."""

    name: str
    source: str = Field(
        description="where the plan is from: store (earlier runs with it), bench (jobs/bench.py with it), table "
        "(shipped with ktray), roofline, or cores (one speed for all models); several in a job with several runs"
    )
    planned_seconds: Number
    planned_usd: Number | None
    seconds: Number
    usd: Number | None


class PlanAndTaken(ResultPart):
    """The plan of the stages that the run computed in one attempt, and what they took; sums and stages. For a job with
    several runs, the sums over its runs."""

    planned_seconds: Number
    planned_usd: Number | None
    seconds: Number
    usd: Number | None
    stages: list[PlannedStage]


class Images(ResultPart):
    """The images that a run read."""

    read: int
    quarantined: int = Field(description="number of images that could not be used")
    quarantine_list: str = Field(description="the Parquet file that lists them")
    reasons: dict[str, int] = Field(default_factory=dict, description="number of quarantined images, by reason")


class SimilarityCurve(ResultPart):
    """The similarity of the images of a transfer set to their queries, in descending order."""

    rank: list[int] = Field(description="numbers of images")
    similarity: list[Number] = Field(description="cosine similarity of the image at each rank")
    agree: list[Number] | None = Field(
        description="share of the images between a rank and the one before it for which the teacher predicts the class "
        "of their query; null: images have no classes"
    )


class SetFigures(ResultPart):
    """A transfer set, judged by the query that is nearest to each of its images."""

    name: str = Field(description="strategy that would choose the set, or random: a random draw from the gallery")
    images: int
    similarity: Number | None = Field(description="median cosine similarity to the nearest query")
    near: Number | None = Field(description="share of the images above the calibrated floor; null: there is none")
    agree: Number | None = Field(description="share of the images with the predicted class of the nearest query")
    confidence: Number | None = Field(description="mean of 1 minus the normalised entropy of the teacher's prediction")
    shared: Number | None = Field(description="share of the images of the run's own set that this set also has")


class TaskShare(ResultPart):
    """How much of a retrieved transfer set belongs to the task."""

    floor: list[Number] = Field(description="floors of the similarity, one for each kind of query")
    applied: bool = Field(description="whether images below the floor were left out")
    below: int = Field(description="number of images below the floor among those that are retrieved without a floor")
    curve: SimilarityCurve | None = Field(description="of the images that are retrieved without a floor")
    sets: list[SetFigures] = Field(description="the set of the run, and others of the same size")


class TransferSet(ResultPart):
    """The transfer set of a run."""

    source: str
    strategy: str
    size: int | None = Field(description="number of images that the recipe requests")
    kept: int
    dropped: dict[str, int] = Field(description="number of images that were left out, by reason")
    path: str = Field(description="the Parquet file that lists the images")
    on_task: TaskShare | None = Field(None, description="null: the images were chosen without queries")


class Hygiene(ResultPart):
    """Problems with the labelled images. Copies are images that show the same, also after being resized, cropped,
    mirrored or saved again."""

    checked: int = Field(description="number of images that were compared")
    train_val: int = Field(description="number of validation images that are copies of training images")
    train_test: int = Field(description="number of test images that are copies of training images")
    val_test: int = Field(description="number of test images that are copies of validation images")
    torn_groups: int = Field(description="number of groups (task.group) in more than one split")
    two_labels: int = Field(description="number of images that are identical to one with another label")
    doubtful_labels: int = Field(description="number of training labels that the teacher contradicts")
    path: str = Field(description="the Parquet file that lists all of these, except torn groups")


class JobRun(Result):
    """The entries that the results of all jobs with a run folder share."""

    run_id: str
    status: Literal["finished"] = Field("finished", description="failed jobs write another result, with their error")
    started: str = Field("", description="time of the start of the attempt that finished, ISO 8601 in UTC")
    ended: str = Field("", description="time of the end, ISO 8601 in UTC")
    versions: dict[str, str] = Field(description="versions of Python, ktray and the libraries that affect a result")
    device: Device
    mlflow: MLflowRun
    wall_seconds: Number


class PipelineRun(JobRun):
    """The entries that the results of all jobs that run stages share."""

    folder: str = Field(description="the run folder")
    cost: Cost
    stages: list[StageRow]
