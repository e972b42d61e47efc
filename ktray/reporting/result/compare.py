"""The result of jobs/compare.py."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ktray.reporting.result.parts import JobRun, Number, ResultPart
from ktray.reporting.result.runs import TeacherMetric


class LrTrial(ResultPart):
    """A learning rate that was tried for a way."""

    factor: Number = Field(description="on the recipe's own rate")
    lr: Number
    validation: Number


class Reach(ResultPart):
    """The first way's cheapest run that is as accurate as this way, and by how much cheaper it is."""

    name: str
    times: Number
    low: Number = Field(description="end of the 95% interval")
    high: Number = Field(description="end of the 95% interval")


class WayRow(ResultPart):
    """A way over all seeds; accuracies are fractions on the test split, costs means over seeds."""

    name: str
    objective: str
    source: str = Field(description="of the transfer set; none without one")
    images: Number | None = Field(description="in the transfer set")
    accuracy: Number
    spread: Number | None = Field(description="standard deviation over seeds; null for one seed")
    low: Number = Field(description="end of the 95% interval")
    high: Number = Field(description="end of the 95% interval")
    validation: Number
    flops: Number
    device_seconds: Number
    usd: Number | None
    stages: dict[str, Number] = Field(description="FLOPs by stage")
    teacher_share: Number = Field(description="of the FLOPs, a fraction")
    seeds: int
    runs: list[str]
    family: str = Field(description="the way that this one is a smaller or shorter run of; else its own name")
    pareto: bool = Field(description="no way is both cheaper and more accurate")
    lead: list[Number] | None = Field(description="by how much the first way leads, low and high end of its interval")
    reach: Reach | None
    steps: int
    lr: Number
    share: Number = Field(description="of the steps that the budget allows")
    keys: dict[str, Any] = Field(description="what the way sets in the recipe")
    trials: list[LrTrial]


class Shared(ResultPart):
    """What runs spent, and what they would have cost had they shared no stage."""

    flops: Number
    flops_without_cache: Number
    device_seconds: Number
    device_seconds_without_cache: Number


class CompareSpent(Shared):
    ways: Shared
    search: Shared = Field(description="of learning rates")
    calibration: Shared = Field(description="short runs that measure the time of a step")


class CompareResult(JobRun):
    """jobs/compare.py."""

    folder: str
    task: str | None
    student: str | None
    equal: str = Field(description="what all ways have the same amount of")
    seeds: list[int]
    label_budget: int
    metric: str
    test_images: int
    first: str = Field(description="the way that all others are compared with")
    chosen_on_validation: str
    ways: list[WayRow]
    teacher_metric: TeacherMetric | None
    spent: CompareSpent
    lr_search: list[Number]
    ktray: str = Field(description="version")
