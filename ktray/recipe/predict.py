"""The recipe section of jobs/predict.py. Other jobs do not read it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.recipe.places import Place
from ktray.recipe.section import Section


class PredictConfig(Section):
    run: str | None = Field(
        None,
        description="run whose model predicts: its id in the store, or its folder, local or s3://; null: the newest "
        "run in the store that has a student",
    )
    model: Literal["student", "teacher"] = Field(
        "student", description="model of the run that predicts: its student, or its adapted teacher"
    )
    data: list[Place] | Place | None = Field(
        None,
        description="images to predict, in one of the forms of gallery.data: a folder, tar shards, Parquet or CSV, "
        "local or s3://; one address or a list of them",
    )
    column: str = Field(
        "auto",
        description="column of Parquet and CSV files in predict.data that holds the images' bytes or paths; auto: "
        "recognised by type and name",
    )
    out: Place | None = Field(
        None,
        description="folder of the predictions, local or s3://; a later job with more images adds theirs; null: a "
        "folder in the store for each model",
    )
    probabilities: bool = Field(
        True, description="write the probabilities of all classes, in addition to that of the most probable class"
    )
    embedding: bool = Field(
        False,
        description="write the embedding of each image: the student's features before its classifier, or the output "
        "of the teacher's image tower",
    )
