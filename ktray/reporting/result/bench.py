"""The result of jobs/bench.py."""

from __future__ import annotations

from pydantic import Field

from ktray.reporting.result.parts import JobRun, Number, ResultPart


class RatePair(ResultPart):
    """A measured rate and the rate of its limit, for each repetition (`ktray.jobs.bench.rows.BenchRow`)."""

    name: str
    unit: str
    limit_name: str
    limit: list[Number]
    reached: list[Number]
    facts: dict[str, Number | str]
    ratio: Number = Field(description="median over the repetitions of reached / limit")


class BenchResult(JobRun):
    """jobs/bench.py."""

    rows: list[RatePair]
    peak_memory_bytes: int = Field(description="peak memory of all processes together")
    busy_cores_before: Number | None = Field(
        description="number of cores that other processes used before the benchmark; null: unknown"
    )
    commit: str | None
