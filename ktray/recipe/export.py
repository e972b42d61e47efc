"""The recipe's section of jobs/export.py; other jobs do not read it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.recipe.section import Section


class ExportConfig(Section):
    run: str | None = Field(
        None,
        description="the run to export: its id in the store, or its folder, local or s3://; null: the newest run that "
        "left a student",
    )
    int8: bool = Field(False, description="also quantise to 8 bits, with settings chosen on validation")
    calibration: int = Field(
        256, ge=1, description="labelled training images that the ranges of the 8-bit activations are measured on"
    )
    batch: int = Field(32, ge=2, description="the larger of the two batches whose latency is measured; the other is 1")
    register_as: str | None = Field(None, description="name of a model in MLflow's registry that gets a new version")
    alias: str = Field("champion", min_length=1, description="alias that the new version gets")
    serve: Literal["float", "int8"] = Field("float", description="which of the files the model in MLflow runs")
