"""The result of jobs/compare.py."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ktray.reporting.result.parts import JobRun, Number, PlanAndTaken, ResultPart
from ktray.reporting.result.runs import TeacherMetric


class LrTrial(ResultPart):
    """A learning rate that was tried for a method."""

    factor: Number = Field(description="factor on the learning rate of the recipe")
    lr: Number
    validation: Number


class ReachedResult(ResultPart):
    """The cheapest run of the first method that is at least as accurate as this method, and the ratio of their
    costs."""

    name: str
    times: Number
    low: Number = Field(description="end of the 95% interval")
    high: Number = Field(description="end of the 95% interval")


class WayRow(ResultPart):
    """A method over all seeds. Accuracies are fractions on the test split; costs are means over the seeds."""

    name: str
    objective: str
    source: str = Field(description="source of the transfer set; none: there is no transfer set")
    start: str = Field("random", description="origin of the student's initial weights, see the result of a run")
    images: Number | None = Field(description="number of images in the transfer set")
    accuracy: Number
    spread: Number | None = Field(description="standard deviation over the seeds; null for one seed")
    low: Number = Field(description="end of the 95% interval")
    high: Number = Field(description="end of the 95% interval")
    validation: Number
    flops: Number
    device_seconds: Number
    usd: Number | None
    stages: dict[str, Number] = Field(description="FLOPs by stage")
    teacher_share: Number = Field(description="share of the FLOPs that the teacher took, a fraction")
    seeds: int
    runs: list[str]
    family: str = Field(description="the method of which this is a smaller or shorter run; otherwise its own name")
    pareto: bool = Field(description="true: no other method is both cheaper and more accurate")
    lead: list[Number] | None = Field(
        description="lead of the first method over this one: mean, low and high end of the 95% interval"
    )
    reach: ReachedResult | None
    steps: int
    lr: Number
    share: Number = Field(description="share of the steps that the budget allows")
    keys: dict[str, Any] = Field(description="recipe keys that the method sets")
    trials: list[LrTrial]
    like: list[str] = Field(
        default_factory=list,
        description="for a random draw: the methods with retrieved transfer sets beside it; it has as many images as "
        "that of the first",
    )


class Shared(ResultPart):
    """The cost of runs, and what they would have cost without shared stages."""

    flops: Number
    flops_without_cache: Number
    device_seconds: Number
    device_seconds_without_cache: Number


class CompareSpent(Shared):
    ways: Shared
    search: Shared = Field(description="cost of the search for learning rates")
    calibration: Shared = Field(description="cost of short runs that measure the time of a step")


class CompareResult(JobRun):
    """jobs/compare.py."""

    folder: str
    task: str | None
    student: str | None
    equal: str = Field(description="the budget that is equal for all methods")
    seeds: list[int]
    label_budget: int
    metric: str
    test_images: int
    first: str = Field(description="the method that all others are compared with")
    chosen_on_validation: str
    ways: list[WayRow]
    teacher_metric: TeacherMetric | None
    spent: CompareSpent
    lr_search: list[Number]
    plan: PlanAndTaken | None = Field(
        None, description="what was planned for the runs of the methods, and what they took"
    )
    ktray: str = Field(description="version of ktray")
