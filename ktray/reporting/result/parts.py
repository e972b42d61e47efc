"""What the results of all jobs are made of: the base class, how one is written, and the objects that several share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

if TYPE_CHECKING:
    from ktray.storage.store import Dir

SCHEMA: Literal[1] = 1
# A count stays a whole number however large it is; as a float it would lose digits above 2^53.
Number = Annotated[int | float, WithJsonSchema({"type": "number"})]


class ResultPart(BaseModel):
    """An object within a result. Keys that a job does not set are left out of the file, so they are optional here."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def content(self) -> dict[str, Any]:
        """The JSON-like content, with the keys that were set."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Result(ResultPart):
    """What a job leaves as ``result.json``; of jobs/export.py as ``export.json``."""

    schema_: Literal[1] = Field(alias="schema", description="version of these keys")


def write_result(folder: Dir, result: Result, name: str = "result.json") -> dict[str, Any]:
    """Write a job's result into its folder; returns the content."""
    content = result.content()
    folder.write_json(name, content)
    return content


class Gpu(ResultPart):
    name: str
    memory_bytes: int


class Device(ResultPart):
    """The machine of the driver (`ktray.accounting.device.describe_device`)."""

    cpu: str = Field(description="model name")
    cores: int = Field(description="usable ones")
    memory_bytes: int = Field(description="usable ones")
    gpus: list[Gpu]
    system: str
    instance: str = Field("", description="the provider's name of the machine's type, where it is known")


class MLflowRun(ResultPart):
    """Where the job is logged."""

    tracking_uri: str
    experiment: str
    run_id: str | None = Field(description="null where the server did not answer; a later job sends what is missing")


class Worth(ResultPart):
    """What stages took, whether in this run or before."""

    flops: Number
    device_seconds: Number
    usd: Number | None


class Cost(ResultPart):
    """What a run spent (`ktray.accounting.ledger.cost_summary`)."""

    flops: dict[str, Number] = Field(description="by stage, and their total")
    device_seconds: dict[str, Number] = Field(description="by stage, and their total")
    wall_seconds: Number
    usd: Number | None = Field(description="null where a device has no price")
    kwh: Number | None = Field(description="null where no energy was measured")
    images_seen: int
    peak_memory_bytes: int
    without_cache: Worth = Field(description="with reused stages at what they took when they were made")
    baselines: dict[str, Worth] = Field(description="models to compare with, which are in no total")


class StageRow(ResultPart):
    """A stage of a run; the numbers are what this run spent on it."""

    name: str
    key: str = Field(description="of its folder in the store")
    cached: bool = Field(description="it was made by an earlier run")
    attempts: int
    restarts: int = Field(description="times that training workers began again")
    wall_seconds: Number
    flops: Number
    lost_flops: Number = Field(description="of steps that were done again after a restart")
    device_seconds: Number
    images: int
    usd: Number | None


class Images(ResultPart):
    """Images that a run read."""

    read: int
    quarantined: int = Field(description="images that could not be used")
    quarantine_list: str = Field(description="the Parquet file that names them")
    reasons: dict[str, int] = Field(default_factory=dict, description="why, and how often")


class TransferSet(ResultPart):
    """The images that a student is pretrained on."""

    source: str
    strategy: str
    size: int | None = Field(description="what the recipe asks for")
    kept: int
    dropped: dict[str, int] = Field(description="images left out, by reason")
    path: str = Field(description="the Parquet file that lists the set")


class JobRun(Result):
    """What the results of all jobs with a run's folder share."""

    run_id: str
    versions: dict[str, str] = Field(description="of Python, ktray and the libraries that decide a result")
    device: Device
    mlflow: MLflowRun
    wall_seconds: Number


class PipelineRun(JobRun):
    """What the results of jobs that run stages share."""

    folder: str = Field(description="of the run")
    cost: Cost
    stages: list[StageRow]
