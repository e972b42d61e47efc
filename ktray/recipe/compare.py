"""Recipe sections that one job alone reads, and what all sections have in common."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A section of the recipe. Unknown keys are refused; values are validated when assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Compare(Part):
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


class Bench(Part):
    only: list[Literal["read", "embed", "search", "ingest", "train", "workers", "startup", "reuse", "memory"]] = Field(
        ["read", "embed", "search", "ingest", "train", "workers", "startup"],
        min_length=1,
        description="what jobs/bench.py measures; reuse and memory, which take long, where they are named",
    )
    quick: bool = Field(False, description="one turn of each on few images and vectors: rough")
    json_file: str | None = Field(None, description="file that gets a copy of the result")
    repeats: int = Field(3, ge=1, description="turns of each comparison; the median counts")
    images: int = Field(4000, ge=1, description="photo-like JPEGs of 500 x 375 to read and embed")
    encoders: list[str] = Field(
        ["open_clip:ViT-B-32", "miniverse"],
        description="architectures to embed with, with random weights: open_clip:<model>, timm:<model>, miniverse",
    )
    vectors: int = Field(1_000_000, ge=1000, description="rows of the synthetic gallery to search in")
