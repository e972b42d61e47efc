"""The result of a job that ended early."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.reporting.result.parts import Cost, MLflowRun, Result, StageRow


class FailedResult(Result):
    """A job that failed or was interrupted. The same command resumes it, and its result then replaces this one."""

    run_id: str
    folder: str = Field(description="the run folder")
    status: Literal["failed", "interrupted"]
    error: str = Field(description="what is wrong, in one line")
    remedy: str = Field(description="what to change; empty if nothing is known")
    stage: str | None = Field(description="the stage that failed; null: none had begun")
    exit_code: int = Field(description="exit code of the job")
    started: str = Field(description="time of the start of this attempt, ISO 8601 in UTC")
    ended: str = Field(description="time of its end, ISO 8601 in UTC")
    cost: Cost | None = Field(None, description="what the run has cost so far")
    stages: list[StageRow] = Field(default_factory=list)
    mlflow: MLflowRun | None = None
