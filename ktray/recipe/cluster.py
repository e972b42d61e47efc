"""The recipe sections ``cluster`` and ``mlflow``: where a job runs, and where it logs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from ktray.recipe.section import Section


def _as_text(value: Any) -> Any:
    """The text of a number, for the Python API: tags are text."""
    return str(value) if isinstance(value, bool | int | float) else value


class ClusterConfig(Section):
    workers: int | str = Field(
        1,
        description="number of training workers (DDP), or a range min..max such as 1..4, within which training "
        "follows the number of GPUs of the cluster (without GPUs: of nodes)",
    )
    resize_seconds: float = Field(
        60.0,
        gt=0,
        description="seconds between two checks for machines that have joined, where cluster.workers is a range",
    )
    use_gpu: bool | Literal["auto"] = Field("auto", description="use GPUs; auto: where the cluster has any")
    gpu_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a GPU that each teacher and the training worker of a run take; with 0.25, four small "
        "runs of a search or a comparison share a GPU; runs with several workers need whole GPUs",
    )
    cpus: int = Field(
        0,
        ge=0,
        description="number of CPUs that the job requests from an autoscaling cluster before it starts; 0: it uses "
        "those that are there",
    )
    gpus: int = Field(
        0,
        ge=0,
        description="number of GPUs that the job requests from an autoscaling cluster before it starts; 0: it uses "
        "those that are there",
    )
    jobs: int = Field(
        1, ge=1, description="number of jobs that share the cluster at the same time; each uses an equal part of it"
    )
    wait_seconds: float = Field(
        1200.0, gt=0, description="seconds to wait for the CPUs and GPUs that cluster.cpus and cluster.gpus request"
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="failures of workers, and of the start of workers, after which a stage fails; -1: no "
        "limit; machines that announce their end (spot instances) do not count",
    )
    stall_minutes: float = Field(
        30.0,
        gt=0,
        description="minutes without progress after which a stage ends with an error that names what it waited for",
    )

    @field_validator("workers", mode="plain")
    @classmethod
    def _workers(cls, value: Any) -> int | str:
        low, dots, high = str(value).partition("..")
        parts = [low, high] if dots else [low]
        if isinstance(value, bool) or not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError("must be a number, or a range min..max such as 1..4")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last:
            raise ValueError("must be at least one worker, with min not above max")
        return first if first == last else f"{first}..{last}"

    @property
    def span(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        low, _, high = str(self.workers).partition("..")
        return int(low), int(high or low)


class MLflowConfig(Section):
    uri: str | None = Field(
        None,
        description="address of the MLflow tracking server, without credentials; null: MLFLOW_TRACKING_URI, else an "
        "SQLite file in the store",
    )
    experiment: str = Field("ktray", description="MLflow experiment that the run belongs to")
    also: list[str] = Field(
        default_factory=list,
        description="trackers that get the same events as MLflow: tensorboard (event files in the run folder), wandb, "
        "or those of other packages",
    )
    run_name: str | None = Field(None, description="name of the run in MLflow; null: the name of the run folder")
    tags: dict[str, Annotated[str, BeforeValidator(_as_text)]] = Field(
        default_factory=dict, description="tags of the run in MLflow, such as {team: vision}"
    )
