"""Recipe sections that one job alone reads, and what all sections have in common."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ktray.recipe.section import Section


class CompareConfig(Section):
    """What jobs/compare.py runs beside each other; other jobs do not read it."""

    ways: dict[str, dict[str, Any]] | list[str] = Field(
        default_factory=dict,
        description="name of a way: its recipe keys, e.g. {mine: {objective.name: agnostic, objective.match: mse}}; "
        "or names of the default ways, e.g. [oriented retrieved, scratch]; empty: all default ways",
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="each way is run with each seed")
    steps: int | None = Field(None, ge=1, description="pretraining steps of the first way; null: the recipe's")
    equal: Literal["steps", "flops", "device_seconds", "own"] = Field(
        "steps",
        description="what all ways have alike: pretraining steps, or the FLOPs or the device time of all their stages; "
        "own: nothing, each has the steps of its keys",
    )
    lr_search: list[float] = Field(
        default_factory=list,
        description="factors on train.lr that each way tries on one seed, best on validation; empty: no search",
    )
    sizes: list[int] = Field(
        default_factory=list, description="further transfer set sizes of oriented and agnostic on the retrieved set"
    )
    budgets: list[float] = Field(
        default_factory=list, description="further, shorter runs of the first way: shares of its pretraining steps"
    )
    parallel: int | Literal["auto"] = Field(
        "auto", description="ways that run at once, each on its share of the cluster; auto: as many as keep it busy"
    )
