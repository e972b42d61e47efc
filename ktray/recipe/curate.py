"""The recipe section of jobs/curate.py. Other jobs do not read it."""

from __future__ import annotations

from pydantic import Field

from ktray.recipe.section import Section


class CurateConfig(Section):
    suggest: int = Field(
        0, ge=0, description="number of unlabelled images that are suggested for labelling, in a ranked list; 0: none"
    )
    student: str | None = Field(
        None,
        description="student whose disagreement with the teacher raises the rank of a suggested image: the id of a run "
        "in the store, or a folder (of a run or of its student), local or s3://; null: only coverage ranks",
    )
