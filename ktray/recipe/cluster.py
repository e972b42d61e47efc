"""Recipe sections about where a job runs and where it logs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from ktray.recipe.section import Section


class ClusterConfig(Section):
    workers: int | str = Field(
        1,
        description="training workers (DDP): a number, or min..max (1..4), of which there are as many as the cluster "
        "has GPUs for (on CPUs: nodes) while it runs",
    )
    resize_seconds: float = Field(
        60.0, gt=0, description="seconds between looks for machines that have joined, where workers is min..max"
    )
    use_gpu: bool | Literal["auto"] = Field("auto", description="auto: when the cluster has GPUs")
    cpus: int = Field(
        0, ge=0, description="CPUs that an autoscaling cluster is asked for before the job plans; 0: what is there"
    )
    gpus: int = Field(0, ge=0, description="GPUs likewise")
    jobs: int = Field(1, ge=1, description="jobs that share the cluster at once: each plans with its part")
    wait_seconds: float = Field(1200.0, gt=0, description="how long to wait for them")
    max_failures: int = Field(
        3,
        ge=-1,
        description="failures of workers survived per stage, and as many of their set-up; -1: any number. Machines "
        "that are taken away with notice do not count",
    )
    stall_minutes: float = Field(
        30.0, gt=0, description="minutes without any progress after which a stage ends and says what it waited for"
    )

    @field_validator("workers", mode="plain")
    @classmethod
    def _workers(cls, value: Any) -> int | str:
        low, dots, high = str(value).partition("..")
        parts = [low, high] if dots else [low]
        if isinstance(value, bool) or not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError("it is a number, or min..max such as 1..4")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last:
            raise ValueError("there is at least one worker, and min is not above max")
        return first if first == last else f"{first}..{last}"

    @property
    def span(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        low, _, high = str(self.workers).partition("..")
        return int(low), int(high or low)


class MLflowConfig(Section):
    uri: str | None = Field(
        None,
        description="tracking server, without credentials; null: MLFLOW_TRACKING_URI, else sqlite in the store",
    )
    experiment: str = Field("ktray", description="experiment that the run is logged under")
    run_name: str | None = Field(None, description="the run's name there; null: that of its folder")
    tags: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="tags of the run there, such as mlflow.tags={team: vision}"
    )
