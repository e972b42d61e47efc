"""The recipe section of jobs/compare.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from ktray.recipe.section import Section


class CompareConfig(Section):
    """What jobs/compare.py compares. Other jobs do not read it."""

    ways: dict[str, dict[str, Any]] | list[str] = Field(
        default_factory=dict,
        description="compared methods, as names with recipe keys, such as {mine: {objective.name: agnostic, "
        "objective.match: mse}}, or names of default methods, such as [oriented retrieved, scratch]; empty: all "
        "default methods",
    )
    seeds: list[NonNegativeInt] = Field([0, 1, 2], min_length=1, description="seeds with which each method is run")
    steps: int | None = Field(None, ge=1, description="pretraining steps of the first method; null: train.steps")
    equal: Literal["steps", "flops", "device_seconds", "own"] = Field(
        "steps",
        description="budget that is equal for all methods: steps (pretraining steps), flops or device_seconds (FLOPs "
        "or device time of all stages), or own (no equal budget: each method has its own train.steps)",
    )
    lr_search: list[float] = Field(
        default_factory=list,
        description="factors on train.lr that each method tries with one seed; the best factor on validation is used; "
        "empty: no search",
    )
    random: bool = Field(
        True,
        description="add, for each retrieved transfer set of compare.ways and compare.sizes, a row with as many random "
        "images of the gallery, unless one of the methods is that row",
    )
    sizes: list[int] = Field(
        default_factory=list,
        description="further transfer set sizes with which the methods 'oriented retrieved' and 'agnostic retrieved' "
        "are run",
    )
    budgets: list[float] = Field(
        default_factory=list,
        description="shares of the pretraining steps of the first method with which further, shorter runs of that "
        "method are made",
    )
    parallel: int | Literal["auto"] = Field(
        "auto",
        description="number of runs at the same time, each on a share of the cluster; auto: as many as keep the "
        "cluster busy",
    )
