"""The result of jobs/bench.py."""

from __future__ import annotations

from pydantic import Field

from ktray.reporting.result.parts import JobRun, Number, ResultPart


class RatePair(ResultPart):
    """What ktray reaches beside a limit, in rates of each turn (`ktray.jobs.bench.rows.BenchRow`)."""

    name: str
    unit: str
    limit_name: str
    limit: list[Number]
    reached: list[Number]
    facts: dict[str, Number | str]
    ratio: Number = Field(description="median over the turns of reached / limit")


class BenchResult(JobRun):
    """jobs/bench.py."""

    rows: list[RatePair]
    peak_memory_bytes: int = Field(description="of all processes together")
    busy_cores_before: Number | None = Field(description="cores that other work kept busy; null: unknown")
    commit: str | None
