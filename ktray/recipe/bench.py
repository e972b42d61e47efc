"""The recipe section of jobs/bench.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.recipe.places import Place
from ktray.recipe.section import Section


class BenchConfig(Section):
    only: list[
        Literal[
            "read",
            "embed",
            "search",
            "ingest",
            "train",
            "workers",
            "startup",
            "reuse",
            "memory",
            "gpu",
            "order",
            "neighbour",
        ]
    ] = Field(
        ["read", "embed", "search", "ingest", "train", "workers", "startup"],
        min_length=1,
        description="parts that are measured; reuse, memory and neighbour take long, gpu needs one, and order does not "
        "depend on the machine, so that they are measured only where this list names them",
    )
    quick: bool = Field(False, description="measure each part once, on few images and vectors, for a rough result")
    json_file: Place | None = Field(None, description="file that receives a copy of result.json; null: no copy")
    repeats: int = Field(3, ge=1, description="number of repetitions of each measurement; the median is reported")
    images: int = Field(
        4000, ge=1, description="number of photo-like JPEGs, 500 x 375 pixels each, that are read and embedded"
    )
    encoders: list[str] = Field(
        ["open_clip:ViT-B-32", "miniverse"],
        description="encoders that embed, with random weights: open_clip:<model>, timm:<model> or miniverse",
    )
    vectors: int = Field(1_000_000, ge=1000, description="number of rows of the synthetic gallery that is searched")
