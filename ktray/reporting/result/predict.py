"""The result of jobs/predict.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.reporting.result.parts import Images, Number, PipelineRun, ResultPart


class PredictingModel(ResultPart):
    run: str = Field(description="id of the run whose model predicts")
    which: Literal["student", "teacher"]
    name: str
    classes: int


class PredictionFiles(ResultPart):
    folder: str = Field(description="the folder with the Parquet files")
    files: int
    bytes: int
    shards: int = Field(description="number of shards of the images; a large shard has several files")
    images: int
    embedding: int | None = Field(description="width of the embeddings; null: there are none")


class PredictResult(PipelineRun):
    """jobs/predict.py."""

    model: PredictingModel
    predictions: PredictionFiles
    counts: dict[str, int] = Field(
        description="number of images by predicted class; an image with several counts for each"
    )
    confidence: Number = Field(
        description="mean probability of the predicted class, or of the decisions on all classes"
    )
    images_per_second: Number | None = Field(
        description="rate of this run, with the start of its processes; null: all predictions were in the folder"
    )
    usd_per_million: Number | None = Field(
        description="cost of a million images at the rate of this run; null without a rate or a price"
    )
    data: Images
