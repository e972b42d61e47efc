"""What jobs/bench.py reads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.recipe.section import Section


class BenchConfig(Section):
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
