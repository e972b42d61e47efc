"""The recipe sections of jobs/tune.py: the search and its budget."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from ktray.recipe.section import Section


class BudgetConfig(Section):
    """The budget of the whole search, including the final training of the winner. A value of null sets no limit."""

    usd: float | None = Field(
        None, gt=0, description="limit in USD for the whole search, by the prices of the devices; null: no limit"
    )
    device_hours: float | None = Field(
        None,
        gt=0,
        description="limit in hours of accelerator time for the whole search (without accelerators: of machine time); "
        "null: no limit",
    )
    flops: float | None = Field(
        None, gt=0, description="limit in FLOPs for the whole search, those of the teacher included; null: no limit"
    )
    wall: float | None = Field(
        None,
        gt=0,
        description="limit in minutes of wall-clock time, summed over all times that the search ran; null: no limit, "
        "or 15 minutes where no other limit is set",
    )


class TuneConfig(Section):
    """What jobs/tune.py searches, and how. Other jobs do not read it."""

    space: dict[str, Any] = Field(
        default_factory=dict,
        description="search space, as recipe keys and their values: [a, b] are choices, {low: 1e-3, high: 1e-1, log: "
        "true} or {low: 100, high: 400, step: 100} is a range, and {choices: [a, b], when: {other.key: [x]}} is "
        "searched only where other.key is x; choices of a section set several keys at once, such as student: [{name: "
        "a, kwargs: {}}, ...]; empty: ktray's default space",
    )
    search: Literal["tpe", "nsga2", "random", "grid"] = Field(
        "tpe",
        description="search algorithm: tpe (Optuna's TPE on validation accuracy), nsga2 (validation accuracy and "
        "cost), random, or grid (all combinations)",
    )
    seed: int = Field(0, ge=0, description="seed of the search algorithm")
    trials: int | None = Field(None, ge=1, description="largest number of trials; null: as many as the budget allows")
    parallel: int | Literal["auto"] = Field(
        "auto",
        description="number of trials that run at the same time, each on a share of the cluster; auto: as many as "
        "keep the cluster busy",
    )
    seeds: int = Field(3, ge=1, description="number of seeds with which the winner is trained: seed, seed+1, ...")
    steps: int | None = Field(
        None,
        ge=1,
        description="pretraining steps of the baseline (the recipe before any change by the search); null: train.steps",
    )
    rungs: list[float] = Field(
        [1 / 9, 1 / 3, 1.0],
        min_length=1,
        description="rungs of successive halving: shares of the steps with which a trial is trained, one after the "
        "other, until the trial is stopped",
    )
    stop: Literal["asha", "median", "none"] = Field(
        "asha",
        description="rule that stops trials between rungs by their validation accuracy at equal cost: asha "
        "(successive halving), median, or none",
    )
    cost: Literal["flops", "device_seconds", "usd"] = Field(
        "flops", description="measure of cost, for the Pareto set and for the rule of tune.stop"
    )
    cost_limit: float | None = Field(
        1.0,
        gt=0,
        description="largest cost of the winner, as a multiple of the cost of the baseline (the recipe before any "
        "change by the search); null: no limit",
    )
    warm_start: str | None = Field(
        None, description="MLflow experiment whose finished runs on the same task inform the search; null: none"
    )

    @field_validator("rungs")
    @classmethod
    def _rungs(cls, value: list[float]) -> list[float]:
        if value != sorted(set(value)) or value[0] <= 0 or value[-1] != 1:
            raise ValueError("must rise from above 0 to 1, such as [0.25, 1]")
        return value
