"""Recipe sections of jobs/tune.py: what it searches, how, and what it may spend."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from ktray.recipe.section import Section


class BudgetConfig(Section):
    """What the whole search may spend, the winner's retraining included; what is null sets no limit."""

    usd: float | None = Field(None, gt=0, description="USD for the whole of jobs/tune.py, by the prices of its devices")
    device_hours: float | None = Field(
        None, gt=0, description="hours of accelerators (without any: of machines that work)"
    )
    flops: float | None = Field(None, gt=0, description="FLOPs, the teacher's included")
    wall: float | None = Field(
        None, gt=0, description="minutes by the clock, of all times that the search ran; 15 where no limit is set"
    )


class TuneConfig(Section):
    """What jobs/tune.py searches; other jobs do not read it."""

    space: dict[str, Any] = Field(
        default_factory=dict,
        description="recipe key: what it may be. [a, b] are choices, {low: 1e-3, high: 1e-1, log: true} or {low: 100, "
        "high: 400, step: 100} a range; {choices: [a, b], when: {other.key: [x]}} counts only there. A section takes "
        "choices of several keys: student: [{name: a, kwargs: {}}, ...]. Empty: ktray's own",
    )
    search: Literal["tpe", "nsga2", "random", "grid"] = Field(
        "tpe",
        description="who proposes: Optuna's TPE on validation, NSGA-II on validation and cost, chance, or all there is",
    )
    seed: int = Field(0, description="seed of the search")
    trials: int | None = Field(None, ge=1, description="most trials; null: as many as the budget buys")
    parallel: int | Literal["auto"] = Field(
        "auto", description="trials that run at once, each on its share of the cluster; auto: as many as keep it busy"
    )
    seeds: int = Field(3, ge=1, description="seeds that the winner is trained with, from the recipe's own on")
    steps: int | None = Field(
        None, ge=1, description="pretraining steps of the recipe as given, before any choice; null: the recipe's"
    )
    rungs: list[float] = Field(
        [1 / 9, 1 / 3, 1.0],
        min_length=1,
        description="shares of its steps that a trial is trained with, one run after the other, until it is stopped",
    )
    stop: Literal["asha", "median", "none"] = Field(
        "asha", description="who stops a trial between its rungs, by validation among those that have cost as much"
    )
    cost: Literal["flops", "device_seconds", "usd"] = Field(
        "flops", description="what cost is, in the Pareto set and for those who stop trials"
    )
    cost_limit: float | None = Field(
        1.0, gt=0, description="the winner costs at most so many times what the recipe as given does; null: no limit"
    )
    warm_start: str | None = Field(
        None, description="MLflow experiment whose finished runs on this task the search learns from"
    )

    @field_validator("rungs")
    @classmethod
    def _rungs(cls, value: list[float]) -> list[float]:
        if value != sorted(set(value)) or value[0] <= 0 or value[-1] != 1:
            raise ValueError("they rise from above 0 to 1, such as [0.25, 1]")
        return value
