"""The result of jobs/tune.py, and the records of its trials, which the result contains as they are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from ktray.reporting.result.parts import JobRun, Number, Result, ResultPart

RUNNING = "running"
Plain = str | int | float | bool | None  # a value of a recipe key that Optuna can choose


@dataclass
class TrialPoint:
    """One run of a trial, with a complete recipe: a model and its cost.

    Attributes:
        trial: number of the trial.
        rung: number of the run in the trial.
        share: share of the trial's steps.
        steps: pretraining steps of the run.
        run: id of the run folder, whose ``recipe.yaml`` runs again.
        validation: the task's metric on validation, 0..1.
        cost: cost of all stages that the model needs, including reused stages, in the unit of cost of the search.
        whole: ``cost`` in all units.
        own: FLOPs of the stages that train the student.
        resource: cost of the trial's students so far, by which the rule that stops trials compares them.
        spent: what the run spent, in all units.
        seconds: wall-clock time.
        planned: what was planned for it when it started, in the units of ``spent`` and as ``wall`` in seconds; empty if
            an earlier version ran it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    trial: int
    rung: int
    share: Number
    steps: int
    run: str
    validation: Number
    cost: Number
    whole: dict[str, Number | None]
    own: dict[str, Number]
    resource: Number
    spent: dict[str, Number]
    seconds: Number
    planned: dict[str, Number] = field(default_factory=dict, kw_only=True)


@dataclass
class TrialRecord:
    """A trial. ``state``: ``running``, ``finished``, ``stopped`` (weak), ``failed``, ``over_budget`` or
    ``over_cost_limit`` (see `ktray.jobs.tune.records`).

    Attributes:
        params: parameters of Optuna.
        keys: recipe keys of the trial; ``train.steps`` may be lower than in ``params`` to keep the cost limit.
        reason: why the trial ended early; empty if it did not.
        flops: planned FLOPs of the whole recipe.
        planned: planned cost of the whole recipe, in the unit of cost of the search.
        lost: what a run of the trial that failed or was stopped had spent.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    number: int
    params: dict[str, Plain]
    keys: dict[str, Any]
    state: str = RUNNING
    reason: str = ""
    flops: Number | None = None
    planned: Number | None = None
    points: list[TrialPoint] = field(default_factory=list)
    lost: dict[str, Number] = field(default_factory=dict)

    @property
    def last(self) -> TrialPoint | None:
        return self.points[-1] if self.points else None


class Spending(ResultPart):
    """Limits and spending by unit: flops, device_seconds, usd, wall (seconds)."""

    limits: dict[str, Number]
    spent: dict[str, Number]


@dataclass
class GivenPoint(TrialPoint):
    """The baseline: the recipe before any change by the search. ``on_front``: it is in the Pareto set."""

    on_front: bool


@dataclass
class WinnerPoint(TrialPoint):
    """The best trial, which is the only one that is tested.

    Attributes:
        name: name of the trial for people.
        keys: recipe keys that the trial sets.
        is_given: whether it is the baseline.
        seeds, runs, validation_seeds, test_seeds: seed, run id and metrics of each run of the winner.
        test: mean of the metric on test over the seeds; null without a run.
        spread: standard deviation over the seeds; null with fewer than two runs.
        missing: by seed, why the winner was not trained with it.
        student: folder of the student of the first seed.
    """

    name: str
    keys: dict[str, Any]
    is_given: bool
    seeds: list[int]
    runs: list[str]
    validation_seeds: list[Number]
    test_seeds: list[Number]
    test: Number | None
    spread: Number | None
    missing: dict[str, str]
    student: str | None


class SearchPlan(ResultPart):
    """What was planned for the runs of all trials, and what they took, summed over the runs."""

    runs: int
    planned_seconds: Number
    planned_usd: Number | None
    seconds: Number
    usd: Number | None


class RandomDraw(ResultPart):
    """The winner's recipe with random images of the gallery in place of the retrieved ones, with the seed of the
    search."""

    run: str | None
    images: int = Field(description="number of images, as many as the winner's transfer set has")
    validation: Number | None
    missing: str | None = Field(description="why there is no run")


class TuneProgress(Result):
    """jobs/tune.py during the search: the best trial so far."""

    state: Literal["running"]
    budget: Spending
    best: TrialPoint | None
    front: list[TrialPoint]
    trials: list[TrialRecord]


class TuneResult(JobRun):
    """jobs/tune.py after the search."""

    state: Literal["finished"]
    folder: str
    task: str | None
    metric: str
    search: str
    stop: str
    cost: str = Field(description="the unit of cost")
    cost_limit: Number | None = Field(
        description="largest cost of the winner, as a multiple of the cost of the baseline"
    )
    space: list[str]
    budget: Spending
    trials: list[TrialRecord]
    front: list[TrialPoint] = Field(description="the Pareto set of cost and validation, sorted by cost")
    given: GivenPoint
    winner: WinnerPoint
    random_draw: RandomDraw | None = Field(None, description="null: the winner's transfer set was not retrieved")
    importance: dict[str, Number] = Field(description="share of the variance of validation that a key explains")
    importance_of_transfer_set: Number
    sharing: dict[str, Number] = Field(
        description="cost of the search, and what it would have cost without shared stages"
    )
    plan: SearchPlan | None = None
    ktray: str = Field(description="version of ktray")
    says: str = Field(description="the outcome in a sentence")
