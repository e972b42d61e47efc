"""The result of jobs/tune.py, and the records of its trials, which are in it as they are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from ktray.reporting.result.parts import JobRun, Number, Result, ResultPart

RUNNING = "running"
Plain = str | int | float | bool | None  # a value of a recipe's key that Optuna can choose


@dataclass
class TrialPoint:
    """One run of a trial: a whole recipe, and a model that can be had for its cost.

    Attributes:
        trial, rung: whose, and which of its runs.
        share, steps: of the trial's steps.
        run: id of its run folder, whose ``recipe.yaml`` runs again.
        validation: the task's metric, 0..1.
        cost: of all stages that the model needs, made here or before, in the search's unit of cost.
        whole: the same in all units.
        own: FLOPs of the stages that train the student.
        resource: the cost of the trial's students up to here; what those who stop trials count in.
        spent: what the run spent, in all units.
        seconds: by the clock.
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


@dataclass
class TrialRecord:
    """A trial. ``state``: ``running``, ``finished``, ``stopped`` (weak), ``failed``, ``over_budget`` or
    ``over_cost_limit`` (see `ktray.jobs.tune.records`).

    Attributes:
        params: Optuna's.
        keys: of the recipe; ``train.steps`` may be fewer than in ``params``, where the cost limit asks for it.
        reason: why it ended, where it did not come to its end.
        flops, planned: of the whole recipe by the plan, and the same in the search's unit of cost.
        lost: what its run that failed or was stopped had spent.
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
    """By unit: flops, device_seconds, usd, wall (seconds)."""

    limits: dict[str, Number]
    spent: dict[str, Number]


@dataclass
class GivenPoint(TrialPoint):
    """The recipe that the search began with. ``on_front``: no trial is both cheaper and more accurate."""

    on_front: bool


@dataclass
class WinnerPoint(TrialPoint):
    """The best trial, which alone is tested.

    Attributes:
        name: for people.
        keys: what the trial sets in the recipe.
        is_given: it is the recipe that the search began with.
        seeds, runs, validation_seeds, test_seeds: of each run of the winner.
        test, spread: mean and standard deviation over seeds; null without a run, and for one seed.
        missing: by seed, why it was not trained.
        student: folder of the first seed's student.
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


class TuneProgress(Result):
    """jobs/tune.py while it runs: the best so far."""

    state: Literal["running"]
    budget: Spending
    best: TrialPoint | None
    front: list[TrialPoint]
    trials: list[TrialRecord]


class TuneResult(JobRun):
    """jobs/tune.py at its end."""

    state: Literal["finished"]
    folder: str
    task: str | None
    metric: str
    search: str
    stop: str
    cost: str = Field(description="the unit of cost")
    cost_limit: Number | None = Field(description="what the winner may cost, in times of the recipe as given")
    space: list[str]
    budget: Spending
    trials: list[TrialRecord]
    front: list[TrialPoint] = Field(description="the Pareto set of cost and validation, by rising cost")
    given: GivenPoint
    winner: WinnerPoint
    importance: dict[str, Number] = Field(description="share of the variance of validation that a key explains")
    importance_of_transfer_set: Number
    sharing: dict[str, Number] = Field(description="what was spent, and what it would have been without shared stages")
    ktray: str = Field(description="version")
    says: str = Field(description="what came of it, in a sentence")
